"""Orders of texts of unequal length that keep the padding in a batch small (as fastai's samplers do)."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

CHUNK_BATCHES = 50  # batches that are sorted together


class SortSampler(Sampler[int]):
    """The indices from the longest text to the shortest, for evaluation; of equals the first comes first."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = list(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(_longest_first(range(len(self.lengths)), self.lengths))


class SortishSampler(Sampler[int]):
    """The indices in an order that is random, yet has texts of like length in one batch, for training.

    A random permutation is cut into chunks of 50 batches, each chunk is sorted, longest first, and its batches are
    shuffled with those of the others. Two batches keep their place: the one with the longest text is first, so that
    memory runs out at once or never, and one that is not full is last, so that no batch straddles two others.

    Args:
        lengths: of the texts. batch_size: of the batches that the indices are cut into.
        generator: what the order is drawn from, new with every iteration; None means torch's default generator.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, generator: torch.Generator | None = None):
        """Raises ValueError for a batch size less than 1."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.generator = generator

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = self._permutation(len(self.lengths))
        if order:
            longest = max(range(len(order)), key=lambda i: self.lengths[order[i]])
            order[0], order[longest] = order[longest], order[0]
        chunk = CHUNK_BATCHES * self.batch_size
        order = [
            i
            for start in range(0, len(order), chunk)
            for i in _longest_first(order[start : start + chunk], self.lengths)
        ]
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        full = len(order) // self.batch_size
        middle = [batches[1 + i] for i in self._permutation(max(0, full - 1))]
        # With a single batch that is not full, the first is also the last.
        last = batches[max(full, 1) :]
        return (i for batch in [*batches[:1], *middle, *last] for i in batch)

    def _permutation(self, n: int) -> list[int]:
        return torch.randperm(n, generator=self.generator).tolist()


def _longest_first(indices: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda i: -lengths[i])
