"""What this machine reaches at most, measured in the same run: copying memory and multiplying matrices.

Both are the best of several calls and of the ways that PyTorch has, so that a share of the ceiling is not flattered.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import timed

COPY_BYTES = {"cpu": 168 << 20, "cuda": 1 << 30}
GEMM_SIZES = {"cpu": (2048, 3072), "cuda": (8192,)}


def measure_ceilings(device: str, *, tiny: bool = False, repeats: int = 3) -> dict[str, float]:
    """Copy in GB/s, read and write counted; products in GFLOP/s for fp32 and bf16 (on a GPU fp32 is TF32-free)."""
    sizes = (256,) if tiny else GEMM_SIZES[device]
    found = {"copy": _copy(device, 1 << 20 if tiny else COPY_BYTES[device], repeats)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found[name] = max(_product(device, dtype, size, repeats) for size in sizes)
    return found


def _best(device: str, repeats: int, run: Callable[[], Any]) -> float:
    """Seconds of the fastest of several calls, after one that is not counted."""
    run()
    return min(timed(device, run)[1] for _ in range(repeats)) / 1e3


def _copy(device: str, size: int, repeats: int) -> float:
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return 2 * source.nbytes / min(_best(device, repeats, way) for way in ways) / 1e9


def _product(device: str, dtype: torch.dtype, size: int, repeats: int) -> float:
    x, w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    ways = [lambda: F.linear(x, w), lambda: x @ w]
    if device == "cpu" and torch.backends.mkldnn.is_available():  # faster than MKL on some processors
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))
    return 2 * size**3 / min(_best(device, repeats, way) for way in ways) / 1e9


def floor_ms(ceilings: dict[str, float], dtype: str, flops: float, bytes_: float) -> tuple[float, str]:
    """The least time that the work can take at the ceilings, and which of them sets it."""
    rate = ceilings["bf16" if dtype in ("bf16", "fp16") else "fp32"]
    by_memory, by_products = bytes_ / ceilings["copy"] / 1e6, flops / rate / 1e6
    return (by_memory, "copy") if by_memory >= by_products else (by_products, "GEMM")
