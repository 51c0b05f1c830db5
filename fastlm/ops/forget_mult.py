"""ForgetMult, the recurrence of the QRNN: a running mean whose step size is a gate.

With the write gate f, in time order t = 0 .. T-1 (`reverse`: T-1 .. 0, and t-1 reads t+1 below):

    h_t = h_{t-1} + f_t (x_t - h_{t-1}) = f_t x_t + (1 - f_t) h_{t-1},        h_{-1} = h0, or 0

Adjoint, in the opposite order, with r = dL/dh_t in total, from r = 0:

    r += grad_t;    dx_t = f_t r;    df_t = (x_t - h_{t-1}) r;    r -= f_t r;    in the end dh0 = r

Every element [b, h] is a recurrence of its own; h and r are float32 for 16-bit inputs. Bradbury, Merity, Xiong and
Socher, "Quasi-Recurrent Neural Networks", arXiv 1611.01576, equation 3, whose forget gate is 1 - f.
"""

import torch

from fastlm import _lib
from fastlm.ops import _checks

_lib.define("forget_mult_fwd(Tensor f, Tensor x, Tensor? h0, bool reverse) -> Tensor")
_lib.define(
    "forget_mult_bwd(Tensor grad, Tensor f, Tensor x, Tensor? h0, Tensor h, bool reverse)"
    " -> (Tensor df, Tensor dx, Tensor dh0)"
)
_KERNELS = ("forget_mult_fwd", "forget_mult_bwd")
_lib.declare("forget_mult", kernels=_KERNELS, triton=_KERNELS, unmeasured=("cuda",))


def reference(f: torch.Tensor, x: torch.Tensor, h0: torch.Tensor | None = None, reverse: bool = False) -> torch.Tensor:
    """The recurrence step by step, differentiable."""
    if len(f) == 0:
        return f * x
    wide = torch.promote_types(f.dtype, torch.float32)
    h = f.new_zeros(f.shape[1:], dtype=wide) if h0 is None else h0.to(wide)
    gates, values = f.to(wide).unbind(), x.to(wide).unbind()  # f[t] instead would make the backward pass O(T^2)
    out = [h] * len(f)
    for t in reversed(range(len(f))) if reverse else range(len(f)):
        h = h + gates[t] * (values[t] - h)
        out[t] = h
    return torch.stack(out).to(f.dtype)


def _adjoint(grad, f, x, h0, h, reverse):
    wide = torch.promote_types(f.dtype, torch.float32)
    start = f.new_zeros(f.shape[1:]) if h0 is None else h0
    first = start[None].to(wide)
    before = torch.cat([h[1:].to(wide), first] if reverse else [first, h[:-1].to(wide)])[: len(f)]
    gates, total = f.to(wide), grad.to(wide, copy=True)
    r = torch.zeros_like(start, dtype=wide)
    for t in range(len(f)) if reverse else reversed(range(len(f))):
        r = total[t].add_(r)
        r = r - gates[t] * r
    return ((x - before) * total).to(f.dtype), (gates * total).to(f.dtype), r.to(start.dtype)


_lib.reference("forget_mult_fwd", reference)
_lib.reference("forget_mult_bwd", _adjoint)
_lib.fake("forget_mult_fwd", lambda f, x, h0, reverse: f.new_empty(f.shape))
_lib.fake(
    "forget_mult_bwd",
    lambda grad, f, x, h0, h, reverse: (
        f.new_empty(f.shape),
        f.new_empty(f.shape),
        (f if h0 is None else h0).new_empty(f.shape[1:]),
    ),
)


class _ForgetMult(torch.autograd.Function):
    @staticmethod
    def forward(f, x, h0, reverse, impl):
        return _lib.kernel("forget_mult_fwd", impl)(f, x, h0, reverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        f, x, h0, *ctx.options = inputs
        ctx.save_for_backward(f, x, h0, output)

    @staticmethod
    def backward(ctx, grad):
        return *_Adjoint.apply(grad, *ctx.saved_tensors, *ctx.options), None, None


class _Adjoint(torch.autograd.Function):
    # once_differentiable looks at the gradient alone: it would let d(df)/dx pass as zero without a word

    @staticmethod
    def forward(grad, f, x, h0, h, reverse, impl):
        df, dx, dh0 = _lib.kernel("forget_mult_bwd", impl)(grad, f, x, h0, h, reverse)
        return df, dx, None if h0 is None else dh0

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("forget_mult has no second derivative; impl='reference' has")


def forget_mult(
    f: torch.Tensor,
    x: torch.Tensor,
    h0: torch.Tensor | None = None,
    *,
    reverse: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Run h_t = f_t x_t + (1 - f_t) h_{t-1} over the first dimension.

    Args:
        f: write gate [T, B, H], float32, bfloat16, float16 or float64; usually in [0, 1], not checked.
        x: what is written, like `f`.
        h0: state before the first step [B, H], of the dtype of `f` or float32; zeros when None.
        reverse: run from T-1 down to 0.
        impl: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`.

    Returns:
        All states [T, B, H] in the dtype of `f`; differentiable once in `f`, `x` and `h0`.

    Raises:
        ValueError: wrong shape. TypeError: wrong dtype or device. RuntimeError: `impl` is not installed.
    """
    _checks.floating("f", f)
    _, batch, hidden = _checks.dims("f", f, "TBH")
    _checks.floating("x", x)
    _checks.same("x", x, "f", f)
    _checks.shape("x", x, T=len(f), B=batch, H=hidden)
    if h0 is not None:
        _checks.state("h0", h0, "f", f, B=batch, H=hidden)
    chosen = _lib.resolve("forget_mult", impl, f)
    if chosen == "reference":
        return reference(f, x, h0, reverse)
    return _ForgetMult.apply(f, x, h0, reverse, chosen)
