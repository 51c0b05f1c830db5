"""A softmax in clusters of words by frequency; `fastlm.ops.adaptive_softmax` has its mathematics and its loss."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastlm import ops
from fastlm.ops import _checks, _matmul


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
        _checks.size("in_features", in_features)
        _checks.size("num_classes", num_classes)
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
        """The loss in nats, as `fastlm.ops.adaptive_softmax` gives it: order and shape are those of `target`.

        On a GPU, targets that are on the host save the time of a full softmax.

        Args:
            input: `[..., D]`. target: `[...]`, int64 or int32, on the device of `input` or on the host.
            weight, bias: `[V, D]` and `[V]`, of a layer that is tied.
            reduction: `"mean"` over the targets that are not ignored, `"sum"` or `"none"`.

        Raises:
            ValueError: wrong shape or value; a target outside the vocabulary (on a GPU a device assertion).
            TypeError: wrong dtype or device.
        """
        weight, bias = self._layer(weight, bias)
        return ops.adaptive_softmax(
            input,
            weight,
            target,
            self.tail_vectors,
            cutoffs=self.cutoffs,
            bias=bias,
            tail_bias=self.tail_bias,
            reduction=reduction,
            ignore_index=self.ignore_index,
        )

    def log_prob(self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Log probabilities of all words, `[..., V]`, for `input [..., D]`.

        Returns:
            float32 (float64 for float64 input); the logits before it have the dtype of the input.

        Raises:
            ValueError: wrong shape. TypeError: wrong dtype or device.
        """
        weight, bias = self._layer(weight, bias)
        self._check(input, weight=weight, bias=bias, tail_vectors=self.tail_vectors, tail_bias=self.tail_bias)
        (head_weight, *weights), (head_bias, *biases) = self._split(weight, bias)

        def of(weight, bias):
            logits = _matmul.linear(input, weight, bias)
            return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

        first, tombstones = of(head_weight, head_bias).tensor_split([len(head_weight) - len(self.cutoffs)], -1)
        tails = [of(w, b) + t[..., None] for w, b, t in zip(weights, biases, tombstones.unbind(-1), strict=True)]
        return torch.cat([first, *tails], -1)

    def predict(self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The most probable words, `[...]`, for `input [..., D]`; errors as in `log_prob`."""
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

    def _check(self, input, **layer):
        _checks.floating("input", input)
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            wanted = f"[..., D] with D = {self.in_features} like weight"
            raise ValueError(f"input must have shape {wanted}, got {list(input.shape)}")
        for name, x in layer.items():
            if x is not None:
                _checks.same(name, x, "input", input, dtype=False)  # first, as autocast knows no meta device
                _checks.same(name, x, "input", input, dtype=not torch.is_autocast_enabled(input.device.type))

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
