"""The mask generator of the package in plain PyTorch: Philox4x32-10 indexed by element.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Element `e` of a masked tensor
(row-major, 64-bit) reads lane `e & 3` of the block with

    key = (low, high 32 bits of the seed),   counter = (low, high 32 bits of e >> 2, stream, 0)

and is kept when that lane is >= floor(p 2^32). A mask depends on the seed, the stream and the element alone, never on
threads, tiles or the device: `csrc/philox.h` draws the same bits.
"""

import threading

import torch

WEIGHT, ZONEOUT, LOCKED, EMBEDDING = range(4)  # streams: one seed, independent masks

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_this_thread = threading.local()


def draw_seed(device: torch.device | str) -> torch.Tensor:
    """Draw a seed from PyTorch's default generator of the device: an int64 scalar tensor, never read by the host.

    Inside a block of `SharedSeeds` it may be one that was drawn before.
    """
    shared = getattr(_this_thread, "shared", None)
    return _draw(device) if shared is None else shared.draw(device)


def _draw(device):
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


class SharedSeeds:
    """Seeds for pieces of one batch, so that its masks are the same in all of them.

    Every `with` block over it is given the same seeds in the same order; the first draws them. Of the thread that
    enters it.
    """

    def __init__(self):
        self._drawn: list[torch.Tensor] = []

    def __enter__(self) -> "SharedSeeds":
        self._used, self._outer = 0, getattr(_this_thread, "shared", None)
        _this_thread.shared = self
        return self

    def __exit__(self, *_: object) -> None:
        _this_thread.shared = self._outer

    def draw(self, device: torch.device | str) -> torch.Tensor:
        """The next seed of the block."""
        if self._used == len(self._drawn):
            self._drawn.append(_draw(device))
        self._used += 1
        return self._drawn[self._used - 1]


def philox4x32(counter, key, rounds: int = 10):
    """The Philox4x32 bijection on int64 tensors that hold 32-bit words.

    Args:
        counter: four tensors. key: two tensors. rounds: 10 for the standard generator.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = (
            c0 * _MULTIPLIERS[0],
            c2 * _MULTIPLIERS[1],
        )  # wraps, and the low 64 bits are right
        high0, high1 = (product0 >> 32) & _LOW, (product1 >> 32) & _LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _LOW, high0 ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask(shape, p: float, seed: torch.Tensor, stream: int) -> torch.Tensor:
    """The mask of a tensor: True where an element is kept.

    Args:
        shape: sizes of the masked tensor. p: probability of dropping, in [0, 1]. seed: int64 scalar tensor.
        stream: WEIGHT, ZONEOUT, LOCKED or EMBEDDING.

    Returns:
        A bool tensor of that shape on the device of the seed.
    """
    shape = torch.Size(shape)
    count = shape.numel()
    block = torch.arange((count + 3) // 4, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(block)
    lanes = philox4x32((block & _LOW, (block >> 32) & _LOW, zero + stream, zero), (seed & _LOW, (seed >> 32) & _LOW))
    return (torch.stack(lanes, dim=-1).reshape(-1)[:count] >= threshold(p)).reshape(shape)


def threshold(p: float) -> int:
    """The smallest 32-bit lane that keeps its element."""
    return int(p * 2.0**32)


def scale(p: float) -> float:
    """The factor that keeps the mean of a masked tensor: 1 / (1 - p), and 0 where everything is dropped."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0
