"""DropConnect: a random mask on a weight, drawn anew at every call.

    y_e = w_e keep_e / (1 - p),        dL/dw_e = dL/dy_e keep_e / (1 - p)

with keep_e from the mask generator (`fastlm.ops.philox`, stream 0). The adjoint is the operator itself on the
gradient. Wan, Zeiler, Zhang, LeCun and Fergus, "Regularization of Neural Networks using DropConnect", ICML 2013, with
one mask for a whole sequence and batch as in Merity, Keskar and Socher, arXiv 1708.02182, section 2.
"""

import torch
from torch.autograd.function import once_differentiable

from fastlm import _lib
from fastlm.ops import _checks, philox

_lib.define("dropconnect_fwd(Tensor weight, float p, Tensor seed) -> Tensor")
_lib.define("dropconnect_mask(Tensor seed, SymInt count, float p, int stream) -> Tensor")
_lib.declare("dropconnect", kernels=("dropconnect_fwd",), triton=("dropconnect_fwd",))
_MASK = ("dropconnect_mask",)
_lib.declare("dropconnect_mask", kernels=_MASK, triton=_MASK, dtypes=(torch.int64,))


def reference(weight: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """DropConnect as the obvious product, differentiable."""
    keep = philox.keep_mask(weight.shape, p, seed, philox.WEIGHT)
    return torch.where(keep, weight * philox.scale(p), 0)


_lib.reference("dropconnect_fwd", reference)
_lib.reference("dropconnect_mask", lambda seed, count, p, stream: philox.keep_mask((count,), p, seed, stream))
_lib.fake(
    "dropconnect_fwd",
    lambda weight, p, seed: torch.empty(weight.shape, dtype=weight.dtype, device=weight.device),
)
_lib.fake("dropconnect_mask", lambda seed, count, p, stream: seed.new_empty((count,), dtype=torch.bool))


class _DropConnect(torch.autograd.Function):
    @staticmethod
    def forward(weight, p, seed, impl):
        return _lib.kernel("dropconnect_fwd", impl)(weight, p, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.p, seed, ctx.impl = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _lib.kernel("dropconnect_fwd", ctx.impl)(grad, ctx.p, *ctx.saved_tensors), None, None, None


def dropconnect(
    weight: torch.Tensor, p: float, seed: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    """Drop elements of a weight and scale the rest by 1 / (1 - p).

    Args:
        weight: any shape; float32, bfloat16, float16 or float64. Never modified.
        p: probability of dropping an element, in [0, 1].
        seed: int64 scalar tensor on the device of `weight`; drawn from PyTorch's default generator when None.
        impl: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`.

    Returns:
        A new tensor like `weight`; differentiable once.

    Raises:
        TypeError: wrong dtype or device. ValueError: `p` outside [0, 1]. RuntimeError: `impl` is not installed.
    """
    _checks.floating("weight", weight)
    p = _checks.probability("p", p)
    chosen = _lib.resolve("dropconnect", impl, weight)
    if seed is None:
        seed = philox.draw_seed(weight.device)
    _checks.seed(seed, weight)
    if chosen == "reference":
        return reference(weight, p, seed)
    return _DropConnect.apply(weight, p, seed, chosen)


def dropconnect_mask(
    shape, p: float, seed: torch.Tensor, *, stream: int = philox.WEIGHT, impl: str = "auto"
) -> torch.Tensor:
    """The mask that `dropconnect` applies: True where an element is kept.

    Args:
        shape: sizes of the masked tensor. p: probability of dropping, in [0, 1]. seed: int64 scalar tensor.
        stream: which of the independent masks of a seed: 0 weights, 1 zoneout, 2 locked dropout, 3 embedding rows.
        impl: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`.

    Returns:
        A bool tensor of that shape on the device of `seed`.

    Raises:
        TypeError: `seed` is not an int64 tensor. ValueError: `p` outside [0, 1], `stream` outside 0..3.
        RuntimeError: `impl` is not installed.
    """
    _checks.seed(seed, seed)
    p = _checks.probability("p", p)
    if stream not in (philox.WEIGHT, philox.ZONEOUT, philox.LOCKED, philox.EMBEDDING):
        raise ValueError(f"stream must be 0, 1, 2 or 3, got {stream}")
    shape = torch.Size(shape)
    chosen = _lib.resolve("dropconnect_mask", impl, seed)
    if chosen == "reference":
        return philox.keep_mask(shape, p, seed, stream)
    return _lib.kernel("dropconnect_mask", chosen)(seed, shape.numel(), p, stream).reshape(shape)
