"""How near a run comes to what its device can do: the products that its steps need, over those the device makes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.models import LanguageModel
from fastlm.ops import _matmul
from fastlm.training.parallel import Ranks

SIZES = {"cpu": 1536, "cuda": 8192}  # of the square matrices whose product is timed
SECONDS = 0.5  # of timing
LEAST = 1_000_000  # weights; below, a run may be over before the product is


@dataclass(frozen=True)
class Ceiling:
    """What steps are measured against.

    Attributes:
        token_flops: what training needs for a token. flops: a second, of products alone, on all ranks together.
    """

    token_flops: int
    flops: float

    def share(self, tokens_per_second: float) -> float:
        """The part of the ceiling that so many tokens take."""
        return tokens_per_second * self.token_flops / self.flops

    def to_dict(self, tokens_per_second: float) -> dict[str, float]:
        """What results.json has of it."""
        return {"ceiling_flops": self.flops, "share_of_ceiling": self.share(tokens_per_second)}

    def words(self, tokens_per_second: float) -> str:
        """The share as a sentence's end."""
        rate = f"{self.flops / 1e12:,.1f} T" if self.flops >= 1e13 else f"{self.flops / 1e9:,.0f} G"
        return f"{self.share(tokens_per_second):.0%} of the {rate}FLOP/s that the machine multiplies at"


def find_ceiling(model: LanguageModel, device: torch.device, dtype: torch.dtype, ranks: Ranks) -> Ceiling | None:
    """Measures what all ranks can do together; None for a model so small that its products tell nothing."""
    weights = multiplied_weights(model)
    if weights < LEAST:
        return None
    return Ceiling(6 * weights, sum(ranks.gather(product_flops(device, dtype))))


def multiplied_weights(model: LanguageModel) -> int:
    """How many weights a token is multiplied by: 2 operations each going forwards and 4 backwards.

    Those of the layers and of the decoder; rows of the embedding are looked up. Of an adaptive softmax the head alone
    counts: how many tokens go on to a tail depends on the text.
    """
    layers, config = sum(p.numel() for p in model.layers.parameters() if p.dim() > 1), model.config
    rows = config.cutoffs[0] + len(config.cutoffs) if config.cutoffs else config.vocab_size
    return layers + rows * config.output_size


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in a large product of matrices, the best of many calls; leaves random generators alone."""
    generator = torch.Generator(device).manual_seed(0)
    size = SIZES["cpu" if device.type == "cpu" else "cuda"]
    x, w = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    ways = (torch.mm, F.linear, *([_matmul.matmul] if device.type == "cpu" else []))
    best, end = math.inf, time.perf_counter() + SECONDS
    while math.isinf(best) or time.perf_counter() < end:
        best = min(best, *(_seconds(way, x, w) for way in ways))
    return 2 * size**3 / best


@torch.no_grad()
def _seconds(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> float:
    _wait(x.device)
    before = time.perf_counter()
    product(x, w)
    _wait(x.device)
    return time.perf_counter() - before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
