"""CUDA graphs of training steps: the forward and backward pass of a window, recorded once and launched as one.

A small step is a thousand short kernels, and a processor launches them more slowly than a GPU runs them. A graph has
fixed shapes and addresses. So each length T has its own; rounding lengths up would change those that were drawn, and
with them the rate. State, loss and gradients stay in the same tensors for all graphs and live outside of the memory
that graphs share, which is thus no larger than the largest needs. Seeds are drawn by the graph: PyTorch moves its
generator on at each replay as far as the recorded draws did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlm.errors import FastlmError
from fastlm.models import State, map_state

Backward = Callable[[Tensor, Tensor, State], tuple[Tensor, State]]
Capture = Callable[[Callable[[], None]], Callable[[], None]]
LIMIT = 64  # graphs; the lengths around bptt and around half of it are fewer


def cuda_capture() -> Capture:
    """A function that records work on the GPU, without doing it, and returns what does it."""
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog may go on asking for its events meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return capture


class Graphs:
    """The gradients of a window, from a graph where its length came up before.

    The first window of a length runs operator by operator: what is compiled or allocated at a first call is then there
    when the second is recorded. Targets are taken to the GPU, where an adaptive softmax has a fixed shape, that of a
    full one.

    Args:
        parameters: all that gradients are computed for. capture: that of `cuda_capture`.
        limit: how many graphs are made at most.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], capture: Capture, limit: int = LIMIT):
        self._capture, self._limit = capture, limit
        self._parameters = list(parameters)
        self._gradients = [torch.zeros_like(p) for p in self._parameters]
        self._seen: set[int] = set()
        self._replays: dict[int, Callable[[], None]] = {}
        self._windows: dict[int, tuple[Tensor, Tensor]] = {}
        self._nll = self._state = None

    def __call__(self, backward: Backward, inputs: Tensor, targets: Tensor, state: State) -> tuple[Tensor, State]:
        """Puts the gradients into the parameters; loss and state are overwritten by the next call.

        Args:
            backward: the same at every call; it takes what follows, adds to the gradients without asking the device for
                a value, and returns the loss and the next state.
            inputs, targets: `[T, B]`. state: of B streams.

        Raises:
            FastlmError: the step cannot be recorded.
        """
        # They may have been set to None since.
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        length = len(inputs)
        targets = targets.to(inputs.device, non_blocking=True)
        if length not in self._replays:
            if length not in self._seen or len(self._replays) == self._limit:
                self._seen.add(length)
                return self._compute(backward, inputs, targets, state)
            self._record(backward, inputs, targets, state)
        torch._foreach_copy_(self._windows[length], (inputs, targets))
        if state is not self._state:
            torch._foreach_copy_(tree_leaves(self._state), tree_leaves(state))
        self._replays[length]()
        return self._nll, self._state

    def _compute(self, backward: Backward, inputs: Tensor, targets: Tensor, state: State) -> tuple[Tensor, State]:
        torch._foreach_zero_(self._gradients)
        return backward(inputs, targets, state)

    def _record(self, backward: Backward, inputs: Tensor, targets: Tensor, state: State) -> None:
        window = inputs.clone(), targets.clone()
        if self._state is None:
            self._state, self._nll = map_state(torch.clone, state), torch.zeros((), device=inputs.device)

        def work() -> None:
            nll, after = self._compute(backward, *window, self._state)
            self._nll.copy_(nll)
            torch._foreach_copy_(tree_leaves(self._state), tree_leaves(after))

        try:
            self._replays[len(inputs)] = self._capture(work)
        except RuntimeError as e:
            what = str(e).splitlines()[0]
            raise FastlmError(f"the step cannot be recorded as a CUDA graph ({what}): set cuda_graphs to false") from e
        self._windows[len(inputs)] = window
