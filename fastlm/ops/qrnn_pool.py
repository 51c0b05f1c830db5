"""All of a QRNN layer after its matrix product: activations, zoneout, recurrence and output gate in one pass.

The pre-activations of time t stand side by side in `gates[t]`: z, f and, as `pooling` says, o and i. Element by
element, with k_t the zoneout factor of the write gate f, in time order (`reverse`: from T-1 down, and t-1 reads t+1):

    z = tanh, f = sigmoid, o = sigmoid, i = sigmoid of their pre-activations;    f' = k f
    c_t = c_{t-1} + f'_t (z_t - c_{t-1})       for "f" and "fo",         c_{-1} = c0, or 0
    c_t = c_{t-1} + i_t z_t - f'_t c_{t-1}     for "ifo"
    h_t = o_t c_t,    for "f" h_t = c_t

In training k_t is 0 with probability `zoneout`, else 1 (a dropped element keeps its state, for "ifo" with i_t z_t
added; nothing is rescaled), from the mask generator over the row-major index of [T, B, H]; in evaluation k_t = 1 -
zoneout.

Adjoint, in the opposite order, with r = dL/dc_t in total, from r = dL/dc_n; a bar marks a pre-activation:

    r += dh_t o_t;    d_zbar = r f' (1 - z^2);     d_fbar = r (z - c_{t-1}) f' (1 - f);    d_obar = dh_t c_t o (1 - o)
    "ifo":            d_zbar = r i (1 - z^2);      d_fbar = -r c_{t-1} f' (1 - f);         d_ibar = r z i (1 - i)
    r -= f' r;        in the end dc0 = r

The forward pass keeps every EVERY-th c in float32; the backward pass recomputes the others from there. Inverting the
recurrence instead would divide by 1 - f. Bradbury, Merity, Xiong and Socher, "Quasi-Recurrent Neural Networks", arXiv
1611.01576, equations 3 to 5 and section 2.1, whose forget gate is 1 - f; zoneout: Krueger et al., arXiv 1606.01305.
"""

import torch

from fastlm import _lib
from fastlm.ops import _checks, philox

EVERY = 8  # steps from one kept state to the next; csrc/qrnn_pool.cpp and csrc/qrnn_pool.cu have the same
GATES = {"f": 2, "fo": 3, "ifo": 4}

_lib.define(
    "qrnn_pool_fwd(Tensor gates, Tensor? c0, Tensor? seed, str pooling, float zoneout, bool reverse, bool keep)"
    " -> (Tensor h, Tensor c_n, Tensor kept)"
)
_lib.define(
    "qrnn_pool_bwd(Tensor? dh, Tensor? dc_n, Tensor gates, Tensor kept, Tensor? seed, str pooling, float zoneout,"
    " bool reverse) -> (Tensor dgates, Tensor dc0)"
)
_KERNELS = ("qrnn_pool_fwd", "qrnn_pool_bwd")
_lib.declare("qrnn_pool", kernels=_KERNELS, triton=_KERNELS, unmeasured=("cuda",))


def _activate(gates, seed, pooling, zoneout):
    wide = torch.promote_types(gates.dtype, torch.float32)
    z, *rest = gates.to(wide).chunk(GATES[pooling], dim=-1)
    f, o, i = ([torch.sigmoid(gate) for gate in rest] + [None, None])[:3]
    if seed is None:
        return torch.tanh(z), f, f * (1.0 - zoneout), o, i
    return torch.tanh(z), f, f * philox.keep_mask(f.shape, zoneout, seed, philox.ZONEOUT), o, i


def _states(z, write, i, c0, reverse):
    """c0 and all states [T+1, B, H], in the order of the steps."""
    c = z.new_zeros(z.shape[1:]) if c0 is None else c0.to(z.dtype)
    out = [c]
    z, write, i = z.unbind(), write.unbind(), None if i is None else i.unbind()  # z[t] costs O(T^2) in backward
    for t in reversed(range(len(z))) if reverse else range(len(z)):
        c = c + (write[t] * (z[t] - c) if i is None else i[t] * z[t] - write[t] * c)
        out.append(c)
    return torch.stack(out)


def reference(
    gates: torch.Tensor,
    c0: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    pooling: str = "fo",
    zoneout: float = 0.0,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer step by step, differentiable; with a `seed` zoneout masks as in training."""
    h, c_n, _ = _forward(gates, c0, seed, pooling, zoneout, reverse, False)
    return h, c_n


def _forward(gates, c0, seed, pooling, zoneout, reverse, keep):
    z, _, write, o, i = _activate(gates, seed, pooling, zoneout)
    states = _states(z, write, i, c0, reverse)
    c = states[1:].flip(0) if reverse else states[1:]
    h = c.clone() if o is None else o * c
    kept = states[:-1:EVERY] if keep else states[:0]
    return (
        h.to(gates.dtype),
        states[-1].to((gates if c0 is None else c0).dtype, copy=True),
        kept.clone(memory_format=torch.contiguous_format),
    )


def _adjoint(dh, dc_n, gates, kept, seed, pooling, zoneout, reverse):
    z, f, write, o, i = _activate(gates, seed, pooling, zoneout)
    dh = torch.zeros_like(z) if dh is None else dh.to(z.dtype)
    r = z.new_zeros(z.shape[1:]) if dc_n is None else dc_n.to(z.dtype, copy=True)
    states = _states(z, write, i, kept[0] if len(kept) else None, reverse)
    before, after = (states[:-1].flip(0), states[1:].flip(0)) if reverse else (states[:-1], states[1:])
    total = dh * (1.0 if o is None else o)
    for t in range(len(z)) if reverse else reversed(range(len(z))):
        r = total[t].add_(r)
        r = r - write[t] * r
    dz = total * (write if i is None else i) * (1 - z * z)
    df = total * ((z if i is None else 0) - before) * write * (1 - f)
    dgates = [dz, df]
    if o is not None:
        dgates.append(dh * after * o * (1 - o))
    if i is not None:
        dgates.append(total * z * i * (1 - i))
    return torch.cat(dgates, dim=-1).to(gates.dtype), r


def _forward_fake(gates, c0, seed, pooling, zoneout, reverse, keep):
    steps, batch, width = gates.shape
    wide = torch.promote_types(gates.dtype, torch.float32)
    hidden = width // GATES[pooling]
    return (
        gates.new_empty(steps, batch, hidden),
        (gates if c0 is None else c0).new_empty(batch, hidden),
        gates.new_empty((steps + EVERY - 1) // EVERY if keep else 0, batch, hidden, dtype=wide),
    )


_lib.reference("qrnn_pool_fwd", _forward)
_lib.reference("qrnn_pool_bwd", _adjoint)
_lib.fake("qrnn_pool_fwd", _forward_fake)
_lib.fake(
    "qrnn_pool_bwd",
    lambda dh, dc_n, gates, kept, *_: (gates.new_empty(gates.shape), kept.new_empty(kept.shape[1:])),
)


class _QRNNPool(torch.autograd.Function):
    @staticmethod
    def forward(gates, c0, seed, pooling, zoneout, reverse, impl):
        return _lib.kernel("qrnn_pool_fwd", impl)(gates, c0, seed, pooling, zoneout, reverse, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gates, c0, seed, *ctx.options = inputs
        ctx.c0_dtype = None if c0 is None else c0.dtype
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)  # the gradient of c_n is absent whenever the state is detached
        ctx.save_for_backward(gates, output[2], seed)

    @staticmethod
    def backward(ctx, dh, dc_n, _):
        dgates, dc0 = _Adjoint.apply(dh, dc_n, *ctx.saved_tensors, *ctx.options)
        return dgates, None if ctx.c0_dtype is None else dc0.to(ctx.c0_dtype), None, None, None, None, None


class _Adjoint(torch.autograd.Function):
    # once_differentiable looks at the gradient alone: it would let second derivatives pass as zero without a word

    @staticmethod
    def forward(dh, dc_n, gates, kept, seed, pooling, zoneout, reverse, impl):
        return _lib.kernel("qrnn_pool_bwd", impl)(dh, dc_n, gates, kept, seed, pooling, zoneout, reverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("qrnn_pool has no second derivative; impl='reference' has")


def qrnn_pool(
    gates: torch.Tensor,
    c0: torch.Tensor | None = None,
    *,
    pooling: str = "fo",
    zoneout: float = 0.0,
    training: bool = False,
    seed: torch.Tensor | None = None,
    reverse: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the pre-activations of a QRNN layer into its output and its last cell.

    Args:
        gates: pre-activations [T, B, kH] in the order z, f, o, i with k = 2, 3, 4 for pooling "f", "fo", "ifo";
            float32, bfloat16, float16 or float64. Never modified.
        c0: cell before the first step [B, H], of the dtype of `gates` or float32; zeros when None.
        pooling: `"f"`, `"fo"` or `"ifo"`.
        zoneout: probability that an element's f is 0, in [0, 1].
        training: draw a zoneout mask; else the write gate is scaled by 1 - zoneout.
        seed: int64 scalar tensor for the mask, on the device of `gates`; drawn from PyTorch's default generator when
            None and a mask is needed.
        reverse: run from T-1 down to 0.
        impl: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`.

    Returns:
        h [T, B, H] in the dtype of `gates`, and c_n [B, H], the cell after the last step, in the dtype of `c0`, else of
        `gates`; differentiable once in `gates` and `c0`.

    Raises:
        ValueError: wrong shape or value. TypeError: wrong dtype or device. RuntimeError: `impl` is not installed.
    """
    _checks.floating("gates", gates)
    _, batch, width = _checks.dims("gates", gates, "TBH")
    if pooling not in GATES:
        raise ValueError(f"pooling must be 'f', 'fo' or 'ifo', got {pooling!r}")
    if width % GATES[pooling]:
        raise ValueError(
            f"gates must have {GATES[pooling]} H columns for pooling={pooling!r}, got shape {list(gates.shape)}"
        )
    zoneout = _checks.probability("zoneout", zoneout)
    if c0 is not None:
        _checks.state("c0", c0, "gates", gates, B=batch, H=width // GATES[pooling])
    if seed is not None:
        _checks.seed(seed, gates)
    masked = training and zoneout > 0.0
    if masked and seed is None:
        seed = philox.draw_seed(gates.device)
    options = (seed if masked else None, pooling, zoneout, reverse)
    chosen = _lib.resolve("qrnn_pool", impl, gates)
    if chosen == "reference":
        return reference(gates, c0, *options)
    if _checks.recorded(gates, c0):
        return _QRNNPool.apply(gates, c0, *options, chosen)[:2]
    return _lib.kernel("qrnn_pool_fwd", chosen)(gates, c0, *options, False)[:2]
