"""Stacks of QRNN layers: torchqrnn's, and the paper's with dense connections, in both directions, for a decoder."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.nn.qrnn_layer import QRNNLayer, QRNNState, refuse_packed
from fastlm.ops import _checks


class QRNNEncoding(NamedTuple):
    """What a decoder reads of a source.

    Attributes:
        output: `[S, B, H]` whatever `batch_first`, what the last layer gives; H is twice as large in both directions.
        last: one `[B, H]` for each layer, what it gives at the last step that it reads and that counts; zeros where
            none does.
        lengths: `[B]`, how many steps of each row count; all if None.
    """

    output: Tensor
    last: tuple[Tensor, ...]
    lengths: Tensor | Sequence[int] | None = None


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
        y, states = self._run(input, hidden, lengths)
        return (y.transpose(0, 1) if self.batch_first else y), states

    def encode(self, input: Tensor, lengths: Tensor | Sequence[int] | None = None) -> QRNNEncoding:
        """Runs the stack over whole sources, for `QRNNDecoder`.

        Args, Raises: as `forward`.
        """
        last = []
        return QRNNEncoding(self._run(input, None, lengths, last)[0], tuple(last), lengths)

    def _run(self, input, hidden, lengths, last=None):
        """The output, time-major, and the states; puts what `QRNNEncoding` has of each layer into the list `last`."""
        refuse_packed(input)
        x = input.transpose(0, 1) if self.batch_first else input
        directions = [self.layers, self.layers_reverse] if self.bidirectional else [self.layers]
        wanted = self.num_layers * len(directions)
        if hidden is not None and len(hidden) != wanted:
            raise ValueError(f"hidden must have {wanted} states, got {len(hidden)}")
        states = []
        for index in range(self.num_layers):
            outputs, ends = [], []
            for layers in directions:
                h, state = layers[index](x, None if hidden is None else hidden[len(states)], lengths)
                outputs.append(h)
                states.append(state)
                if last is not None:
                    ends.append(_at_end(h, lengths, layers[index].reverse))
            y = torch.cat(outputs, -1) if self.bidirectional else h
            if last is not None:
                last.append(torch.cat(ends, -1))
            if index < self.num_layers - 1:
                y = F.dropout(y, self.dropout, self.training)
                x = torch.cat([x, y], -1) if self.dense else y
        return y, tuple(states)


def _at_end(h, lengths, reverse):
    """`[B, H]`, what is given at the last step that counts, in the order of reading."""
    if not len(h):
        return h.new_zeros(h.shape[1:])
    if reverse or lengths is None:
        return h[0 if reverse else -1]
    index = torch.as_tensor(lengths, device=h.device).long().sub(1).clamp(min=0)  # without steps h[0] is zeros
    return h.gather(0, index.view(1, -1, 1).expand(1, -1, h.size(-1))).squeeze(0)
