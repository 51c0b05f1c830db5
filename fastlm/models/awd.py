"""The AWD language model: embedding, a stack of LSTM, QRNN or GRU layers, tied decoder, and its regularisers.

Merity, Keskar and Socher, arXiv 1708.02182 and 1803.08240. Layers are separate and the last one is as wide as the
embedding when weights are tied. With y_l the raw output of layer l, D_p locked dropout, E_p embedding dropout:

    x_0 = D_input(E(tokens));   x_{l+1} = D_hidden(y_l);   hidden = D_output(y_last);   logits = hidden W^T + b
    loss = cross entropy + ar mean(hidden^2) + tar mean((raw_{t+1} - raw_t)^2)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlm import nn, ops
from fastlm.ops import _checks, _matmul

State = tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class LanguageModelConfig:
    """The shape and the regularisers of a `LanguageModel`; the defaults are those of the LSTM on the Penn Treebank.

    Attributes:
        vocab_size: V. cell: `"lstm"`, `"qrnn"` or `"gru"`. embedding_size: width of the embedding, if tied of the last
            layer. hidden_size: width of the other layers. num_layers: their number.
        tie_weights: the decoder uses the embedding's weight, undropped.
        embedding_dropout: share of words dropped. input_dropout, hidden_dropout, output_dropout: locked dropout of the
            embeddings, between layers, and of the last output.
        weight_dropout: DropConnect on the hidden-to-hidden weights; for a QRNN on its only weights.
        ar, tar: factors of the activation and temporal activation regularisers.
        window: inputs that each step of the first QRNN layer sees; the others see one.
        zoneout: of a QRNN.
        cutoffs: first ids of the tails of an `nn.AdaptiveSoftmax`; none: a plain softmax.
    """

    vocab_size: int
    cell: str = "lstm"
    embedding_size: int = 400
    hidden_size: int = 1150
    num_layers: int = 3
    tie_weights: bool = True
    embedding_dropout: float = 0.1
    input_dropout: float = 0.4
    hidden_dropout: float = 0.25
    output_dropout: float = 0.4
    weight_dropout: float = 0.5
    ar: float = 2.0
    tar: float = 1.0
    window: int = 2
    zoneout: float = 0.0
    cutoffs: tuple[int, ...] = ()

    def __post_init__(self):
        if self.cell not in ("lstm", "qrnn", "gru"):
            raise ValueError(f"cell must be 'lstm', 'qrnn' or 'gru', got {self.cell!r}")
        for name in ("vocab_size", "embedding_size", "hidden_size", "num_layers", "window"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("embedding", "input", "hidden", "output", "weight"):
            _checks.probability(f"{name}_dropout", getattr(self, f"{name}_dropout"))
        _checks.probability("zoneout", self.zoneout)
        object.__setattr__(self, "cutoffs", _checks.cutoffs(self.cutoffs, self.vocab_size))

    @property
    def output_size(self) -> int:
        """Width of the last layer."""
        return self.embedding_size if self.tie_weights else self.hidden_size


class ModelOutput(NamedTuple):
    """hidden: `[T, B, D]` after output dropout. raw: the same before it. state: for the next call."""

    hidden: Tensor
    raw: Tensor
    state: State


class LossOutput(NamedTuple):
    """loss: what to train on. nll: mean cross entropy in nats, without graph. state: for the next call."""

    loss: Tensor
    nll: Tensor
    state: State


class ScoreOutput(NamedTuple):
    """nll: `[T, B]` in nats, float32. raw: `[T, B, D]`, what the neural cache looks up. state: for the next call."""

    nll: Tensor
    raw: Tensor
    state: State


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """The state with `function` applied to each tensor."""
    return tree_map(function, state)


def detach_state(state: State) -> State:
    """The state cut from the graph: what one window of truncated backpropagation hands to the next."""
    return map_state(torch.Tensor.detach, state)


def state_columns(state: State, columns: slice) -> State:
    """The state of some of the streams."""
    return map_state(lambda t: t[..., columns, :], state)


def join_states(states: Sequence[State]) -> State:
    """The state of all streams, from those of pieces of the batch in their order."""
    return tree_map(lambda *parts: torch.cat(parts, -2), *states) if len(states) > 1 else states[0]


class LanguageModel(torch.nn.Module):
    """A recurrent language model; state in, state out.

    Args:
        config: its shape and regularisers.
        device, dtype: of the parameters.
    """

    def __init__(self, config: LanguageModelConfig, *, device=None, dtype=None):
        super().__init__()
        self.config = config
        factory = {"device": device, "dtype": dtype}
        embedding = torch.nn.Embedding(config.vocab_size, config.embedding_size, **factory)
        self.encoder = nn.EmbeddingDropout(embedding, config.embedding_dropout)
        widths = [config.embedding_size, *[config.hidden_size] * (config.num_layers - 1), config.output_size]
        self.layers = torch.nn.ModuleList(
            self._layer(index, *sizes, factory) for index, sizes in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.input_dropout = nn.LockedDropout(config.input_dropout)
        self.hidden_dropout = nn.LockedDropout(config.hidden_dropout)
        self.output_dropout = nn.LockedDropout(config.output_dropout)
        # One entry of the state dict per tensor: a tied model has no decoder weight of its own.
        weight = None if config.tie_weights else torch.empty(config.vocab_size, config.output_size, **factory)
        self.decoder_weight = None if weight is None else torch.nn.Parameter(weight)
        self.decoder_bias = torch.nn.Parameter(torch.zeros(config.vocab_size, **factory))
        self.softmax = None
        if config.cutoffs:
            sizes = (config.output_size, config.vocab_size, config.cutoffs)
            self.softmax = nn.AdaptiveSoftmax(*sizes, tied=True, **factory)
        self.reset_parameters()

    def _layer(self, index, inputs, outputs, factory):
        config = self.config
        if config.cell == "lstm":
            return nn.LSTM(inputs, outputs, weight_dropout=config.weight_dropout, **factory)
        if config.cell == "gru":
            return nn.WeightDrop(torch.nn.GRU(inputs, outputs, **factory), ["weight_hh_l0"], config.weight_dropout)
        window = config.window if index == 0 else 1
        return nn.QRNNLayer(
            inputs, outputs, window=window, zoneout=config.zoneout, weight_dropout=config.weight_dropout, **factory
        )

    def reset_parameters(self) -> None:
        """Draws embedding and decoder from U(-0.1, 0.1), biases and tails are 0; layers keep PyTorch's ways."""
        torch.nn.init.uniform_(self.encoder.embedding.weight, -0.1, 0.1)
        if self.decoder_weight is not None:
            torch.nn.init.uniform_(self.decoder_weight, -0.1, 0.1)
        torch.nn.init.zeros_(self.decoder_bias)
        if self.softmax is not None:
            self.softmax.reset_parameters()

    @property
    def output_weight(self) -> Tensor:
        """`[V, D]`, the decoder's weight: the embedding's where they are tied."""
        return self.encoder.embedding.weight if self.decoder_weight is None else self.decoder_weight

    def init_state(self, batch_size: int) -> State:
        """Zeros for `batch_size` new streams: a tuple per layer of the tensors that its cell carries."""
        like = self.decoder_bias
        state = []
        for layer in self.layers:
            if self.config.cell == "qrnn":
                cell = like.new_zeros(batch_size, layer.hidden_size)
                state.append(nn.QRNNState(cell, like.new_zeros(layer.window - 1, batch_size, layer.input_size)))
            elif self.config.cell == "gru":
                state.append((like.new_zeros(1, batch_size, layer.module.hidden_size),))
            else:
                state.append(tuple(like.new_zeros(1, batch_size, layer.hidden_size) for _ in range(2)))
        return tuple(state)

    def forward(
        self, tokens: Tensor, state: State | None = None, *, column: int = 0, columns: int | None = None
    ) -> ModelOutput:
        """Reads the next `[T, B]` tokens of B streams; new streams if there is no state.

        The streams may be a part of a batch of `columns`, from `column` on: under the same seeds (`philox.SharedSeeds`)
        all parts drop what the whole batch would drop.

        Raises:
            ValueError: `tokens` is not two-dimensional or lies outside the vocabulary (a device assertion on a GPU), or
                the state is of another batch size or cell, or the batch has not so many columns.
            TypeError: `tokens` are no ids, or a column is no integer.
        """
        _checks.ids("tokens", tokens)
        _, batch = _checks.dims("tokens", tokens, "TB")
        _checks.within("tokens", tokens, 0, self.config.vocab_size, "the vocabulary")
        columns = _checks.part(batch, column, columns)
        state = self.init_state(batch) if state is None else state
        x = self.input_dropout(self.encoder(tokens), column)
        after = []
        for index, (layer, before) in enumerate(zip(self.layers, state, strict=True)):
            if index:
                x = self.hidden_dropout(x, column)
            if self.config.cell == "gru":
                if len(before) != 1:
                    raise ValueError(f"state[{index}] must hold one tensor [1, B, H], got {len(before)}")
                _checks.shape(f"state[{index}]", before[0], layers=1, B=batch, H=layer.module.hidden_size)
                x, h = layer(x, *before)
                after.append((h,))
            else:
                part = {"column": column, "columns": columns} if self.config.cell == "qrnn" else {}
                x, s = layer(x, before, **part)
                after.append(s)
        return ModelOutput(self.output_dropout(x, column), x, tuple(after))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every word, `[..., V]`, for `hidden [..., D]`; log probabilities of a model with cutoffs."""
        if self.softmax is not None:
            return self.softmax.log_prob(hidden, self.output_weight, self.decoder_bias)
        return _matmul.linear(hidden, self.output_weight, self.decoder_bias)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: State | None = None,
        *,
        column: int = 0,
        columns: int | None = None,
    ) -> LossOutput:
        """The training loss of the next `[T, B]` tokens, whose next words are `targets [T, B]`.

        Over equal parts of a batch (see `forward`) the mean of their losses is the loss of the batch. Targets may be on
        the host: an adaptive softmax sorts them there, for less work (see `nn.AdaptiveSoftmax`).
        """
        output = self(tokens, state, column=column, columns=columns)
        nll = self._cross_entropy(output.hidden, targets, "mean")
        loss = nll
        if self.config.ar:
            loss = loss + self.config.ar * _mean_square(output.hidden)
        if self.config.tar and len(tokens) > 1:  # over one step it would be a mean over nothing
            loss = loss + self.config.tar * _mean_square(output.raw.diff(dim=0))
        return LossOutput(loss, nll.detach(), output.state)

    def score(self, tokens: Tensor, targets: Tensor, state: State | None = None) -> ScoreOutput:
        """The loss of each word of `targets [T, B]`, with no logits in memory; for evaluation, under `eval()`.

        Targets may be on the host, as in `loss`.
        """
        output = self(tokens, state)
        return ScoreOutput(self._cross_entropy(output.hidden, targets, "none"), output.raw, output.state)

    def _cross_entropy(self, hidden, targets, reduction):
        weight, bias = self.output_weight, self.decoder_bias
        if self.softmax is not None:
            return self.softmax(hidden, targets, weight, bias, reduction=reduction)
        targets = targets.to(hidden.device, non_blocking=True)
        return ops.linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction)


def _mean_square(x):
    """Mean over all elements, summed in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().mean()
