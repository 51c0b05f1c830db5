"""Locked (variational) dropout: one mask [B, H] for all steps of [T, B, H].

    y_tbh = x_tbh m_bh,    m_bh = keep_bh / (1 - p),        dL/dx_tbh = dL/dy_tbh m_bh

with keep_bh from the mask generator (`fastlm.ops.philox`, stream 2) over the row-major index of [B, H], and m in the
dtype of x. The adjoint is the operator itself on the gradient. Gal and Ghahramani, "A Theoretically Grounded
Application of Dropout in Recurrent Neural Networks", arXiv 1512.05287, section 4; as in Merity, Keskar and Socher,
arXiv 1708.02182, section 4.2, each row of the batch has its own mask.
"""

import torch

from fastlm import _lib
from fastlm.ops import _checks, philox
from fastlm.ops.dropconnect import dropconnect_mask

_lib.define("locked_dropout_fwd(Tensor x, float p, Tensor seed) -> Tensor")
_lib.declare("locked_dropout", triton=("locked_dropout_fwd",))


def reference(x: torch.Tensor, p: float, seed: torch.Tensor, masked_by: str = "reference") -> torch.Tensor:
    """The product with the mask, differentiable; the fallback has the mask from its kernel, `masked_by="auto"`."""
    mask = dropconnect_mask(x.shape[1:], p, seed, stream=philox.LOCKED, impl=masked_by)
    return x * (mask.to(x.dtype) * philox.scale(p))


_lib.reference("locked_dropout_fwd", lambda x, p, seed: reference(x, p, seed, "auto").contiguous())
_lib.fake("locked_dropout_fwd", lambda x, p, seed: x.new_empty(x.shape))


class _LockedDropout(torch.autograd.Function):
    @staticmethod
    def forward(x, p, seed, impl):
        return _lib.kernel("locked_dropout_fwd", impl)(x, p, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.p, seed, ctx.impl = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, grad):  # linear: it has derivatives of every order
        return _LockedDropout.apply(grad, ctx.p, *ctx.saved_tensors, ctx.impl), None, None, None


def locked_dropout(x: torch.Tensor, p: float, seed: torch.Tensor | None = None, *, impl: str = "auto") -> torch.Tensor:
    """Drop the same elements of every step and scale the rest by 1 / (1 - p).

    Args:
        x: [T, B, H], float32, bfloat16, float16 or float64. Never modified.
        p: probability of dropping an element of [B, H], in [0, 1].
        seed: int64 scalar tensor on the device of `x`; drawn from PyTorch's default generator when None.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        A new tensor like `x`; differentiable.

    Raises:
        TypeError: wrong dtype or device. ValueError: wrong shape, or `p` outside [0, 1]. RuntimeError: `impl` is not
        installed.
    """
    _checks.floating("x", x)
    _checks.dims("x", x, "TBH")
    p = _checks.probability("p", p)
    chosen = _lib.resolve("locked_dropout", impl, x)
    if seed is None:
        seed = philox.draw_seed(x.device)
    _checks.seed(seed, x)
    if chosen in ("reference", "fallback"):  # which keeps the mask for the backward pass: quicker than drawing it again
        return reference(x, p, seed, "reference" if chosen == "reference" else "auto")
    return _LockedDropout.apply(x, p, seed, chosen)
