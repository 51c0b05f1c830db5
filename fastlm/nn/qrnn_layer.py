"""The quasi-recurrent network: a causal convolution computes all gates at once, only the pooling is recurrent.

Bradbury, Merity, Xiong and Socher, arXiv 1611.01576. With window k:

    [z_t; f_t; o_t; i_t] = W [x_t; x_{t-1}; ...; x_{t-k+1}] + b        then `fastlm.ops.qrnn_pool`
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastlm import ops
from fastlm.ops import _checks, _matmul, philox

GATES = {"f": 2, "fo": 3, "ifo": 4}
CLOSED = -1e4  # a pre-activation whose sigmoid is 0 in every dtype


class QRNNState(NamedTuple):
    """What one layer carries to the next call.

    Attributes:
        c: `[B, H]`, the cell after the last step.
        x: `[window - 1, B, I]`, the last inputs, oldest first.
    """

    c: Tensor
    x: Tensor

    def detach(self) -> "QRNNState":
        """The same values, cut from the graph."""
        return QRNNState(self.c.detach(), self.x.detach())


class QRNNLayer(torch.nn.Module):
    """One QRNN layer, with torchqrnn's arguments and parameters (`linear.weight`, rows z, f, o, then i).

    Args:
        input_size: I. hidden_size: H; `input_size` when None.
        zoneout: probability that an element's f is 0: it keeps its old cell, to which "ifo" still adds.
        window: how many inputs each step sees, itself included.
        output_gate: pooling "fo" when True, "f" when False; `pooling` overrides it.
        save_prev_x, use_cuda: taken because torchqrnn's callers give them, and without effect: the last inputs are
            always part of the state returned, and the device of the tensors decides where the layer runs.
        pooling: `"f"`, `"fo"` or `"ifo"`.
        bias: add a bias to the gates.
        weight_dropout: probability that an element of `linear.weight` is dropped, one mask per training call.
        reverse: read from the last step to the first; then the window holds x_t, x_{t+1}, ...

    Raises:
        ValueError: a size is not positive, a probability is out of range, or there is no such pooling.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int | None = None,
        save_prev_x: bool = False,
        zoneout: float = 0.0,
        window: int = 1,
        output_gate: bool = True,
        use_cuda: bool = True,
        *,
        pooling: str | None = None,
        bias: bool = True,
        weight_dropout: float = 0.0,
        reverse: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        hidden_size = input_size if hidden_size is None else hidden_size
        pooling = pooling or ("fo" if output_gate else "f")
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("window", window)):
            if size <= 0:
                raise ValueError(f"{name} must be positive, got {size}")
        if pooling not in GATES:
            raise ValueError(f"pooling must be 'f', 'fo' or 'ifo', got {pooling!r}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.window = window
        self.pooling = pooling
        self.zoneout = _checks.probability("zoneout", zoneout)
        self.weight_dropout = _checks.probability("weight_dropout", weight_dropout)
        self.reverse = reverse
        self.linear = torch.nn.Linear(
            window * input_size, GATES[pooling] * hidden_size, bias=bias, device=device, dtype=dtype
        )

    def reset(self) -> None:
        """Does nothing: present because torchqrnn's callers call it. A new sequence starts where no state is given."""

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, window={self.window}, pooling={self.pooling!r}"
        for name in ("zoneout", "weight_dropout", "reverse"):
            if getattr(self, name):
                text += f", {name}={getattr(self, name)}"
        return text

    def forward(
        self,
        input: Tensor,
        hidden: QRNNState | Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        column: int = 0,
        columns: int | None = None,
    ) -> tuple[Tensor, QRNNState]:
        """Runs the layer over a sequence, or over the next piece of one.

        Args:
            input: `[T, B, I]`.
            hidden: the state that the last call returned; a tensor `[B, H]` or `[1, B, H]` is a cell after zeros, as in
                torchqrnn; a new sequence if absent.
            lengths: `[B]` integers, how many steps of each row count; all if absent. Steps beyond leave the state alone
                and give zeros, whatever the input holds there.
            column: where the rows begin in the batch that they are a part of. columns: how many that batch has, B if
                absent: the mask of zoneout is then that of the whole batch, under the same seed.

        Returns:
            `(h [T, B, H], state)`.

        Raises:
            ValueError: a shape or a length does not fit. TypeError: a dtype or device does not fit.
        """
        return self._run(input, hidden, lengths, lambda gates, c: self._pool(gates, c, column, columns))

    def _run(self, input, hidden, lengths, pool, shift=None):
        """`forward` by `pool`, with `shift [B, *]` added to the gates of every step."""
        refuse_packed(input)
        if input.dim() != 3 or input.size(-1) != self.input_size:
            raise ValueError(f"input must have shape [T, B, {self.input_size}], got {list(input.shape)}")
        c, previous = self._unpack(hidden, input)
        valid = None if lengths is None else counting_steps("lengths", lengths, input)
        if valid is not None:
            input = input.masked_fill(~valid.unsqueeze(-1), 0.0)
        if self.reverse:
            input = _flip(input, valid)
        # [window - 1 + T, B, I]
        history = input if self.window == 1 else torch.cat([previous.to(input.dtype), input])
        gates = _matmul.linear(self._windows(history), self._weight(), self.linear.bias)
        if shift is not None:
            gates = gates + shift
        if valid is not None:
            gates = self._close(gates, valid)
        h, c = pool(gates, c)
        if valid is not None:
            h = h.masked_fill(~valid.unsqueeze(-1), 0.0)  # a product would keep NaN
        state = QRNNState(c, self._last(history, valid).to(previous.dtype))
        return (_flip(h, valid) if self.reverse else h), state

    def _pool(self, gates, c, column=0, columns=None):
        T, B, _ = gates.shape
        columns = _checks.part(B, column, columns)
        if columns == B or not (self.training and self.zoneout):
            return ops.qrnn_pool(gates, c, pooling=self.pooling, zoneout=self.zoneout, training=self.training)
        # What the mask of the whole batch drops is closed beforehand.
        shape, seed = (T, columns, self.hidden_size), philox.draw_seed(gates.device)
        keep = ops.dropconnect_mask(shape, self.zoneout, seed, stream=philox.ZONEOUT)[:, column : column + B]
        z, f, *rest = gates.split(self.hidden_size, -1)
        gates = torch.cat([z, f.masked_fill(~keep, CLOSED), *rest], -1)
        return ops.qrnn_pool(gates, c, pooling=self.pooling)

    def _unpack(self, hidden, input):
        batch = input.size(1)
        none = input.new_zeros(self.window - 1, batch, self.input_size)
        if hidden is None:
            return None, none
        c, x = (hidden, none) if isinstance(hidden, Tensor) else hidden
        if isinstance(hidden, Tensor) and c.dim() == 3 and c.size(0) == 1:
            c = c.squeeze(0)
        _checks.shape("hidden.c", c, B=batch, H=self.hidden_size)
        _checks.shape("hidden.x", x, **{"window - 1": self.window - 1, "B": batch, "I": self.input_size})
        return c, x

    def _weight(self):
        if self.training and self.weight_dropout:
            return ops.dropconnect(self.linear.weight, self.weight_dropout)
        return self.linear.weight

    def _windows(self, history):
        """`[T, B, window * I]`, at each step the present input first."""
        if self.window == 1:
            return history
        steps = history.size(0) - self.window + 1
        return torch.cat([history[k : k + steps] for k in range(self.window - 1, -1, -1)], -1)

    def _close(self, gates, valid):
        """Gates that leave the cell alone where a step does not count."""
        closed = gates.new_zeros(GATES[self.pooling], self.hidden_size)
        closed[1::2] = CLOSED  # the write gates: f, and i where there is one
        return torch.where(valid.unsqueeze(-1), gates, closed.flatten())

    def _last(self, history, valid):
        """`[window - 1, B, I]`, the last inputs that count; a copy, so as not to hold the whole input in memory."""
        if valid is None:
            return history[history.size(0) - self.window + 1 :].clone()
        index = valid.sum(0) + torch.arange(self.window - 1, device=history.device).unsqueeze(1)
        return history.gather(0, index.unsqueeze(-1).expand(-1, -1, history.size(-1)))


def refuse_packed(input: Tensor) -> None:
    """Raises TypeError for packed data, of which no layer of a QRNN can take its windows."""
    if isinstance(input, PackedSequence):
        raise TypeError("input must be a tensor, got a PackedSequence: give the padded tensor and its lengths")


def _flip(x, valid):
    """`x [T, B, *]` read from its last step that counts to its first; the others stay where they are."""
    if valid is None:
        return x.flip(0)
    steps = torch.arange(x.size(0), device=x.device).unsqueeze(1)
    index = torch.where(valid, valid.sum(0) - 1 - steps, steps)
    return x.gather(0, index.unsqueeze(-1).expand_as(x))


def counting_steps(name: str, lengths: Tensor | Sequence[int], x: Tensor) -> Tensor:
    """`[T, B]`, True where a step of `x [T, B, *]` counts by `lengths`; raises where they do not fit, under `name`."""
    T, B = x.shape[:2]
    lengths = torch.as_tensor(lengths)
    if B:  # an empty list has the dtype of floating-point numbers
        _checks.ids(name, lengths)
    _checks.shape(name, lengths, B=B)
    readable = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and B and not 0 <= lengths.min() <= lengths.max() <= T:
        raise ValueError(f"{name} must lie in [0, T] = [0, {T}], got {lengths.tolist()}")
    return torch.arange(T, device=x.device).unsqueeze(1) < lengths.to(x.device)
