"""CUDA graphs of steps: on the CPU with graphs that are played, on a GPU with real ones."""

import pytest
import torch
from test_step import make, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fastlm.errors import FastlmError
from fastlm.training.graphs import Graphs

LENGTHS = (7, 4, 7, 7, 1, 4, 7, 5, 4, 1)  # of which 7, 4 and 1 come again


class Recorder(TorchDispatchMode):
    """Plays a CUDA graph: notes the operators that run, and runs them again on the very same tensors."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.before = [], set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, torch.Tensor) and id(x) not in self.made:
                    self.before.setdefault(id(x), (x, x.clone()))
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, out))
        if not function._schema.is_mutable:
            self.made |= {id(x) for x in tree_leaves(out)}
        return out

    @torch.no_grad()
    def undo(self):
        """A graph is recorded without being run."""
        for tensor, before in self.before.values():
            tensor.copy_(before)

    @torch.no_grad()
    def replay(self):
        now = {}
        for function, args, kwargs, out in self.calls:
            args, kwargs = tree_map_only(torch.Tensor, lambda x: now.get(id(x), x), (args, kwargs))
            new = function(*args, **kwargs)
            now.update((id(x), y) for x, y in zip(tree_leaves(out), tree_leaves(new), strict=True))


def capture(work):
    random, recorder = torch.get_rng_state(), Recorder()
    with recorder:
        work()
    recorder.undo()
    torch.set_rng_state(random)
    return recorder.replay


def graphed(limit=64, capture=capture, **changes):
    """A step that takes its gradients from played graphs, and the lengths that were recorded."""
    step, recorded = make(**changes), []

    def noted(work):
        recorded.append(work)
        return capture(work)

    step.graphs = Graphs(step.model.parameters(), noted, limit)
    return step, recorded


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cell": "qrnn", "optimizer": "adam", "lr": 1e-3, "window": 3},
        {"cell": "gru", "accumulate": 2, "clip": 0},
        {"accumulate": 2, "precision": "bfloat16", "optimizer": "asgd"},
    ],
    ids=str,
)
def test_replayed_steps_are_the_steps(changes):
    plain, (step, recorded) = make(**changes), graphed(**changes)
    expected, found = run(plain, LENGTHS), run(step, LENGTHS)
    assert len(recorded) == 3
    assert equal(found, expected) and len(set(found[0].tolist())) == len(LENGTHS)
    assert equal(list(step.model.parameters()), list(plain.model.parameters()))
    assert equal([p.grad for p in step.model.parameters()], [p.grad for p in plain.model.parameters()])


def test_new_streams_a_restored_state_and_gradients_that_were_dropped():
    plain, (step, _) = make(), graphed()
    first = run(step, LENGTHS)
    assert equal(first, run(plain, LENGTHS))
    kept = tree_map(torch.clone, first[1])
    for other in (plain, step):
        other.optimizer.zero_grad()
    assert equal(run(step, (7, 4)), run(plain, (7, 4)))  # new streams
    words = torch.randint(30, (2, 7, 4))
    torch.manual_seed(5)
    found = tree_map(torch.clone, step(*words, kept, 1.0, 1.0))
    torch.manual_seed(5)
    assert equal(found, plain(*words, kept, 1.0, 1.0))


def test_windows_are_not_modified():
    step, recorded = graphed()
    windows, state = [torch.randint(30, (2, 7, 4)) for _ in range(3)], None
    before = [window.clone() for window in windows]
    for window in windows:
        _, state = step(*window, state, 1.0, 1.0)
    assert len(recorded) == 1 and equal(windows, before)


def test_no_more_graphs_than_the_limit():
    plain, (step, recorded) = make(), graphed(limit=1)
    assert equal(run(step, LENGTHS), run(plain, LENGTHS)) and len(recorded) == 1


def test_a_step_that_cannot_be_recorded_says_what_to_do():
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    step, _ = graphed(capture=refuse)
    with pytest.raises(FastlmError, match=r"\(operation not .* capturing\): set cuda_graphs to false$"):
        run(step, LENGTHS)


def test_without_a_gpu_the_key_is_without_effect():
    assert make(cuda_graphs=True).graphs is None


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", ["lstm", "qrnn", "gru"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_cuda_graphs_make_the_steps(cell, accumulate, precision):
    changes = {"cell": cell, "accumulate": accumulate, "precision": precision, "hidden_size": 96}
    plain, step = (make("cuda", cuda_graphs=graphs, **changes) for graphs in (False, True))
    expected = run(plain, LENGTHS)
    random = torch.cuda.get_rng_state()
    found = run(step, LENGTHS)
    assert len(step.graphs._replays) == 3
    assert torch.equal(torch.cuda.get_rng_state(), random)  # so that a checkpoint goes on alike
    tolerance = 1e-4 if precision == "float32" else 2e-2
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    for ours, wanted in zip(tree_leaves(found[1]), tree_leaves(expected[1]), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)
    for ours, wanted in zip(step.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)
