"""Large matrix products: one rule says which GEMM makes them, one of PyTorch's or, where a is transposed, fastlm's.

On AMD the library behind `torch.mm` reaches half to three quarters of what oneDNN reaches in float32. GF/s, mm then
oneDNN, for `[M, K] x [K, N]` on two cores of an EPYC 9004 (peak 230), PyTorch 2.13, medians of interleaved runs, b
row-major; a transposed b, as in x @ w.t(), gains a little less:

    a row-major     1400 x 4600 x 1150  172 205    1400 x 1150 x 4600   140 188    10000 x 400 x 1400  165 217
    (M x N x K)     1400 x 400 x 10000  170 190    20 x 4600 x 1150      57 100    256 x 256 x 256     149 157
                    192 x 192 x 192     144 131    20 x 400 x 400        85  79    64 x 64 x 64         37  14
    a transposed    1550 x 1550 x 1400  133 188    4600 x 1150 x 1400   132 189    10000 x 1150 x 1400 135 152
                    4600 x 800 x 1400   189 184    4600 x 600 x 1400    192 176    1400 x 400 x 10000  166 102

oneDNN's operator copies a transposed a first, at a price that goes with 1 / N; turned around, as (b^T a)^T, it copies b
and the result instead and gains nothing over mm. `csrc/matmul.cpp` packs a as it goes. GF/s, mm, oneDNN, own:

    a transposed    4600 x 1150 x 1400  126 186 203   4600 x 1150 x 5600  125 147 192   4600 x 400 x 1400  154 147 178
    (M x N x K)     1600 x 1150 x 1400  162 183 193   10000 x 400 x 1400  186 118 193   4650 x 800 x 1400  188 171 197

In bfloat16 mm is oneDNN already, and within 5 % of it. A first call with a new shape costs below 2 ms more; oneDNN
remembers the last 1024.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import _lib
from fastlm.ops.dropconnect import dropconnect

_lib.define("matmul_tn(Tensor a, Tensor b, Tensor? seed, float p) -> Tensor")


def _matmul_tn(a, b, seed, p):
    product = a.t() @ b
    return product if seed is None else dropconnect(product, p, seed, impl="reference")


_lib.reference("matmul_tn", _matmul_tn)
_lib.fake("matmul_tn", lambda a, b, seed, p: a.new_empty(a.shape[1], b.shape[1]))
_own = torch.ops.fastlm.matmul_tn.default

# Of float32 matrices, with factors of 11 bits where the device has them, whatever PyTorch's setting for matrices says.
_lib.define("matmul_tf32(Tensor a, Tensor b) -> Tensor")
_lib.reference("matmul_tf32", torch.mm)
_lib.fake("matmul_tf32", lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
matmul_tf32 = torch.ops.fastlm.matmul_tf32.default

_LEAST = 4_000_000  # multiplications; below, oneDNN's 30 us a call count
_LEAST_M = 512  # rows of a^T that are enough work for a few threads
_LEAST_N = 1024  # columns for which the copy of a transposed a pays

_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@cache
def _amd() -> bool:
    """Whether this is an AMD processor: on Intel's, mm is tuned for the machine, and others are not measured."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


@cache
def _wide() -> bool:
    """Whether fastlm's kernel is there and for 512-bit vectors, the only ones it is measured with."""
    return ("matmul_tn", "cpu") in _lib.native_kernels and str(_lib.instruction_set()).startswith("avx512")


def by_own(a: Tensor, b: Tensor) -> bool:
    """Whether fastlm's kernel makes the product of `a^T` and `b`, `a [K, M]` and `b [K, N]` row-major."""
    if not a.dtype == b.dtype == torch.float32 or a.device.type != "cpu" or a.shape[0] != b.shape[0]:
        return False
    if a.shape[1] < _LEAST_M or a.shape[0] * a.shape[1] * b.shape[1] < _LEAST:
        return False
    return a.is_contiguous() and b.is_contiguous() and _wide() and _amd()


def by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN makes the product of `a [M, K]` and `b [K, N]`, else mm; either may be a transposed view."""
    if not a.dtype == b.dtype == torch.float32 or not a.device.type == b.device.type == "cpu":
        return False
    (M, K), N = a.shape, b.shape[1]
    if M * N * K < _LEAST or b.shape[0] != K:
        return False
    if torch.compiler.is_compiling() or not {type(a), type(b)} <= {Tensor, torch.nn.Parameter}:
        return False
    if _onednn is None or not torch.backends.mkldnn.is_available() or not _amd():
        return False
    if not (b.is_contiguous() or b.t().is_contiguous()):
        return False
    return a.is_contiguous() or (N >= _LEAST_N and a.t().is_contiguous())


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a [M, K]` times `b [K, N]`, each row-major or a transposed view (any strides are right, these are fast).

    It is as differentiable as `torch.mm`, which makes every product that a graph records.
    """
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return torch.mm(a, b)
    if by_own(a.t(), b):
        return _own(a.t(), b, None, 0.0)
    return _onednn(a, b.t(), None, "none", [], "") if by_onednn(a, b) else torch.mm(a, b)


def weight_gradient(grad: Tensor, x: Tensor, seed: Tensor, p: float) -> Tensor:
    """`grad^T x` for `grad [K, M]` and `x [K, N]`, with the mask and scale of a weight `[M, N]` that was dropped.

    The mask is that of `dropconnect`. Not differentiable.
    """
    if by_own(grad, x):
        return _own(grad, x, seed, p)
    return dropconnect(matmul(grad.t(), x), p, seed)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias):
        return _onednn(x, weight, bias, "none", [], "")

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            matmul(grad, weight) if needs_x else None,
            matmul(grad.t(), x) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` by the rule above: `x [..., K]`, `weight [N, K]`, `bias [N]`; gives `[..., N]`.

    Differentiable any number of times. Autocast, compilers and functional transforms get PyTorch's own.
    """
    plain = (
        x.dim() < 2
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._are_functorch_transforms_active()
        or not (bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1] and bias.is_contiguous()))
    )
    if plain or not by_onednn(x.flatten(0, -2), weight.t()):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
