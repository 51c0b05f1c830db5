"""Cross entropy of a softmax in clusters of words by frequency, over the whole width of one weight.

Grave et al., arXiv 1609.04309, as Merity et al., arXiv 1803.08240, tie it: with no projections. The ids, sorted by
frequency, are cut at c_1 < ... < c_{K-1}: the head has the words below c_1 and a tombstone for each tail, t_k with bias
s_k, and the k-th tail the words in [c_k, c_{k+1}). With z = W h + b,

    log p(w) = log_softmax(z_0 .. z_{c_1 - 1}, t_1 h + s_1 .. t_{K-1} h + s_{K-1})[w]              w in the head
    log p(w) = log_softmax(as above)[tombstone k] + log_softmax(z of the k-th tail)[w - c_k]       w in the k-th tail

That is a distribution of its own, and exact. All rows go through the head, but through a tail those alone whose targets
lie in it, so that a step multiplies by c_1 + K - 1 rows of W and by a few more on average.

So a loss is a sum of one `linear_cross_entropy` for each cluster, and dL/dW has the gradient of each cluster in a slice
of its own. A tail with few rows takes as long as its part of W and of dW through memory, and the first touch of dW is
the longest part of that: each cluster writes its slice in place, once. Beside these the logits of a tail are small, and
a chunk of them is another trip through both, so they are cut where the budget wants it and not before.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm import _lib
from fastlm.ops import _checks
from fastlm.ops.linear_cross_entropy import REDUCTIONS, chunked, linear_cross_entropy, times
from fastlm.ops.linear_cross_entropy import reference as plain

_lib.define(
    "adaptive_softmax(Tensor input, Tensor weight, Tensor? bias, Tensor tail_vectors, Tensor? tail_bias, "
    "Tensor target, Tensor? scale, bool mean, int ignore_index, int[] cutoffs, bool[] needs, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.declare(
    "adaptive_softmax",
    kernels=("linear_cross_entropy_rows_",),
    triton=("linear_cross_entropy_gradient_", "linear_cross_entropy_loss"),
)

_IGNORED = -1  # in the head and in the tails, where the ignore_index of the vocabulary may be a column


class _Parts(NamedTuple):
    """Targets of a batch.

    Attributes:
        head: `[N]`, their columns in the head. kept: how many count.
        tail: `[M]`, columns in the first tail of the rows that go through it, then in the second, and so on.
        rows: `[M]`, which rows these are; None: all rows go through each tail.
        sizes: how many rows each tail has.
    """

    head: Tensor
    kept: Tensor
    tail: Tensor
    rows: Tensor | None
    sizes: tuple[int, ...]


def reference(input, weight, bias, tail_vectors, tail_bias, parts, cutoffs, reduction):
    """The logits of each cluster, all of them, and PyTorch's cross entropy."""
    sizes = [stop - start for start, stop in pairwise([0, *cutoffs, len(weight)])]
    first, *weights = weight.split(sizes)
    first_bias, *biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    first_bias = None if bias is None else torch.cat([first_bias, tail_bias])
    options = "none", _IGNORED, 0.0
    loss = plain(input, torch.cat([first, tail_vectors]), parts.head, first_bias, *options)
    rows = [None] * len(weights) if parts.rows is None else parts.rows.split(parts.sizes)
    for w, b, target, index in zip(weights, biases, parts.tail.split(parts.sizes), rows, strict=True):
        if index is None:
            loss = loss + plain(input, w, target, b, *options)
        elif len(index):  # a tail without rows adds nothing
            loss = loss.index_add(0, index, plain(input.index_select(0, index), w, target, b, *options))
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / parts.kept


def _clustered(input, weight, bias, tail_vectors, tail_bias, target, scale, mean, ignore_index, cutoffs, needs, impl):
    """Loss of each row, the gradients of the sum of scale times loss that are needed (the others are empty), and how
    many rows count; with `mean`, the scale is one over that.
    """
    head, kept, tail, rows, sizes = _parts(target, cutoffs, len(weight), ignore_index, input.device)
    kept = kept.to(_state_dtype(input))
    scale = kept.reciprocal().expand(len(target)) if mean else scale
    needs_input, needs_weight, needs_bias, needs_vectors, needs_tail_bias = needs
    first, options = cutoffs[0], (_IGNORED, 0.0)
    d_weight = weight.new_empty(weight.shape if needs_weight else 0)
    d_bias = weight.new_empty(len(weight) if needs_bias else 0)
    loss, d_input, d_head, d_head_bias = chunked(
        input,
        torch.cat([weight[:first], tail_vectors]),
        None if bias is None else torch.cat([bias[:first], tail_bias]),
        head,
        scale,
        *options,
        needs_input,
        needs_weight or needs_vectors,
        needs_bias or needs_tail_bias,
        impl,
        sparing=False,
    )
    if needs_weight:
        d_weight[:first] = d_head[:first]
    if needs_bias:
        d_bias[:first] = d_head_bias[:first]
    begin = 0
    for (start, stop), size in zip(pairwise([*cutoffs, len(weight)]), sizes, strict=True):
        index = None if rows is None else rows[begin : begin + size]
        tail_loss, d_rows, _, d_tail_bias = chunked(
            input if index is None else input.index_select(0, index),
            weight[start:stop],
            None if bias is None else bias[start:stop],
            tail[begin : begin + size],
            scale if index is None or scale is None else scale.index_select(0, index),
            *options,
            needs_input,
            needs_weight,
            needs_bias,
            impl,
            into=d_weight[start:stop] if needs_weight else None,
            sparing=False,
        )
        for total, part in ((loss, tail_loss), (d_input, d_rows))[: 1 + needs_input]:
            total.add_(part) if index is None else total.index_add_(0, index, part)
        if needs_bias:
            d_bias[start:stop] = d_tail_bias
        begin += size
    d_vectors = d_head[first:].clone() if needs_vectors else input.new_empty(0)
    d_tail_bias = d_head_bias[first:].clone() if needs_tail_bias else input.new_empty(0)
    return loss, d_input, d_weight, d_bias, d_vectors, d_tail_bias, kept


def _fake(input, weight, bias, tail_vectors, tail_bias, target, scale, mean, ignore_index, cutoffs, needs, impl):
    shapes = input.shape, weight.shape, len(weight), tail_vectors.shape, len(tail_vectors)
    gradients = (input.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))
    loss, kept = (input.new_empty(shape, dtype=_state_dtype(input)) for shape in (input.shape[0], ()))
    return loss, *gradients, kept


def _state_dtype(x):
    return torch.promote_types(x.dtype, torch.float32)


_lib.reference("adaptive_softmax", _clustered)
_lib.fake("adaptive_softmax", _fake)
_adaptive_softmax = torch.ops.fastlm.adaptive_softmax.default


class _Final(torch.autograd.Function):
    """Gradients that cannot be differentiated again; without it, a second derivative would be zero and say nothing."""

    @staticmethod
    def forward(input, weight, bias, tail_vectors, tail_bias, d_input, d_weight, d_bias, d_vectors, d_tail_bias):
        gradients = d_input, d_weight, d_bias, d_vectors, d_tail_bias
        return tuple(x if x is None else x.view_as(x) for x in gradients)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("adaptive_softmax is differentiable once: it has no second derivative")


def _needed(ctx, gradients):
    return [x if need else None for x, need in zip(gradients, ctx.needs_input_grad[:5], strict=True)]


class _Reduced(torch.autograd.Function):
    """mean and sum: the gradients are ready after the forward, up to the factor from above."""

    @staticmethod
    def forward(input, weight, bias, tail_vectors, tail_bias, target, mean, ignore_index, cutoffs, needs, impl):
        tensors = input, weight, bias, tail_vectors, tail_bias, target
        loss, *gradients, kept = _adaptive_softmax(*tensors, None, mean, ignore_index, cutoffs, needs, impl)
        total = loss.sum()
        return (total / kept if mean else total, *gradients)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output[1:], *inputs[:5])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else zeros the size of the weight for an output without a gradient

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 11
        gradients, tensors = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        with torch.no_grad():
            gradients = _needed(ctx, times(gradients, grad))
        return *_Final.apply(*tensors, *gradients), *(None,) * 6


class _PerRow(torch.autograd.Function):
    """none: the backward makes the logits again, with the gradient of each row at hand."""

    @staticmethod
    def forward(input, weight, bias, tail_vectors, tail_bias, target, ignore_index, cutoffs, impl):
        tensors = input, weight, bias, tail_vectors, tail_bias, target
        return _adaptive_softmax(*tensors, None, False, ignore_index, cutoffs, [False] * 5, impl)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.ignore_index, ctx.cutoffs, ctx.impl = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        tensors, options = ctx.saved_tensors, (ctx.ignore_index, ctx.cutoffs, ctx.needs_input_grad[:5], ctx.impl)
        with torch.no_grad():
            _, *gradients, _ = _adaptive_softmax(*tensors, grad, False, *options)
        return *_Final.apply(*tensors[:5], *_needed(ctx, gradients)), *(None,) * 4


def adaptive_softmax(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    tail_vectors: Tensor | None = None,
    *,
    cutoffs: Sequence[int],
    bias: Tensor | None = None,
    tail_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    impl: str = "auto",
) -> Tensor:
    """The loss in nats of the distribution above, with a bounded chunk of a cluster's logits in memory.

    Targets on the host are sorted into clusters there, so that a GPU need not be waited for. Where they are on a GPU,
    all rows go through each tail, at the price of a full softmax: exact, and of fixed shapes, as CUDA graphs want them.

    Args:
        input: `[..., D]`; float32, bfloat16, float16 or float64. Autocast casts it like a linear layer's.
        weight: `[V, D]` like `input`.
        target: `[...]` int64 or int32 ids in [0, V), or `ignore_index`; on the device of `input` or on the host.
        tail_vectors: the tombstones, `[K - 1, D]` like `input`; None without cutoffs.
        cutoffs: first ids of the tails, increasing, in [1, V); without any, this is `linear_cross_entropy`.
        bias, tail_bias: `[V]` and `[K - 1]` like `input`, or None, both.
        reduction: `"mean"` over the targets that are not ignored (NaN when there are none), `"sum"`, or `"none"`.
        ignore_index: target of the rows that count for nothing; it may lie inside the vocabulary.
        impl: `"auto"`, `"reference"`, `"cpu"` or `"triton"`.

    Returns:
        float32 (float64 for float64 input): a scalar, or the shape of `target` for `"none"`, where an ignored row is 0.
        Differentiable once with respect to the floating-point tensors; only the gradients in need are computed.

    Raises:
        ValueError: wrong shape or value; a target outside the vocabulary (a device assertion on a GPU).
        TypeError: wrong dtype or device. RuntimeError: `impl` is not installed.
    """
    _checks.floating("input", input)
    _checks.ids("target", target)
    if not _on_host(target):
        _checks.same("target", target, "input", input, dtype=False)
    tensors = input, weight, bias, tail_vectors, tail_bias
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        tensors = tuple(x if x is None else x.to(dtype) for x in tensors)
    input, weight, bias, tail_vectors, tail_bias = tensors
    V, D = _checks.dims("weight", weight, "VD")
    cutoffs = _checks.cutoffs(cutoffs, V)
    if not cutoffs:
        labels = target.to(input.device, non_blocking=True)
        options = dict(bias=bias, reduction=reduction, ignore_index=ignore_index, impl=impl)
        return linear_cross_entropy(input, weight, labels, **options)
    if input.dim() == 0 or input.shape[-1] != D:
        raise ValueError(f"input must have shape [..., D] with D = {D} like weight, got {list(input.shape)}")
    if target.shape != input.shape[:-1]:
        raise ValueError(f"target must have shape {list(input.shape[:-1])} like input, got {list(target.shape)}")
    if tail_vectors is None or (bias is None) != (tail_bias is None):
        raise ValueError("cutoffs want tail_vectors, and tail_bias where there is a bias")
    _checks.shape("tail_vectors", tail_vectors, tails=len(cutoffs), D=D)
    if bias is not None:
        _checks.shape("bias", bias, V=V)
        _checks.shape("tail_bias", tail_bias, tails=len(cutoffs))
    for name, x in zip(("weight", "bias", "tail_vectors", "tail_bias"), tensors[1:], strict=True):
        if x is not None:
            _checks.same(name, x, "input", input)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    labels = target.reshape(-1).long()
    tensors = input.reshape(target.numel(), D), *tensors[1:]
    chosen = _lib.resolve("adaptive_softmax", impl, input)
    if chosen == "reference":
        parts = _parts(labels, cutoffs, V, ignore_index, input.device)
        loss = reference(*tensors, parts, cutoffs, reduction)
        return loss.reshape(target.shape) if reduction == "none" else loss
    if reduction == "none":
        return _PerRow.apply(*tensors, labels, ignore_index, cutoffs, chosen).reshape(target.shape)
    needs = tuple(x is not None and x.requires_grad and torch.is_grad_enabled() for x in tensors)
    return _Reduced.apply(*tensors, labels, reduction == "mean", ignore_index, cutoffs, needs, chosen)[0]


def _on_host(target):
    return target.device.type == "cpu"


def _parts(target, cutoffs, classes, ignore_index, device):
    """The parts of targets `[N]` on the device of the rows; a graph that is compiled has to have fixed shapes."""
    if _on_host(target) and not torch.compiler.is_compiling():
        return _to(_partition(target, cutoffs, classes, ignore_index), device)
    return _all_rows(target.to(device, non_blocking=True), cutoffs, classes, ignore_index)


def _remap(target, kept, cutoffs, classes):
    """Targets `[N]` among the columns of the head, and in each tail, where the other rows are ignored."""
    tombstones = sum(target >= cutoff for cutoff in cutoffs)  # int64, as 0 + bool is
    head = torch.where(target < cutoffs[0], target, cutoffs[0] - 1 + tombstones)
    outside = (target < 0) | (target >= classes)
    head = torch.where(outside, cutoffs[0] + len(cutoffs), head)  # no column: linear_cross_entropy refuses it
    tails = [
        torch.where(kept & (target >= start) & (target < stop), target - start, _IGNORED)
        for start, stop in pairwise([*cutoffs, classes])
    ]
    return torch.where(kept, head, _IGNORED), tails


def _all_rows(target, cutoffs, classes, ignore_index):
    """What every row is in the head and in each tail; nothing here waits for a GPU."""
    kept = target != ignore_index
    head, tails = _remap(target, kept, cutoffs, classes)
    return _Parts(head, kept.sum(), torch.cat(tails), None, (len(target),) * len(tails))


def _partition(target, cutoffs, classes, ignore_index):
    """The parts of targets `[N]` on the host."""
    kept = target != ignore_index
    what = f"the vocabulary, or be ignore_index = {ignore_index}"
    _checks.within("target", torch.where(kept, target, 0), 0, classes, what)
    head, tails = _remap(target, kept, cutoffs, classes)
    rows = [(tail != _IGNORED).nonzero()[:, 0] for tail in tails]
    local = [tail[index] for tail, index in zip(tails, rows, strict=True)]
    return _Parts(head, kept.sum(), torch.cat(local), torch.cat(rows), tuple(map(len, rows)))


def _to(parts, device):
    """Parts on another device, by one copy that nobody waits for."""
    if device.type == "cpu":
        return parts
    tensors = [parts.head, parts.kept[None], parts.tail, parts.rows]
    packed = torch.cat(tensors)
    packed = packed.pin_memory() if device.type == "cuda" else packed
    head, kept, tail, rows = packed.to(device, non_blocking=True).split([len(x) for x in tensors])
    return _Parts(head, kept[0], tail, rows, parts.sizes)
