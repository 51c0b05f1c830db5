"""A softmax in clusters of words by frequency, over the whole width of a weight that an embedding may share.

Grave et al., arXiv 1609.04309, as Merity et al., arXiv 1803.08240, tie it: with no projections. The ids, sorted by
frequency, are cut at c_1 < ... < c_{K-1}: the head has the words below c_1 and a tombstone for each tail, t_k with bias
s_k, and the k-th tail the words in [c_k, c_{k+1}). With z = W h + b,

    log p(w) = log_softmax(z_0 .. z_{c_1 - 1}, t_1 h + s_1 .. t_{K-1} h + s_{K-1})[w]              w in the head
    log p(w) = log_softmax(as above)[tombstone k] + log_softmax(z of the k-th tail)[w - c_k]       w in the k-th tail

That is a distribution of its own, and exact. All rows go through the head, but through a tail those alone whose targets
lie in it, so that a step multiplies by c_1 + K - 1 rows of W and by a few more on average.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm import ops
from fastlm.ops import _checks, _matmul

_IGNORED = -1  # in the head and in the tails, where the ignore_index of the vocabulary may be a column


class _Parts(NamedTuple):
    """Targets of a batch.

    Attributes:
        head: `[N]`, their columns in the head. kept: how many count.
        rows: `[M]`, those whose targets lie in a tail, one tail after the other. tail: `[M]`, their columns there.
        sizes: how many rows each tail has.
    """

    head: Tensor
    kept: Tensor
    rows: Tensor | None = None
    tail: Tensor | None = None
    sizes: tuple[int, ...] = ()


class AdaptiveSoftmax(torch.nn.Module):
    """An output layer and its loss for a large vocabulary, where a row costs as much as its target's cluster.

    Parameters are `weight` `[V, D]`, `bias` `[V]` and, of the K - 1 tombstones, `tail_vectors` `[K - 1, D]` and
    `tail_bias` `[K - 1]`, zeros at first. Ids must be sorted by frequency, as `Vocabulary.build` sorts them; where they
    are not, the loss is as exact, and slower, for more rows go through the tails. Without cutoffs it is
    `LinearCrossEntropyLoss`.

    Tie the weight to an embedding by assigning it, `softmax.weight = embedding.weight`, or make the layer with
    `tied=True` and pass weight and bias with each call: a state dict then has them once.

    Args:
        in_features: D. num_classes: V. cutoffs: first ids of the tails, increasing, in [1, V); V > 75,000 has
            (2800, 20000, 76000) in awd-lstm-lm.
        bias: add biases to the logits, those of the tombstones included.
        tied: weight and bias of the words are not parameters of this layer.
        ignore_index: target that counts for nothing.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        cutoffs: Sequence[int] = (),
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        tied: bool = False,
        ignore_index: int = -100,
    ):
        super().__init__()
        self.in_features, self.num_classes = in_features, num_classes
        self.cutoffs = _checks.cutoffs(cutoffs, num_classes)
        self.biased, self.tied, self.ignore_index = bias, tied, ignore_index

        def parameter(*shape, there=True):
            return torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if there else None

        self.weight = parameter(num_classes, in_features, there=not tied)
        self.bias = parameter(num_classes, there=bias and not tied)
        self.tail_vectors = parameter(len(self.cutoffs), in_features, there=bool(self.cutoffs))
        self.tail_bias = parameter(len(self.cutoffs), there=bias and bool(self.cutoffs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight and bias as a linear layer does, from U(-D^-1/2, D^-1/2); zeros for the tails."""
        for drawn in (self.weight, self.bias):
            if drawn is not None:
                bound = self.in_features**-0.5 if self.in_features else 0.0
                torch.nn.init.uniform_(drawn, -bound, bound)
        for zero in (self.tail_vectors, self.tail_bias):
            if zero is not None:
                torch.nn.init.zeros_(zero)

    @torch.no_grad()
    def import_tails(self, tail_vectors: Tensor, tail_bias: Tensor, *, tombstones: str = "reversed") -> None:
        """Takes the tombstones of a checkpoint, `tail_vectors` `[K - 1, D]` and `tail_bias` `[K - 1]`.

        Args:
            tombstones: `"reversed"`, as awd-lstm-lm has them: the first tail's is the last; or `"in order"`.

        Raises:
            ValueError: a shape does not fit, `tombstones` is neither, or this layer has no cutoffs or no bias.
        """
        if tombstones not in ("reversed", "in order"):
            raise ValueError(f"tombstones must be 'reversed' or 'in order', got {tombstones!r}")
        if self.tail_bias is None:
            raise ValueError("tail_bias has no place in a layer without cutoffs or without bias")
        _checks.shape("tail_vectors", tail_vectors, tails=len(self.cutoffs), D=self.in_features)
        _checks.shape("tail_bias", tail_bias, tails=len(self.cutoffs))
        for own, other in ((self.tail_vectors, tail_vectors), (self.tail_bias, tail_bias)):
            own.copy_(other.flip(0) if tombstones == "reversed" else other)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.num_classes}, cutoffs={self.cutoffs}, bias={self.biased}, tied={self.tied}"

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        reduction: str = "mean",
    ) -> Tensor:
        """The loss in nats, as `fastlm.ops.linear_cross_entropy` gives it: order and shape are those of `target`.

        Targets on the host are sorted into clusters there, so that a GPU need not be waited for. Where they are on a
        GPU, all rows go through each tail, at the price of a full softmax: exact, and of fixed shapes, as CUDA graphs
        want them.

        Args:
            input: `[..., D]`. target: `[...]`, int64 or int32, on the device of `input` or on the host.
            weight, bias: `[V, D]` and `[V]`, of a layer that is tied.
            reduction: `"mean"` over the targets that are not ignored, `"sum"` or `"none"`.

        Raises:
            ValueError: wrong shape or value; a target outside the vocabulary (on a GPU a device assertion).
            TypeError: wrong dtype or device.
        """
        weight, bias = self._layer(weight, bias)
        _checks.floating("input", input)
        _checks.ids("target", target)
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(f"input must have shape [..., D] with D = {self.in_features}, got {list(input.shape)}")
        if target.shape != input.shape[:-1]:
            raise ValueError(f"target must have shape {list(input.shape[:-1])} like input, got {list(target.shape)}")
        if not _on_host(target):
            _checks.same("target", target, "input", input, dtype=False)
        if not self.cutoffs:
            labels = target.to(input.device, non_blocking=True)
            return ops.linear_cross_entropy(
                input, weight, labels, bias=bias, reduction=reduction, ignore_index=self.ignore_index
            )
        rows, labels = input.reshape(-1, self.in_features), target.reshape(-1).long()
        on_host = _on_host(target)
        if on_host:
            parts = _to(_partition(labels, self.cutoffs, self.num_classes, self.ignore_index), input.device)
            inputs, targets = rows.index_select(0, parts.rows).split(parts.sizes), parts.tail.split(parts.sizes)
        else:
            parts, targets = _all_rows(labels, self.cutoffs, self.num_classes, self.ignore_index)
            inputs = [rows] * len(targets)
        options = {"reduction": reduction, "ignore_index": _IGNORED}
        if reduction == "mean":
            options["divisor"] = parts.kept
        (head_weight, *weights), (head_bias, *biases) = self._split(weight, bias)
        loss = ops.linear_cross_entropy(rows, head_weight, parts.head, bias=head_bias, **options)
        losses = [
            ops.linear_cross_entropy(x, w, t, bias=b, **options)
            for x, w, t, b in zip(inputs, weights, targets, biases, strict=True)
            if len(t)  # a tail without rows adds nothing, and the gradient of its weight is zero
        ]
        if reduction == "none" and on_host and losses:
            loss = loss.index_add(0, parts.rows, torch.cat(losses))
        else:
            loss = sum(losses, loss)
        return loss.reshape(target.shape) if reduction == "none" else loss

    def log_prob(self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Log probabilities of all words, `[..., V]`, for `input [..., D]`.

        Returns:
            float32 (float64 for float64 input); the logits before it have the dtype of the input.
        """
        weight, bias = self._layer(weight, bias)
        (head_weight, *weights), (head_bias, *biases) = self._split(weight, bias)

        def of(weight, bias):
            logits = _matmul.linear(input, weight, bias)
            return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

        first, tombstones = of(head_weight, head_bias).tensor_split([len(head_weight) - len(self.cutoffs)], -1)
        tails = [of(w, b) + t[..., None] for w, b, t in zip(weights, biases, tombstones.unbind(-1), strict=True)]
        return torch.cat([first, *tails], -1)

    def predict(self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The most probable words, `[...]`, for `input [..., D]`."""
        return self.log_prob(input, weight, bias).argmax(-1)

    def _layer(self, weight, bias):
        """Weight and bias of the words, of this layer or of the call."""
        if not self.tied:
            if weight is not None or bias is not None:
                raise ValueError("weight and bias are given to a layer that is tied alone, this one has its own")
            return self.weight, self.bias
        if weight is None or (bias is not None) != self.biased:
            wanted = "weight and bias" if self.biased else "weight"
            raise ValueError(f"a layer that is tied must be given {wanted} with each call, and nothing else")
        _checks.shape("weight", weight, V=self.num_classes, D=self.in_features)
        if bias is not None:
            _checks.shape("bias", bias, V=self.num_classes)
        return weight, bias

    def _split(self, weight, bias):
        """Weights and biases of the head and of each tail: by one split each, whose backward is one concatenation."""
        if not self.cutoffs:
            return [weight], [bias]
        sizes = [stop - start for start, stop in pairwise([0, *self.cutoffs, self.num_classes])]
        first, *weights = weight.split(sizes)
        weights = [torch.cat([first, self.tail_vectors]), *weights]
        if bias is None:
            return weights, [None] * len(weights)
        first, *biases = bias.split(sizes)
        return weights, [torch.cat([first, self.tail_bias]), *biases]


def _on_host(target):
    return target.device.type == "cpu"


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
    return _Parts(head, kept.sum()), tails


def _partition(target, cutoffs, classes, ignore_index):
    """The parts of targets `[N]` on the host."""
    kept = target != ignore_index
    what = f"the vocabulary, or be ignore_index = {ignore_index}"
    _checks.within("target", torch.where(kept, target, 0), 0, classes, what)
    head, tails = _remap(target, kept, cutoffs, classes)
    rows = [(tail != _IGNORED).nonzero()[:, 0] for tail in tails]
    local = [tail[index] for tail, index in zip(tails, rows, strict=True)]
    return _Parts(head, kept.sum(), torch.cat(rows), torch.cat(local), tuple(map(len, rows)))


def _to(parts, device):
    """Parts on another device, by one copy that nobody waits for."""
    if device.type == "cpu":
        return parts
    tensors = [parts.head, parts.kept[None], parts.rows, parts.tail]
    packed = torch.cat(tensors)
    packed = packed.pin_memory() if device.type == "cuda" else packed
    head, kept, rows, tail = packed.to(device, non_blocking=True).split([len(x) for x in tensors])
    return _Parts(head, kept[0], rows, tail, parts.sizes)
