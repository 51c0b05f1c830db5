"""One LSTM layer in one direction, with one DropConnect mask on the hidden-to-hidden weight.

With M the mask scaled by 1 / (1 - p), and PyTorch's gate order i, f, g, o:

    a_t = W_ih x_t + b_ih + (M * W_hh) h_{t-1} + b_hh
    i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o);   g = tanh(a_g)
    c_t = f_t c_{t-1} + i_t g_t;   h_t = o_t tanh(c_t);   y_t = h_t

The adjoint, from the last step to the first, with dh_t and dc_t what later steps and the loss ask for:

    dh_t  += dy_t;   do = dh tanh(c);   dc_t += dh o (1 - tanh(c)^2)
    di = dc g;   df = dc c_{t-1};   dg = dc i;   dc_{t-1} = dc f
    da = (di i(1-i), df f(1-f), dg (1-g^2), do o(1-o));   dx_t = da W_ih;   dh_{t-1} = da (M * W_hh)
    dW_ih = sum_t da_t^T x_t;   dW_hh = M * sum_t da_t^T h_{t-1};   db = sum_t da_t

Hochreiter and Schmidhuber, Neural Computation 9(8), 1997; weight dropout: Merity, Keskar and Socher,
arXiv 1708.02182, after Wan et al., ICML 2013.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlm import _lib
from fastlm.ops import _checks, philox
from fastlm.ops._matmul import linear, matmul, matmul_tf32, weight_gradient
from fastlm.ops.dropconnect import dropconnect

_INPUTS = "Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor bias, bool reverse"
_lib.define(f"lstm_aten_fwd({_INPUTS}) -> (Tensor, Tensor, Tensor)")
_GRADIENTS = ", ".join(["Tensor"] * 6)
_lib.define(f"lstm_aten_bwd(Tensor dy, Tensor dh, Tensor dc, Tensor y, {_INPUTS}) -> ({_GRADIENTS})")
_lib.define(
    "lstm_fwd(Tensor(a!) projected, Tensor w_hh, Tensor h0, Tensor c0, Tensor? seed, float p, bool reverse, bool keep,"
    " bool tf32) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor cells)"
)
_lib.define(
    "lstm_bwd(Tensor? dy, Tensor? dh, Tensor? dc, Tensor(a!) gates, Tensor cells, Tensor c0, Tensor w_hh, Tensor? seed,"
    " float p, bool reverse, bool tf32) -> (Tensor dh0, Tensor dc0)"
)
_KERNELS = ("lstm_fwd", "lstm_bwd")
_lib.declare("lstm", kernels=_KERNELS, triton=_KERNELS, extra=("aten",), unmeasured=("cuda",))
_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph


def reference(x, h0, c0, w_ih, w_hh, b_ih=None, b_hh=None, reverse=False):
    """The loop above on a weight already masked; 16-bit inputs are computed in float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = sum(b.to(dtype) for b in (b_ih, b_hh) if b is not None)
    projected = F.linear(x.to(dtype), w_ih.to(dtype)) + bias
    recurrent = w_hh.to(dtype).t()
    h, c = h0.to(dtype), c0.to(dtype)
    # unbind: indexing step by step would make the backward quadratic in T
    steps = projected.unbind(0)
    y = []
    for step in reversed(steps) if reverse else steps:
        i, f, g, o = (step + h @ recurrent).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        y.append(h)
    y = torch.stack(y[::-1] if reverse else y) if y else projected.new_zeros(0, *h0.shape)
    return y.to(x.dtype), h.to(h0.dtype), c.to(c0.dtype)


def _masked(w_hh, p, seed):
    return w_hh if seed is None else dropconnect(w_hh, p, seed, impl="reference")


def _forward(projected, w_hh, h0, c0, seed, p, reverse, keep, tf32):
    """The loop after the input product, for devices without a kernel; to keep them, the activated gates replace it."""
    wide = torch.promote_types(projected.dtype, torch.float32)
    recurrent = _masked(w_hh.to(wide), p, seed).t()
    T, B, H = projected.shape[0], *h0.shape
    h, c = h0.to(wide), c0.to(wide)
    y, cells = projected.new_empty(T, B, H), h.new_empty(T, B, H)
    for t in reversed(range(T)) if reverse else range(T):
        i, f, g, o = (projected[t] + h @ recurrent).chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        h = o * c.tanh()
        y[t], cells[t] = h, c
        if keep:
            projected[t] = torch.cat((i, f, g, o), -1)
    return y, h.to(h0.dtype, copy=True), c.to(c0.dtype, copy=True), cells[: T if keep else 0].clone()


def _adjoint(dy, dh, dc, gates, cells, c0, w_hh, seed, p, reverse, tf32):
    """The adjoint down to da, which replaces the gates."""
    T = len(cells)
    recurrent = _masked(w_hh.to(cells.dtype), p, seed)
    dh, dc = (torch.zeros_like(c0, dtype=cells.dtype) if d is None else d.to(cells.dtype, copy=True) for d in (dh, dc))
    for t in range(T) if reverse else reversed(range(T)):
        earlier = t + 1 if reverse else t - 1
        before = cells[earlier] if 0 <= earlier < T else c0.to(cells.dtype)
        i, f, g, o = gates[t].to(cells.dtype).chunk(4, dim=-1)
        dh = dh if dy is None else dh + dy[t]
        squashed = cells[t].tanh()
        dc = dc + dh * o * (1 - squashed**2)
        by_gate = dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g**2), dh * squashed * o * (1 - o)
        da, dc = torch.cat(by_gate, -1), dc * f
        gates[t], dh = da, da @ recurrent
    return dh, dc


def _forward_fake(projected, w_hh, h0, c0, seed, p, reverse, keep, tf32):
    T, B, H = projected.shape[0], *h0.shape
    wide = torch.promote_types(projected.dtype, torch.float32)
    cells = projected.new_empty(T if keep else 0, B, H, dtype=wide)
    return projected.new_empty(T, B, H), h0.new_empty(B, H), c0.new_empty(B, H), cells


def _adjoint_fake(dy, dh, dc, gates, cells, *_):
    return cells.new_empty(cells.shape[1:]), cells.new_empty(cells.shape[1:])


_lib.reference("lstm_fwd", _forward)
_lib.reference("lstm_bwd", _adjoint)
_lib.fake("lstm_fwd", _forward_fake)
_lib.fake("lstm_bwd", _adjoint_fake)


def _project(x, w_ih, bias, tf32):
    """The input's part of all steps."""
    if not (tf32 and x.dtype == torch.float32):
        return linear(x, w_ih, bias).contiguous()
    rows = matmul_tf32(x.flatten(0, 1), w_ih.t())
    return (rows if bias is None else rows.add_(bias)).view(*x.shape[:2], w_ih.shape[0])


class _Kernel(torch.autograd.Function):
    """The products of all steps together, and the kernel for the steps."""

    @staticmethod
    def forward(x, h0, c0, w_ih, w_hh, bias, seed, p, reverse, impl, tf32):
        gates = _project(x, w_ih, bias, tf32)
        y, h_n, c_n, cells = _lib.kernel("lstm_fwd", impl)(gates, w_hh, h0, c0, seed, p, reverse, True, tf32)
        return y, h_n, c_n, gates, cells

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, seed, ctx.p, ctx.reverse, ctx.impl, ctx.tf32 = inputs
        ctx.set_materialize_grads(False)  # the gradients of the last states are absent whenever they are detached
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(*tensors[:5], seed, output[0], *output[3:])
        ctx.has_bias = tensors[5] is not None

    @staticmethod
    def backward(ctx, dy, dh, dc, *_):
        needs = ctx.needs_input_grad[:6] if ctx.has_bias else (*ctx.needs_input_grad[:5], False)
        adjoint = _Adjoint.apply if torch.is_grad_enabled() else _Adjoint.forward  # enabled where a graph is asked for
        options = (ctx.p, ctx.reverse, ctx.impl, ctx.tf32, needs)
        return *adjoint(dy, dh, dc, *ctx.saved_tensors, *options), None, None, None, None, None


class _Adjoint(torch.autograd.Function):
    # once_differentiable looks at the gradient alone: it would let second derivatives pass as zero without a word

    @staticmethod
    def forward(dy, dh, dc, x, h0, c0, w_ih, w_hh, seed, y, gates, cells, p, reverse, impl, tf32, needs):
        if torch.compiler.is_compiling() or _graph_is_kept():  # another backward will read them
            gates = gates.clone()
        else:
            torch.autograd.graph.increment_version(gates)  # should this fail half-way, another try raises
        dh0, dc0 = _lib.kernel("lstm_bwd", impl)(dy, dh, dc, gates, cells, c0, w_hh, seed, p, reverse, tf32)
        rows, dw_hh = gates.flatten(0, 1), None
        fast = tf32 and rows.dtype == torch.float32
        product = matmul_tf32 if fast else matmul
        if needs[4]:
            first = h0.to(y.dtype).unsqueeze(0)
            before = torch.cat([y[1:], first] if reverse else [first, y[:-1]])[: len(y)].flatten(0, 1)  # h_{t-1}
            if fast or seed is None:
                dw_hh = product(rows.t(), before)
                dw_hh = dw_hh if seed is None else dropconnect(dw_hh, p, seed)
            else:
                dw_hh = weight_gradient(rows, before, seed, p)
        return (
            product(rows, w_ih).view(x.shape) if needs[0] else None,
            dh0.to(h0.dtype) if needs[1] else None,
            dc0.to(c0.dtype) if needs[2] else None,
            product(rows.t(), x.flatten(0, 1)) if needs[3] else None,
            dw_hh,
            rows.sum(0) if needs[5] else None,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("lstm has no second derivative; impl='reference' has")


def _tf32(impl):
    """Whether float32 products may take factors of 11 bits: what PyTorch says to cuDNN of recurrent layers."""
    # allow_tf32 cannot be read once that of another kind of layer was set by itself
    return impl == "cuda" and torch.backends.cudnn.rnn.fp32_precision == "tf32"


# "auto" has no case for "aten" on a CPU. Its time over the kernel's, float32, I = H, T = 70, two Zen 4 cores, without a
# graph and with backward and dropout: H = 64 B = 20 1.4 1.2; H = 200 B = 80 1.4 1.1; H = 400 B = 20 1.3 1.1;
# H = 1150 B = 1 1.7 1.9, B = 20 1.8 1.5, B = 80 1.2 1.1. It is the faster one, by a tenth of a millisecond a call, for
# T <= 5 at H = 400 and B >= 20 without dropout: 0.8 to 0.9.
def _kernel(x, h0, c0, w_ih, w_hh, b_ih, b_hh, seed, p, reverse, impl):
    c0 = c0.view_as(c0) if c0 is h0 else c0  # torch.compile takes no tensor twice in a Function
    bias = b_hh if b_ih is None else b_ih if b_hh is None else b_ih + b_hh
    tensors, tf32 = (x, h0, c0, w_ih, w_hh, bias), _tf32(impl)
    if _checks.recorded(*tensors):
        return _Kernel.apply(*tensors, seed, p, reverse, impl, tf32)[:3]
    gates = _project(x, w_ih, bias, tf32)
    return _lib.kernel("lstm_fwd", impl)(gates, w_hh, h0, c0, seed, p, reverse, False, tf32)[:3]


def _aten(x, h0, c0, w_ih, w_hh, b_ih=None, b_hh=None, reverse=False):
    """PyTorch's own layer on a masked weight: oneDNN on a CPU, cuDNN on a GPU, its generic kernels elsewhere."""
    if x.numel() == 0 or h0.numel() == 0:  # PyTorch refuses these
        return reference(x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse)
    # A wider state is kept as it is: it was given to save the cell from rounding.
    dtype = torch.promote_types(x.dtype, h0.dtype)
    if x.device.type == "cpu" and dtype == torch.float16:
        dtype = torch.float32  # oneDNN trains in float32 and bfloat16; the generic kernels are 10 x slower
    weights = [w_ih, w_hh]
    if b_ih is not None or b_hh is not None:
        weights += [w_hh.new_zeros(w_hh.size(0)) if b is None else b for b in (b_ih, b_hh)]
    weights = [w.to(dtype) for w in weights]
    state = (h0.to(dtype).unsqueeze(0), c0.to(dtype).unsqueeze(0))
    steps = (x.flip(0) if reverse else x).to(dtype)
    # Without "train" neither library saves what its backward needs.
    train = torch.is_grad_enabled() and any(t.requires_grad for t in (steps, *state, *weights))
    y, h, c = torch._VF.lstm(steps, state, weights, len(weights) == 4, 1, 0.0, train, False, False)
    y = y.flip(0) if reverse else y
    return y.to(x.dtype), h.squeeze(0).to(h0.dtype), c.squeeze(0).to(c0.dtype)


def _aten_fwd(x, h0, c0, w_ih, w_hh, bias, reverse):
    y, h, c = _aten(x, h0, c0, w_ih, w_hh, bias, None, reverse)
    return y.contiguous(), h.clone() if h is h0 else h.contiguous(), c.clone() if c is c0 else c.contiguous()


def _aten_bwd(dy, dh, dc, y, x, h0, c0, w_ih, w_hh, bias, reverse):
    """The adjoint above. The gates come back from the outputs in one product, without walking the steps again."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, h0.dtype), torch.float32)
    dy, y, x_, h, c, v, w = (t.to(dtype) for t in (dy, y, x, h0, c0, w_ih, w_hh))
    if reverse:
        dy, y, x_ = dy.flip(0), y.flip(0), x_.flip(0)
    before = torch.cat([h.unsqueeze(0), y])[: y.shape[0]]  # h_{t-1}
    i, f, g, o = (F.linear(x_, v, bias.to(dtype)) + F.linear(before, w)).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cells = [c]
    for write, keep in zip(i * g, f, strict=True):
        cells.append(torch.addcmul(write, keep, cells[-1]))
    cells = torch.stack(cells)
    tanh = cells[1:].tanh()
    # what multiplies dc and dh in each part of da, and dh in dc
    by_cell = torch.stack([g * i * (1 - i), cells[:-1] * f * (1 - f), i * (1 - g * g)], 2)  # [T, B, 3, H]
    by_output, into_cell = tanh * o * (1 - o), o * (1 - tanh * tanh)
    da = by_cell.new_empty(*y.shape[:2], 4, y.shape[2])
    dh, dc = dh.to(dtype), dc.to(dtype)
    for t in range(y.shape[0] - 1, -1, -1):
        dh = dh + dy[t]
        dc = torch.addcmul(dc, dh, into_cell[t])
        torch.mul(by_cell[t], dc.unsqueeze(1), out=da[t, :, :3])
        torch.mul(by_output[t], dh, out=da[t, :, 3])
        dh, dc = da[t].flatten(1) @ w, dc * f[t]
    da = da.flatten(2)
    rows = da.flatten(0, 1)
    dx = da @ v
    grads = (
        dx.flip(0) if reverse else dx,
        dh,
        dc,
        rows.t() @ x_.flatten(0, 1),
        rows.t() @ before.flatten(0, 1),
        rows.sum(0),
    )
    return tuple(
        g.to(t.dtype, memory_format=torch.contiguous_format, copy=True)
        for g, t in zip(grads, (x, h0, c0, w_ih, w_hh, bias), strict=True)
    )


_lib.reference("lstm_aten_fwd", _aten_fwd)
_lib.reference("lstm_aten_bwd", _aten_bwd)
_lib.fake(
    "lstm_aten_fwd",
    lambda x, h0, c0, w_ih, w_hh, bias, reverse: (
        x.new_empty(*x.shape[:2], h0.shape[1]),
        h0.new_empty(h0.shape),
        c0.new_empty(c0.shape),
    ),
)
_lib.fake(
    "lstm_aten_bwd",
    lambda dy, dh, dc, y, *inputs: tuple(t.new_empty(t.shape) for t in inputs[:6]),
)

_FWD = torch.ops.fastlm.lstm_aten_fwd.default
_BWD = torch.ops.fastlm.lstm_aten_bwd.default


class _Opaque(torch.autograd.Function):
    """The ATen layer as two nodes of a compiled graph."""

    @staticmethod
    def forward(x, h0, c0, w_ih, w_hh, bias, reverse):
        return _FWD(x, h0, c0, w_ih, w_hh, bias, reverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.reverse = inputs
        ctx.save_for_backward(output[0], *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh, dc):
        return *_BWD(dy, dh, dc, *ctx.saved_tensors, ctx.reverse), None


def _check(x, h0, c0, w_ih, w_hh, b_ih, b_hh):
    _checks.floating("x", x)
    _, B, inputs = _checks.dims("x", x, "TBI")
    _, H = _checks.dims("h0", h0, "BH")
    _checks.state("h0", h0, "x", x, B=B, H=H)
    _checks.state("c0", c0, "x", x, B=B, H=H)
    _checks.same("c0", c0, "h0", h0)
    biases = [(name, b) for name, b in (("b_ih", b_ih), ("b_hh", b_hh)) if b is not None]
    for name, weight in [("w_ih", w_ih), ("w_hh", w_hh), *biases]:
        _checks.same(name, weight, "x", x)
    _checks.shape("w_ih", w_ih, **{"4H": 4 * H, "I": inputs})
    _checks.shape("w_hh", w_hh, **{"4H": 4 * H, "H": H})
    for name, bias in biases:
        _checks.shape(name, bias, **{"4H": 4 * H})


def lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    weight_dropout: float = 0.0,
    seed: Tensor | None = None,
    reverse: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one LSTM layer in one direction.

    Args:
        x: `[T, B, I]`, any strides; float32, bfloat16, float16 or float64. Under autocast it and the weights are cast
            to the autocast dtype.
        h0, c0: `[B, H]`, the state before the first step read, in the dtype of `x` or float32.
        w_ih, w_hh: `[4H, I]` and `[4H, H]`, gates in the order i, f, g, o, in the dtype of `x`.
        b_ih, b_hh: `[4H]` or None.
        weight_dropout: probability of dropping an element of `w_hh`, in [0, 1]; one mask for the whole call.
        seed: int64 scalar tensor on the device of `x`; drawn from PyTorch's default generator when None.
        reverse: read from the last step to the first; outputs stay at the steps of their inputs.
        impl: `"auto"`, `"reference"`, `"cpu"`, `"cuda"`, `"triton"` or `"aten"`. `"cpu"` masks `w_hh` as it packs it,
            `"cuda"` and `"triton"` once for a pass; all three multiply in the dtype of `x` (`"cpu"` float16 in float32)
            and keep c in float32. `"cuda"` needs a GPU of compute capability 8.0; it makes float32 products of
            TF32's 11 bits where `torch.backends.cudnn` allows that for recurrent layers, as by default, and backward as
            forward. Its products with h are of float16 for every dtype: beyond 65,504 an `h0` or a masked weight is
            infinite there; in float32 in full they are split in two, up to 4,094 and 255. `"aten"` is PyTorch's own
            layer on a masked copy of `w_hh`, in the wider of the dtypes of `x` and the state (float16 in float32 on a
            CPU).

    Returns:
        `(y, h_n, c_n)`: `[T, B, H]` in the dtype of `x`, and `[B, H]` each in the dtype of the state given. Kernels,
        and `"aten"` compiled or exported, are differentiable once; `"aten"` else as often as PyTorch's layer is.

    Raises:
        ValueError: wrong shape, or `weight_dropout` outside [0, 1]. TypeError: wrong dtype or device.
        RuntimeError: `impl` is not installed.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        cast = [None if t is None else t.to(dtype) for t in (x, w_ih, w_hh, b_ih, b_hh)]
        with torch.autocast(device, enabled=False):
            return lstm(
                cast[0], h0, c0, *cast[1:], weight_dropout=weight_dropout, seed=seed, reverse=reverse, impl=impl
            )
    _check(x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    p = _checks.probability("weight_dropout", weight_dropout)
    if p and seed is not None:
        _checks.seed(seed, x)
    chosen = _lib.resolve("lstm", impl, x)
    if chosen in ("cpu", "cuda", "triton"):
        if p and seed is None:
            seed = philox.draw_seed(x.device)
        tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh)
        if x.dtype == torch.float16 and chosen == "cpu":  # the products of PyTorch are slow in it on a CPU
            tensors = [None if t is None else t.float() for t in tensors]
        outputs = _kernel(*tensors, seed if p else None, p, reverse, chosen)
        return tuple(y.to(like.dtype) for y, like in zip(outputs, (x, h0, c0), strict=True))
    if p:
        w_hh = dropconnect(w_hh, p, seed, impl="reference" if chosen == "reference" else "auto")
    if chosen == "reference":
        return reference(x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse)
    if torch.compiler.is_compiling():  # torch.compile breaks its graph at PyTorch's layer
        c0 = c0.view_as(c0) if c0 is h0 else c0  # which takes no tensor twice in a Function
        bias = sum((b for b in (b_ih, b_hh) if b is not None), w_hh.new_zeros(w_hh.shape[0]))
        return _Opaque.apply(x, h0, c0, w_ih, w_hh, bias, reverse)
    return _aten(x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse)
