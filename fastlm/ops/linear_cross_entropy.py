"""Cross entropy of a linear layer's logits that never exist all at once.

    z_n = W x_n + b,        loss_n = lse(z_n) - (1 - e) z_n[y_n] - e mean(z_n)

with lse = log sum exp and e the label smoothing; rows whose target is `ignore_index` count as 0. With g_n the gradient
of the loss of row n,

    dL/dz_n = g_n (softmax(z_n) - (1 - e) onehot(y_n) - e / V)
    dL/dx_n = W^T dL/dz_n,        dL/dW = sum_n dL/dz_n x_n^T,        dL/db = sum_n dL/dz_n

A chunk of rows goes through all of it while its logits are in a workspace, where they become their own gradient in
place. For "mean" and "sum", g_n is known up to a factor in the forward, which leaves the gradients ready; for "none"
the backward makes the logits again. A chunk has a quarter of the rows at most, and as many as a byte budget for its
logits allows, or a floor where that is more: the price of a chunk is one more trip through W and dW.

On an H200 (790 TFLOP/s, 4.3 TB/s), the three products of a logit of 2 bytes take 3.0 ps at D = 400, a read and a write
between them 0.9 ps. A chunk of c rows reads W twice, and reads and writes dW in float32: 12 V D bytes to 6 c V D
operations, 367 / c of the time. So on a GPU a chunk has all rows if it can, and 1024 at least.

Logits and their gradient are bfloat16 for bfloat16 inputs: PyTorch rounds its logits as well, and in float32 the passes
over them would be twice as long. What happens between them, the loss and sums over chunks are float32. The gradient of
float16 inputs leaves their range: it is float32, or, where products of float16 can be added up in float32, float16
times 2^15 over the largest g. On a CPU up to six chunks may add up dW in bfloat16: rounding k sums of random terms is
sqrt(k / 2) times the error of rounding the last.

Triton's loss without gradients goes by no chunks: it keeps a maximum and a sum of each row, and no logits.

Chunking the rows and taking the gradient in the forward: Malik Hsu et al., "Liger Kernel", arXiv 2410.10989.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from fastlm import _lib
from fastlm.ops import _checks, _matmul

_lib.define(
    "linear_cross_entropy_rows_(Tensor(a!) logits, Tensor target, Tensor? scale, int ignore_index, "
    "float label_smoothing, bool gradient) -> Tensor"
)
_lib.define(
    "linear_cross_entropy_gradient_(Tensor(a!) logits, Tensor? bias, Tensor target, Tensor? scale, int ignore_index, "
    "float label_smoothing) -> Tensor"
)
_lib.define(
    "linear_cross_entropy_loss(Tensor input, Tensor weight, Tensor? bias, Tensor target, int ignore_index, "
    "float label_smoothing) -> Tensor"
)
_lib.define(
    "linear_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? scale, int ignore_index, "
    "float label_smoothing, bool needs_input, bool needs_weight, bool needs_bias, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_lib.declare(
    "linear_cross_entropy",
    kernels=("linear_cross_entropy_rows_",),
    triton=("linear_cross_entropy_gradient_", "linear_cross_entropy_loss"),
)

# Above 32 MB, malloc asks for new pages at every chunk. 1 GB is 5 chunks for 8400 rows of 267,735 words in bfloat16.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
_CHUNK_ROWS = {"cpu": (192, 1024), "cuda": (1024, 8192)}  # fewer: too many trips through W; more gain nothing
_LEAST_CHUNKS = {"cpu": 4, "cuda": 1}  # of a megabyte at least: PyTorch holds all logits, two or three times
_FEW_ROWS = 32  # whose logits are small beside W and dW, which each chunk goes through
_ROUNDED_CHUNKS = 6  # that may add up dW in 16 bits
_LIFT = 2.0**15  # of the largest float16 gradient of a logit: 2^-39 keeps all its digits then
_ROOM = 16  # a row of logits starts at a multiple of so many, for loads and stores of 16 bytes
_BLOCK = 8192  # classes whose part of dW is added at a time, where that is in float32
REDUCTIONS = ("none", "mean", "sum")


def reference(input, weight, target, bias, reduction, ignore_index, label_smoothing, divisor=None):
    """The logits, all of them, and PyTorch's cross entropy."""
    state, rows, classes = _state_dtype(input), target.numel(), weight.shape[0]
    labels = target.reshape(rows).long()
    if not torch.compiler.is_compiling():  # there, PyTorch's own check has to do
        _check_targets(labels, classes, ignore_index)
    options = dict(ignore_index=ignore_index, label_smoothing=label_smoothing)
    options["reduction"] = reduction if divisor is None else "sum"
    with torch.autocast(input.device.type, enabled=False):
        logits = F.linear(input.to(state), weight.to(state), None if bias is None else bias.to(state))
        loss = F.cross_entropy(logits.reshape(rows, classes), labels, **options)
        loss = loss if divisor is None else loss / divisor
    return loss.reshape(target.shape) if reduction == "none" else loss


def _state_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _widens(x):
    """Whether PyTorch adds up products of 16-bit matrices in a float32 result there; on a CPU it does not."""
    return x.device.type == "cuda" and torch.version.hip is None and x.dtype in (torch.float16, torch.bfloat16)


def _work_dtype(x):
    """Of the logits and their gradient."""
    return torch.float32 if x.dtype == torch.float16 and not _widens(x) else x.dtype


def _rows_(logits, target, scale, ignore_index, label_smoothing, gradient):
    """Loss of each row of logits `[c, V]`; if asked, the logits become scale times its gradient."""
    if logits.dtype != _state_dtype(logits):
        wide = logits.to(_state_dtype(logits))
        loss = _rows_(wide, target, scale, ignore_index, label_smoothing, gradient)
        logits.copy_(wide)
        return loss
    kept = target != ignore_index
    wanted = torch.where(kept, target, 0)[:, None]
    shift = logits.amax(1, keepdim=True)
    at_target = logits.gather(1, wanted) - shift
    mean = logits.mean(1, keepdim=True) - shift if label_smoothing else 0.0
    total = logits.sub_(shift).exp_().sum(1, keepdim=True)
    loss = total.log() - (1 - label_smoothing) * at_target - label_smoothing * mean
    if gradient:
        # p - 1 is taken before any scale: in a sum of rounded products it would cancel where p is near 1.
        at_target = logits.gather(1, wanted) / total - (1 - label_smoothing)
        logits.div_(total).scatter_(1, wanted, at_target).sub_(label_smoothing / logits.shape[1])
        logits.mul_(torch.where(kept, 1.0 if scale is None else scale, 0.0).to(logits.dtype)[:, None])
    return torch.where(kept, loss[:, 0], 0)


def _gradient_(logits, bias, target, scale, ignore_index, label_smoothing):
    """Like `_rows_` with a gradient, for logits without their bias and, in Triton, with room behind each row."""
    if bias is not None:
        logits.add_(bias)
    return _rows_(logits, target, scale, ignore_index, label_smoothing, True)


def _chunks(rows, classes, device, itemsize, sparing=True):
    """Bounds of equal chunks of rows, whose logits keep to the budget unless the least number of rows exceeds it.

    With `sparing` they keep far below all logits where these are within the budget.
    """
    kind = "cpu" if device == "cpu" else "cuda"
    (least, most), budget = _CHUNK_ROWS[kind], _CHUNK_BYTES[kind]
    size = max(least, min(most, budget // (itemsize * max(1, classes))))
    fewest = min(_LEAST_CHUNKS[kind], rows // _FEW_ROWS, rows * classes * itemsize >> 20) if sparing else 1
    count = max(-(-rows // size), fewest)
    return [rows * i // count for i in range(count + 1)] if rows else [0]


def _logits(x, w, bias, space):
    if space is None:
        return _matmul.linear(x, w, bias)
    out = space[: len(x)]
    return torch.mm(x, w.T, out=out) if bias is None else torch.addmm(bias, x, w.T, out=out)


def _widening(a, b, out=None, add=False):
    """`a b` of 16-bit matrices in float32; in `out`, or added to it, if given."""
    if add:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _add_weight_gradient(total, dz, x, first):
    """Adds dz^T x to `total`, whatever that holds before the first time."""
    if total.dtype != x.dtype and _widens(x):
        _widening(dz.T, x, total, add=not first)
    elif total.dtype != x.dtype:
        for begin in range(0, len(total), _BLOCK):
            part = torch.mm(dz[:, begin : begin + _BLOCK].T, x)
            total[begin : begin + _BLOCK].copy_(part) if first else total[begin : begin + _BLOCK].add_(part)
    elif _matmul.by_onednn(dz.T, x):
        product = _matmul.matmul(dz.T, x)
        total.copy_(product) if first else total.add_(product)
    else:
        total.addmm_(dz.T, x, beta=0 if first else 1)


def _lifted(scale, target):
    """The scale of the rows with _LIFT for its largest size, and the factor that takes this back."""
    scale = torch.ones((), device=target.device).expand(len(target)) if scale is None else scale
    largest = scale.abs().amax().clamp(2.0**-100, 2.0**100)  # it is 0 or infinite where no row counts
    return scale * (_LIFT / largest), largest / _LIFT


def chunked(
    input,
    weight,
    bias,
    target,
    scale,
    ignore_index,
    label_smoothing,
    needs_input,
    needs_weight,
    needs_bias,
    impl,
    into=None,
    sparing=True,
):
    """Loss of each row, and the gradients of the sum of scale times loss that are needed (the others are empty).

    That of the weight is written to `into` if given, contiguous and of its dtype. `sparing`: as for `_chunks`.
    """
    (rows, _), classes, state, work = input.shape, len(weight), _state_dtype(input), _work_dtype(input)
    gradient = needs_input or needs_weight or needs_bias
    _check_targets(target, classes, ignore_index)
    if impl == "triton" and not gradient and rows and classes:
        loss = _lib.kernel("linear_cross_entropy_loss", impl)(
            input, weight, bias, target, ignore_index, label_smoothing
        )
        return loss, *(input.new_empty(0) for _ in range(3))
    bounds = _chunks(rows, classes, input.device.type, work.itemsize, sparing) if classes else [0]
    lifted = gradient and rows and work == torch.float16
    rounded = not lifted and len(bounds) - 1 <= (1 if _widens(input) else _ROUNDED_CHUNKS)
    loss = input.new_zeros(rows, dtype=state)
    grad_input = torch.zeros_like(input) if needs_input else input.new_empty(0)
    sums = work if rounded else state
    in_place = into is not None and into.dtype == sums
    grad_weight = into if in_place else input.new_empty(weight.shape if needs_weight else 0, dtype=sums)
    grad_bias = input.new_zeros(classes if needs_bias else 0, dtype=state)
    largest = max((last - first for first, last in pairwise(bounds)), default=0)
    scale, factor = _lifted(scale, target) if lifted else (scale, None)

    def chunk(first, last):
        x = input[first:last].to(work).contiguous()
        labels, factors = target[first:last], None if scale is None else scale[first:last]
        if impl == "triton":  # the bias is added where the logits are read: addmm would fill padded rows with it first
            logits, row_kernel = _logits(x, w, None, space), _lib.kernel("linear_cross_entropy_gradient_", impl)
            loss[first:last] = row_kernel(logits, b, labels, factors, ignore_index, label_smoothing)
        else:
            logits = _logits(x, w, b, space)
            loss[first:last] = _rows(logits, labels, factors, ignore_index, label_smoothing, gradient)
        if needs_input:
            grad_input[first:last] = _widening(logits, w) * factor if lifted else _matmul.matmul(logits, w)
        if needs_weight:
            _add_weight_gradient(grad_weight, logits, x, first == 0)
        if needs_bias:  # a CPU would convert all of them first
            grad_bias.add_(logits.sum(0, dtype=state if logits.is_cuda or lifted else None))

    with torch.autocast(input.device.type, enabled=False):
        w, b = weight.to(work), None if bias is None else bias.to(work).contiguous()
        onednn = _matmul.by_onednn(input[:largest].to(work).contiguous(), w.T)
        room = -(-classes // _ROOM) * _ROOM if impl == "triton" else classes
        space = None if onednn and impl != "triton" else input.new_empty((largest, room), dtype=work)[:, :classes]
        for first, last in pairwise(bounds):
            chunk(first, last)
        space = None  # before dW is there in two precisions
    if needs_weight and len(bounds) < 2:
        grad_weight.zero_()
    if lifted:
        grad_weight.mul_(factor), grad_bias.mul_(factor)
    if into is None:
        grad_weight = grad_weight.to(weight.dtype)
    elif not in_place:
        grad_weight = into.copy_(grad_weight)
    return loss, grad_input, grad_weight, grad_bias.to(input.dtype)


def _check_targets(target, classes, ignore_index):
    inside = ((target >= 0) & (target < classes) | (target == ignore_index)).all()
    if target.device.type != "cpu":
        torch._assert_async(inside, "linear_cross_entropy: target outside the vocabulary")
    elif not inside:
        raise ValueError(f"target must lie in [0, {classes}), the vocabulary, or be ignore_index = {ignore_index}")


def _loss(input, weight, bias, target, ignore_index, label_smoothing):
    logits = F.linear(*(x if x is None else x.to(_state_dtype(input)) for x in (input, weight, bias)))
    return _rows_(logits, target, None, ignore_index, label_smoothing, False)


def _fake(
    input, weight, bias, target, scale, ignore_index, label_smoothing, needs_input, needs_weight, needs_bias, impl
):
    return (
        input.new_empty(input.shape[0], dtype=_state_dtype(input)),
        torch.empty_like(input) if needs_input else input.new_empty(0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
        input.new_empty(weight.shape[0] if needs_bias else 0),
    )


_lib.reference("linear_cross_entropy_rows_", _rows_)
_lib.reference("linear_cross_entropy_gradient_", _gradient_)
_lib.reference("linear_cross_entropy_loss", _loss)
_lib.reference("linear_cross_entropy", chunked)
_lib.fake(
    "linear_cross_entropy_rows_",
    lambda logits, target, scale, ignore_index, label_smoothing, gradient: logits.new_empty(
        logits.shape[0], dtype=_state_dtype(logits)
    ),
)
_lib.fake(
    "linear_cross_entropy_gradient_",
    lambda logits, bias, target, scale, ignore_index, label_smoothing: logits.new_empty(
        logits.shape[0], dtype=_state_dtype(logits)
    ),
)
_lib.fake(
    "linear_cross_entropy_loss",
    lambda input, weight, bias, target, ignore_index, label_smoothing: input.new_empty(
        input.shape[0], dtype=_state_dtype(input)
    ),
)
_lib.fake("linear_cross_entropy", _fake)

_rows = torch.ops.fastlm.linear_cross_entropy_rows_.default
_linear_cross_entropy = torch.ops.fastlm.linear_cross_entropy.default
_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph


class _Final(torch.autograd.Function):
    """Gradients that cannot be differentiated again; without it, a second derivative would be zero and say nothing."""

    @staticmethod
    def forward(input, weight, bias, d_input, d_weight, d_bias):  # no *gradients: torch.compile would pass ctx as well
        return tuple(x if x is None else x.view_as(x) for x in (d_input, d_weight, d_bias))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("linear_cross_entropy is differentiable once: it has no second derivative")


def _needed(ctx, gradients):
    return [x if need else None for x, need in zip(gradients, ctx.needs_input_grad[:3], strict=True)]


def times(gradients, factor):
    """The gradients times the factor from above; in place, if they are not needed again: they are large."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or _graph_is_kept():
        return [x * factor for x in gradients]
    if factor.device.type == "cpu" and factor == 1:
        return gradients
    return [x.mul_(factor) for x in gradients]


class _Reduced(torch.autograd.Function):
    """mean and sum: the gradients are ready after the forward, up to the factor from above."""

    @staticmethod
    def forward(input, weight, bias, target, divisor, reduction, ignore_index, label_smoothing, needs, impl):
        count, scale = divisor, None
        if reduction == "mean":
            count = (target != ignore_index).sum().to(_state_dtype(input)) if count is None else count
            scale = count.reciprocal().expand(len(target))
        loss, *gradients = _linear_cross_entropy(
            input, weight, bias, target, scale, ignore_index, label_smoothing, *needs, impl
        )
        total = loss.sum()
        return (total if count is None else total / count, *gradients)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output[1:], *inputs[:3])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else zeros the size of the weight for an output without a gradient

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 10
        *gradients, input, weight, bias = ctx.saved_tensors
        with torch.no_grad():
            gradients = _needed(ctx, times(gradients, grad))
        return *_Final.apply(input, weight, bias, *gradients), *(None,) * 7


class _PerRow(torch.autograd.Function):
    """none: the backward makes the logits again, with the gradient of each row at hand."""

    @staticmethod
    def forward(input, weight, bias, target, ignore_index, label_smoothing, impl):
        options = (ignore_index, label_smoothing, False, False, False, impl)
        return _linear_cross_entropy(input, weight, bias, target, None, *options)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.impl = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, target = ctx.saved_tensors
        options = (ctx.ignore_index, ctx.label_smoothing, *ctx.needs_input_grad[:3], ctx.impl)
        with torch.no_grad():
            _, *gradients = _linear_cross_entropy(input, weight, bias, target, grad, *options)
        return *_Final.apply(input, weight, bias, *_needed(ctx, gradients)), *(None,) * 4


def _divisor(divisor, reduction, input):
    if reduction != "mean":
        raise ValueError(f"divisor goes with reduction 'mean' alone, got {reduction!r}")
    if not isinstance(divisor, torch.Tensor):  # full, as a tensor from a number would wait for a GPU
        return torch.full((), _checks.positive("divisor", divisor), dtype=_state_dtype(input), device=input.device)
    _checks.same("divisor", divisor, "input", input, dtype=False)
    if divisor.dim():
        raise ValueError(f"divisor must be a scalar tensor, got shape {list(divisor.shape)}")
    return divisor.detach().to(_state_dtype(input))


def linear_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    divisor: torch.Tensor | float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Cross entropy of `input @ weight.T + bias`, in nats, with a bounded chunk of the logits in memory.

    Args:
        input: `[..., D]`; float32, bfloat16, float16 or float64. Autocast casts it like a linear layer's.
        weight: `[V, D]` like `input`.
        target: `[...]` int64 or int32 ids in [0, V), or `ignore_index`.
        bias: `[V]` like `input`, or None.
        reduction: `"mean"` over the targets that are not ignored (NaN when there are none), `"sum"`, or `"none"`.
        ignore_index: target of the rows that count for nothing; it may lie inside the vocabulary.
        label_smoothing: weight of the uniform distribution in the target, in [0, 1].
        divisor: what `"mean"` divides by instead, a positive number or a scalar tensor on the device of `input`: the
            rows of all the pieces of a batch, whose means then add up to that of the batch.
        impl: `"auto"`, `"reference"`, `"cpu"` or `"triton"`.

    Returns:
        float32 (float64 for float64 input): a scalar, or the shape of `target` for `"none"`, where an ignored row is 0.
        Differentiable once with respect to `input`, `weight` and `bias`; only the gradients in need are computed.

    Raises:
        ValueError: wrong shape or value; a target outside the vocabulary (a device assertion on a GPU).
        TypeError: wrong dtype or device. RuntimeError: `impl` is not installed.
    """
    _checks.floating("input", input)
    _checks.floating("weight", weight)
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, bias = (x if x is None else x.to(dtype) for x in (input, weight, bias))
    _checks.same("weight", weight, "input", input)
    V, D = _checks.dims("weight", weight, "VD")
    if input.dim() == 0 or input.shape[-1] != D:
        raise ValueError(f"input must have shape [..., D] with D = {D} like weight, got {list(input.shape)}")
    _checks.ids("target", target)
    _checks.same("target", target, "input", input, dtype=False)
    if target.shape != input.shape[:-1]:
        raise ValueError(f"target must have shape {list(input.shape[:-1])} like input, got {list(target.shape)}")
    if bias is not None:
        _checks.same("bias", bias, "input", input)
        _checks.shape("bias", bias, V=V)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    label_smoothing = _checks.probability("label_smoothing", label_smoothing)
    if divisor is not None:
        divisor = _divisor(divisor, reduction, input)
    chosen = _lib.resolve("linear_cross_entropy", impl, input)
    if chosen == "reference":
        return reference(input, weight, target, bias, reduction, ignore_index, label_smoothing, divisor)
    rows, labels = input.reshape(target.numel(), D), target.reshape(-1).long()
    if reduction == "none":
        return _PerRow.apply(rows, weight, bias, labels, ignore_index, label_smoothing, chosen).reshape(target.shape)
    needs = tuple(x is not None and x.requires_grad and torch.is_grad_enabled() for x in (input, weight, bias))
    return _Reduced.apply(rows, weight, bias, labels, divisor, reduction, ignore_index, label_smoothing, needs, chosen)[
        0
    ]
