"""Text in parallel columns, cut into windows for truncated backpropagation through time.

The ids are laid out as `[T_total, B]`: column b is the b-th contiguous piece of the text, what does not fill a row is
dropped. A window at i of length L has the inputs `[i, i + L)` and the targets `[i + 1, i + 1 + L)`, so the state at its
end is the state that the next window begins with. Every row but the first is a target exactly once.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastlm.errors import DataError

SIGMA = 5  # of the window length
MIN_LENGTH = 5  # of a sampled window
HALF_RATE = 0.05  # how often the mean length is half of bptt


def batchify(ids: Tensor, batch_size: int) -> Tensor:
    """Lay a text out in columns.

    Args:
        ids: `[N]`, an integer dtype.
        batch_size: number of columns B.

    Returns:
        `[N // B, B]`, contiguous; the remainder is dropped.

    Raises:
        DataError: the text is shorter than two rows. TypeError, ValueError: `ids` or `batch_size` is not as said.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"ids must have an integer dtype, got {ids.dtype}")
    if ids.dim() != 1:
        raise ValueError(f"ids must be of shape [N], got {list(ids.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if len(ids) < 2 * batch_size:
        wanted = f"{batch_size} columns need at least {2 * batch_size}"
        raise DataError(f"the text is too short for the batch: it has {len(ids)} tokens, {wanted}")
    rows = len(ids) // batch_size
    return ids[: rows * batch_size].view(batch_size, rows).t().contiguous()


def eval_windows(ids: Tensor, batch_size: int, bptt: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of a fixed length, for evaluation; the last one may be shorter.

    Yields:
        (inputs `[T, B]`, targets `[T, B]`) with T <= bptt. The targets of all windows are every token of the columns
        but the first of each: divide a sum over them by their number, not by the length of the text.

    Raises:
        DataError, TypeError, ValueError: as `batchify` does, or `bptt` is less than 1.
    """
    if bptt < 1:
        raise ValueError(f"bptt must be at least 1, got {bptt}")
    columns = batchify(ids, batch_size)
    return (
        (columns[i : i + bptt][: len(columns) - 1 - i], columns[i + 1 : i + 1 + bptt])
        for i in range(0, len(columns) - 1, bptt)
    )


class BPTTLoader:
    """Windows of random length over a training text, with the learning-rate scale of each.

    The length is L = max(5, int(Normal(base, 5))), base = bptt with probability 0.95, else bptt / 2 (Merity et al.
    2017, arXiv 1708.02182, section 5), and the scale is L / bptt with the L that was drawn, also for the last window
    of an epoch, which is cut to what is left and may be as short as one step. With `variable=False` every length is
    bptt and every scale 1.

    Iterating goes on where the last iteration stopped, until the epoch ends: a loop that was left, or a state that
    was loaded, is continued. A window counts as done when it has been handed out: a state that was taken at the last
    window of an epoch yields nothing, and ends the epoch.

    Attributes:
        length: targets a column has in an epoch. position: how many of them are done. epoch: how many epochs are done.
    """

    def __init__(self, ids: Tensor, batch_size: int, bptt: int, *, variable: bool = True, seed: int = 0):
        """Raises DataError, TypeError, ValueError as `batchify` does, and ValueError for a bptt less than 1."""
        if bptt < 1:
            raise ValueError(f"bptt must be at least 1, got {bptt}")
        self._columns = batchify(ids, batch_size)
        self._random = np.random.Generator(np.random.PCG64(seed))
        self.bptt = bptt
        self.variable = variable
        self.length = len(self._columns) - 1
        self.position = 0
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yields (inputs `[T, B]`, targets `[T, B]`, learning-rate scale)."""
        while self.position < self.length:
            start, drawn = self.position, self._draw_length()
            stop = min(start + drawn, self.length)
            self.position = stop
            yield self._columns[start:stop], self._columns[start + 1 : stop + 1], drawn / self.bptt
        self.position = 0
        self.epoch += 1

    def _draw_length(self) -> int:
        if not self.variable:
            return self.bptt
        base = self.bptt / 2 if self._random.random() < HALF_RATE else self.bptt
        return max(MIN_LENGTH, int(self._random.normal(base, SIGMA)))

    def state_dict(self) -> dict:
        """Epoch, position and random state, as plain data for JSON, exact at any point of an epoch."""
        rows, batch_size = self._columns.shape
        return {
            "epoch": self.epoch,
            "position": self.position,
            "random": self._random.bit_generator.state,
            "shape": [rows, batch_size],
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken.

        Raises:
            DataError: the state is of a text or a batch of another size.
        """
        shape = list(self._columns.shape)
        if state["shape"] != shape:
            raise DataError(f"the position is one in columns of shape {state['shape']}, this text has {shape}")
        self.epoch, self.position = state["epoch"], state["position"]
        self._random.bit_generator.state = state["random"]
