"""Locked (variational) dropout: one mask [B, H] for all steps of [T, B, H].

    y_tbh = x_tbh m_bh,    m_bh = keep_bh / (1 - p),        dL/dx_tbh = dL/dy_tbh m_bh

with keep_bh from the mask generator (`fastlm.ops.philox`, stream 2) over the row-major index of [B, H], plus an offset
where x is a part of a larger batch, and m in the dtype of x. The adjoint is the operator itself on the gradient. Gal
and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", arXiv 1512.05287,
section 4; as in Merity, Keskar and Socher, arXiv 1708.02182, section 4.2, each row of the batch has its own mask.
"""

import torch

from fastlm import _lib
from fastlm.ops import _checks, philox
from fastlm.ops.dropconnect import dropconnect_mask

_lib.define("locked_dropout_fwd(Tensor x, float p, Tensor seed, SymInt offset) -> Tensor")
_lib.declare("locked_dropout", triton=("locked_dropout_fwd",))


def reference(
    x: torch.Tensor, p: float, seed: torch.Tensor, offset: int = 0, masked_by: str = "reference"
) -> torch.Tensor:
    """The product with the mask, differentiable; the fallback has the mask from its kernel, `masked_by="auto"`."""
    count = x.shape[1] * x.shape[2]
    mask = dropconnect_mask((offset + count,), p, seed, stream=philox.LOCKED, impl=masked_by)[offset:]
    return x * (mask.to(x.dtype) * philox.scale(p)).view(x.shape[1:])


_lib.reference("locked_dropout_fwd", lambda *args: reference(*args, "auto").contiguous())
_lib.fake("locked_dropout_fwd", lambda x, p, seed, offset: x.new_empty(x.shape))


class _LockedDropout(torch.autograd.Function):
    @staticmethod
    def forward(x, p, seed, offset, impl):
        return _lib.kernel("locked_dropout_fwd", impl)(x, p, seed, offset)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.p, seed, ctx.offset, ctx.impl = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, grad):  # linear: it has derivatives of every order
        return _LockedDropout.apply(grad, ctx.p, *ctx.saved_tensors, ctx.offset, ctx.impl), None, None, None, None


def locked_dropout(
    x: torch.Tensor, p: float, seed: torch.Tensor | None = None, *, offset: int = 0, impl: str = "auto"
) -> torch.Tensor:
    """Drop the same elements of every step and scale the rest by 1 / (1 - p).

    Args:
        x: [T, B, H], float32, bfloat16, float16 or float64. Never modified.
        p: probability of dropping an element of [B, H], in [0, 1].
        seed: int64 scalar tensor on the device of `x`; drawn from PyTorch's default generator when None.
        offset: elements of the mask before that of x[:, 0, 0]: b H where x is the columns from b on of a larger batch,
            which then has the mask that it has as a whole.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        A new tensor like `x`; differentiable.

    Raises:
        TypeError: wrong dtype or device. ValueError: wrong shape, `p` outside [0, 1], or `offset` below 0.
        RuntimeError: `impl` is not installed.
    """
    _checks.floating("x", x)
    _checks.dims("x", x, "TBH")
    p = _checks.probability("p", p)
    if offset < 0:
        raise ValueError(f"offset must be at least 0, got {offset}")
    chosen = _lib.resolve("locked_dropout", impl, x)
    if seed is None:
        seed = philox.draw_seed(x.device)
    _checks.seed(seed, x)
    if chosen in ("reference", "fallback"):  # which keeps the mask for the backward pass: quicker than drawing it again
        return reference(x, p, seed, offset, "reference" if chosen == "reference" else "auto")
    return _LockedDropout.apply(x, p, seed, offset, chosen)
