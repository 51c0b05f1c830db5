"""The QRNN that is conditioned on a source: a decoder, with soft attention in its last layer.

Bradbury, Merity, Xiong and Socher, arXiv 1611.01576, section 2.1. With h~_s what the last layer of the encoder gives at
step s of S, and h~_S what its layer of the same number gives at the last one, each layer of the decoder has

    [z_t; f_t; o_t; i_t] = W [x_t; x_{t-1}; ...; x_{t-k+1}] + b + V h~_S        then `fastlm.ops.qrnn_pool`

and the last one looks back on the whole source, by its cells before the output gate:

    a_st = softmax_s(c_t . h~_s),    k_t = sum_s a_st h~_s,    h_t = o_t (W_k k_t + W_c c_t)
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import ops
from fastlm.nn.qrnn import QRNNEncoding
from fastlm.nn.qrnn_layer import QRNNLayer, QRNNState, counting_steps, refuse_packed
from fastlm.ops import _checks

OPEN = 1e4  # a pre-activation whose sigmoid is 1 in every dtype


class QRNNDecoderLayer(QRNNLayer):
    """One layer of a decoder: `condition` is V, `context` W_k and `cell` W_c, these two with `attention` only.

    Args:
        attention: look back on the source. The others: as `QRNNLayer`.
    """

    def __init__(self, input_size: int, hidden_size: int, *, attention: bool, device=None, dtype=None, **options):
        super().__init__(input_size, hidden_size, device=device, dtype=dtype, **options)
        gates = self.linear.out_features

        def matrix(rows):
            return torch.nn.Linear(hidden_size, rows, bias=False, device=device, dtype=dtype)

        self.condition = matrix(gates)
        self.context, self.cell = (matrix(hidden_size), matrix(hidden_size)) if attention else (None, None)

    def forward(
        self,
        input: Tensor,
        last: Tensor,
        memory: Tensor,
        visible: Tensor | None,
        hidden: QRNNState | Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, QRNNState]:
        """Runs the layer; without attention `memory` and `visible` have no effect.

        Args:
            last: `[B, H]`, h~_S. memory: `[S, B, H]`, the h~_s. visible: `[S, B]`, which of them may be seen; all if
                None.
            input, hidden, lengths: as `QRNNLayer`.

        Returns:
            `(h [T, B, H], state)`.
        """
        pool = self._pool if self.context is None else partial(self._attend, memory, visible)
        return self._run(input, hidden, lengths, pool, self.condition(last))

    def _attend(self, memory, visible, gates, c):
        z, f, *rest = gates.chunk(self.linear.out_features // self.hidden_size, -1)
        # The operator gives cells where there is no output gate, or one that lets all through.
        writing = [z, f, torch.full_like(f, OPEN), rest[1]] if self.pooling == "ifo" else [z, f]
        cells, c_n = ops.qrnn_pool(
            torch.cat(writing, -1),
            c,
            pooling="ifo" if self.pooling == "ifo" else "f",
            zoneout=self.zoneout,
            training=self.training,
        )
        h = self.context(_look_back(cells, memory, visible)) + self.cell(cells)
        return (rest[0].sigmoid() * h if rest else h), c_n


def _look_back(cells, memory, visible):
    """`k [T, B, H]`."""
    query, keys = (x.transpose(0, 1).unsqueeze(1) for x in (cells, memory))  # [B, 1, *, H], a single head
    mask = None if visible is None else visible.t()[:, None, None]
    return F.scaled_dot_product_attention(query, keys, keys, mask, scale=1.0).squeeze(1).transpose(0, 1)


class QRNNDecoder(torch.nn.Module):
    """A stack of QRNN layers conditioned on what `QRNN.encode` gives, with soft attention in the last layer.

    The encoder has as many layers, and its outputs have the width of the decoder's: in both directions its
    `hidden_size` is half of the decoder's. The decoder reads forwards only.

    Args:
        input_size: I. hidden_size: H of every layer. num_layers: their number.
        bias, batch_first, dropout, dense: as in `QRNN`. bias is that of the gates.
        attention: whether the last layer looks back on the source, or all of it is in the last step of the encoder.
        window, pooling, zoneout, weight_dropout: as in `QRNNLayer`, for every layer. Without an output gate ("f") the
            last layer with attention gives W_k k_t + W_c c_t.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        *,
        attention: bool = True,
        dense: bool = False,
        window: int = 1,
        pooling: str = "fo",
        zoneout: float = 0.0,
        weight_dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_layers <= 0:
            raise ValueError(f"num_layers must be positive, got {num_layers}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = _checks.probability("dropout", dropout)
        self.attention = attention
        self.dense = dense
        options = {"window": window, "pooling": pooling, "zoneout": zoneout, "weight_dropout": weight_dropout}
        options |= {"bias": bias, "device": device, "dtype": dtype}
        sizes = [input_size + dense * i * hidden_size if dense or i == 0 else hidden_size for i in range(num_layers)]
        self.layers = torch.nn.ModuleList(
            QRNNDecoderLayer(size, hidden_size, attention=attention and i == num_layers - 1, **options)
            for i, size in enumerate(sizes)
        )

    def forward(
        self,
        input: Tensor,
        encoding: QRNNEncoding,
        hidden: Sequence[QRNNState] | Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, tuple[QRNNState, ...]]:
        """Runs the decoder over a sequence, or over its next piece: step by step is the same as at once.

        Args:
            input: `[T, B, I]`, `[B, T, I]` when `batch_first`.
            encoding: of `QRNN.encode`. What its output has beyond the lengths is not seen; a row without any step
                has nothing to see, and k_t = 0.
            hidden: the states that the last call returned, or cells `[layers, B, H]`; a new sequence if absent.
            lengths: `[B]`, how many steps of each row of the input count; all if absent.

        Returns:
            `(output, states)`: one state per layer.

        Raises:
            ValueError: a shape or a length does not fit. TypeError: a dtype or device does not fit, or `encoding` is
            none.
        """
        refuse_packed(input)
        _checks.floating("input", input)
        _checks.dims("input", input, "BTI" if self.batch_first else "TBI")
        x = input.transpose(0, 1) if self.batch_first else input
        memory, visible = self._check(encoding, x)
        if hidden is not None and len(hidden) != self.num_layers:
            raise ValueError(f"hidden must have {self.num_layers} states, got {len(hidden)}")
        states = []
        for index, layer in enumerate(self.layers):
            before = None if hidden is None else hidden[index]
            y, state = layer(x, encoding.last[index], memory, visible, before, lengths)
            states.append(state)
            if index < self.num_layers - 1:
                y = F.dropout(y, self.dropout, self.training)
                x = torch.cat([x, y], -1) if self.dense else y
        return (y.transpose(0, 1) if self.batch_first else y), tuple(states)

    def _check(self, encoding, x):
        """What the attention may see: the outputs `[S, B, H]`, zeros where none counts, and where one does."""
        if not isinstance(encoding, QRNNEncoding):
            raise TypeError(f"encoding must be what QRNN.encode returns, got {type(encoding).__name__}")
        if len(encoding.last) != self.num_layers:
            raise ValueError(f"encoding.last must have {self.num_layers} tensors, got {len(encoding.last)}")
        # Autocast brings both to one dtype.
        strict = not torch.is_autocast_enabled(x.device.type)
        for i, last in enumerate(encoding.last):
            _checks.shape(f"encoding.last[{i}]", last, B=x.size(1), H=self.hidden_size)
            _checks.same(f"encoding.last[{i}]", last, "input", x, dtype=strict)
        output, lengths = encoding.output, encoding.lengths
        _checks.shape("encoding.output", output, S=output.size(0), B=x.size(1), H=self.hidden_size)
        _checks.same("encoding.output", output, "input", x, dtype=strict)
        if lengths is None or not self.attention:
            return output, None
        valid = counting_steps("encoding.lengths", lengths, output)
        visible = valid.clone()
        visible[:1] = True  # zeros, where there is nothing: what a softmax over nothing is, kernels do not agree on
        return output.masked_fill(~valid.unsqueeze(-1), 0.0), visible
