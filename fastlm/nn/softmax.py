"""Output layers that compute a loss without a matrix of logits in memory."""

import torch
from torch import Tensor

from fastlm import ops


class LinearCrossEntropyLoss(torch.nn.Module):
    """A linear layer and the cross entropy of its output in one, over `fastlm.ops.linear_cross_entropy`.

    Parameters are `linear.weight` `[V, D]` and `linear.bias` `[V]`, as in `torch.nn.LinearCrossEntropyLoss`; tie the
    weight to an embedding by assigning it: `loss.linear.weight = embedding.weight`.

    Args:
        in_features: D. num_classes: V.
        bias: add a bias to the logits.
        reduction: `"mean"`, `"sum"` or `"none"`. ignore_index: target that counts for nothing.
        label_smoothing: share of the uniform distribution in the target, in [0, 1].
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = False,
        device=None,
        dtype=None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss in nats of `input [..., D]` for `target [...]`; errors as in `fastlm.ops.linear_cross_entropy`."""
        return ops.linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            bias=self.linear.bias,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
