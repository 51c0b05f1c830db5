"""Stacks of QRNN layers: torchqrnn's, and the paper's with dense connections, in both directions, for a decoder."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.nn.qrnn_layer import QRNNLayer, QRNNState, refuse_packed
from fastlm.ops import _checks


class QRNN(torch.nn.Module):
    """A stack of QRNN layers with torchqrnn's arguments and keys (`layers.{i}.linear.weight`).

    Args:
        input_size: I. hidden_size: H of every layer. num_layers: their number.
        bias, batch_first, dropout, bidirectional: as in `torch.nn.LSTM`. The layers that read backwards are
            `layers_reverse.{i}`.
        layers: the layers to use instead of new ones; then the sizes and `num_layers` are theirs.
        dense: give each layer the input and the outputs of all layers below, one after the other.
        options: what `QRNNLayer` takes besides: `window`, `pooling`, `zoneout`, `weight_dropout`, ...

    Raises:
        ValueError: an argument is out of range, or `layers` comes with `bidirectional` or `dense`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        layers: Sequence[QRNNLayer] | None = None,
        *,
        dense: bool = False,
        **options,
    ):
        super().__init__()
        if layers is not None and (bidirectional or dense):
            raise ValueError("layers must be absent when bidirectional or dense is set: their sizes follow from both")
        if num_layers <= 0:
            raise ValueError(f"num_layers must be positive, got {num_layers}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers if layers is None else len(layers)
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = _checks.probability("dropout", dropout)
        self.bidirectional = bidirectional
        self.dense = dense
        width = hidden_size * (2 if bidirectional else 1)

        def stack(**more):
            sizes = [input_size + dense * i * width if dense or i == 0 else width for i in range(num_layers)]
            return torch.nn.ModuleList(QRNNLayer(n, hidden_size, bias=bias, **options, **more) for n in sizes)

        self.layers = stack() if layers is None else torch.nn.ModuleList(layers)
        self.layers_reverse = stack(reverse=True) if bidirectional else torch.nn.ModuleList()

    def reset(self) -> None:
        """Does nothing: present because torchqrnn's callers call it. A new sequence starts where no state is given."""

    def forward(
        self,
        input: Tensor,
        hidden: Sequence[QRNNState] | Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, tuple[QRNNState, ...]]:
        """Runs the stack.

        Args:
            input: `[T, B, I]`, `[B, T, I]` when `batch_first`.
            hidden: the states that the last call returned, or cells `[layers, B, H]` as in torchqrnn.
            lengths: `[B]`, how many steps of each row count; all if absent.

        Returns:
            `(output, states)`: one state per layer, for a bidirectional stack two, forwards first.

        Raises:
            ValueError: a shape or a length does not fit. TypeError: a dtype or device does not fit.
        """
        refuse_packed(input)
        x = input.transpose(0, 1) if self.batch_first else input
        directions = [self.layers, self.layers_reverse] if self.bidirectional else [self.layers]
        wanted = self.num_layers * len(directions)
        if hidden is not None and len(hidden) != wanted:
            raise ValueError(f"hidden must have {wanted} states, got {len(hidden)}")
        states = []
        for index in range(self.num_layers):
            outputs = []
            for layers in directions:
                h, state = layers[index](x, None if hidden is None else hidden[len(states)], lengths)
                outputs.append(h)
                states.append(state)
            y = torch.cat(outputs, -1) if self.bidirectional else h
            if index < self.num_layers - 1:
                y = F.dropout(y, self.dropout, self.training)
                x = torch.cat([x, y], -1) if self.dense else y
        return (y.transpose(0, 1) if self.batch_first else y), tuple(states)
