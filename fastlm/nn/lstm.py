"""`torch.nn.LSTM` with weight dropout: the same constructor, inputs, outputs and state dict."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastlm import ops
from fastlm.ops import _checks, philox


class LSTM(torch.nn.Module):
    """A drop-in for `torch.nn.LSTM` that can drop hidden-to-hidden weights.

    In training each layer and direction draws one DropConnect mask per call, for the whole sequence and
    batch (Merity, Keskar and Socher, arXiv 1708.02182). The masked weight exists only inside `forward`:
    `weight_hh_l0` and its kin stay the only parameters, under PyTorch's names, so state dicts go both ways.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype:
            as in `torch.nn.LSTM`, with the same initial values under the same seed.
        proj_size: must be 0.
        weight_dropout: probability that an element of a hidden-to-hidden weight is dropped, in [0, 1].

    Raises:
        ValueError: a size is not positive, a probability is out of range, or `proj_size` is not 0.
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
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
        weight_dropout: float = 0.0,
    ):
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if size <= 0:
                raise ValueError(f"{name} must be positive, got {size}")
        if proj_size:
            raise ValueError(f"proj_size must be 0, got {proj_size}: this layer has no projections")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = _checks.probability("dropout", dropout)
        self.bidirectional = bidirectional
        self.proj_size = 0
        self.weight_dropout = _checks.probability("weight_dropout", weight_dropout)

        for layer, suffix in self._cells():
            inputs = input_size if layer == 0 else hidden_size * self._directions
            shapes = {"weight_ih": (4 * hidden_size, inputs), "weight_hh": (4 * hidden_size, hidden_size)}
            if bias:
                shapes |= {"bias_ih": (4 * hidden_size,), "bias_hh": (4 * hidden_size,)}
            for name, shape in shapes.items():
                parameter = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(f"{name}_l{layer}{suffix}", parameter)
        self.reset_parameters()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _cells(self):
        """(layer, suffix) of every layer and direction, in the order of PyTorch's parameters and states."""
        return itertools.product(range(self.num_layers), ("", "_reverse")[: self._directions])

    def reset_parameters(self) -> None:
        """Draws every parameter from U(-1/sqrt(H), 1/sqrt(H)), as `torch.nn.LSTM` does."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def flatten_parameters(self) -> None:
        """Does nothing: present because code written for `torch.nn.LSTM` calls it."""

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
            "weight_dropout": 0.0,
        }
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Runs the stack.

        Args:
            input: `[T, B, I]`, `[B, T, I]` when `batch_first`, `[T, I]` without batch, or a `PackedSequence`.
            hx: `(h, c)`, each `[L * directions, B, H]` (`[L * directions, H]` without batch), zeros if absent.
                Float32 states are welcome with 16-bit inputs.

        Returns:
            `(output, (h_n, c_n))` in the form of the input; states in the dtype of `hx`, else of the input.

        Raises:
            ValueError: a shape does not fit, or `hx` is no pair.
            TypeError: a dtype or device does not fit.
        """
        if hx is not None and len(hx) != 2:
            raise ValueError(f"hx must be a pair (h_0, c_0), got {len(hx)} tensors")
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() == 2:
            # [T, I] is a batch of one, wherever the batch dimension stands
            x = input.unsqueeze(1)
            hx = None if hx is None else tuple(s.unsqueeze(1) for s in hx)
            y, state = self._stack(x, hx, x.size(1))
            return y.squeeze(1), tuple(s.squeeze(1) for s in state)
        if input.dim() != 3:
            raise ValueError(f"input must have 2 or 3 dimensions, got {input.dim()}")
        x = input.transpose(0, 1) if self.batch_first else input
        y, state = self._stack(x, hx, x.size(1))
        return (y.transpose(0, 1) if self.batch_first else y), state

    def _forward_packed(self, input, hx):
        sizes = input.batch_sizes.tolist()
        if hx is not None and input.sorted_indices is not None:
            hx = tuple(s.index_select(1, input.sorted_indices) for s in hx)
        y, state = self._stack(input.data, hx, sizes[0], sizes)
        if input.unsorted_indices is not None:
            state = tuple(s.index_select(1, input.unsorted_indices) for s in state)
        return PackedSequence(y, input.batch_sizes, input.sorted_indices, input.unsorted_indices), state

    def _stack(self, x, hx, batch, sizes=None):
        """All layers over `x`, `[T, B, I]` or packed rows `[rows, I]` with the batch size of each step."""
        if x.size(-1) != self.input_size:
            raise ValueError(f"input must have {self.input_size} features (input_size), got {x.size(-1)}")
        cells = self.num_layers * self._directions
        if hx is None:
            hx = x.new_zeros(2, cells, batch, self.hidden_size).unbind(0)
        for name, s in zip(("h_0", "c_0"), hx, strict=True):
            _checks.shape(name, s, layers=cells, B=batch, H=self.hidden_size)
        h0, c0 = (s.unbind(0) for s in hx)
        h_n, c_n, outputs = [], [], []
        for index, (layer, suffix) in enumerate(self._cells()):
            cell = self._cell(layer, suffix)
            if sizes is None:
                y, h, c = cell(x, h0[index], c0[index])
            else:
                y, h, c = _packed(cell, x, sizes, h0[index], c0[index], reverse=suffix == "_reverse")
            outputs.append(y)
            h_n.append(h)
            c_n.append(c)
            if len(outputs) == self._directions:
                x = torch.cat(outputs, -1) if self.bidirectional else y
                outputs = []
                if self.dropout and layer < self.num_layers - 1:
                    x = F.dropout(x, self.dropout, self.training)
        return x, (torch.stack(h_n), torch.stack(c_n))

    def _cell(self, layer, suffix):
        """`ops.lstm` bound to one layer and direction, with a seed of this call."""
        w_ih, w_hh, b_ih, b_hh = (
            getattr(self, f"{name}_l{layer}{suffix}", None) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        p = self.weight_dropout if self.training else 0.0
        seed = philox.draw_seed(w_hh.device) if p else None

        def cell(x, h, c):
            reverse = suffix == "_reverse"
            return ops.lstm(x, h, c, w_ih, w_hh, b_ih, b_hh, weight_dropout=p, seed=seed, reverse=reverse)

        return cell


def _packed(cell, data, sizes, h0, c0, reverse):
    """One cell over packed rows: steps of equal batch size form a dense block, and the state passes on.

    Read forwards the batch shrinks, and rows that end leave their state behind; read backwards it grows,
    and rows that begin bring their initial state.
    """
    blocks = [(size, len(list(steps))) for size, steps in itertools.groupby(sizes)]
    chunks = [
        chunk.view(steps, size, -1)
        for chunk, (size, steps) in zip(data.split([s * n for s, n in blocks]), blocks, strict=True)
    ]
    h, c = (h0[:0], c0[:0]) if reverse else (h0, c0)
    outputs, ended = [], []
    for chunk in reversed(chunks) if reverse else chunks:
        size, held = chunk.size(1), h.size(0)
        if size > held:
            h, c = torch.cat([h, h0[held:size]]), torch.cat([c, c0[held:size]])
        elif size < held:
            ended.append((h[size:], c[size:]))
            h, c = h[:size], c[:size]
        y, h, c = cell(chunk, h, c)
        outputs.append(y.flatten(0, 1))
    h, c = (torch.cat(rows) for rows in zip((h, c), *reversed(ended), strict=True))
    return torch.cat(outputs[::-1] if reverse else outputs), h, c
