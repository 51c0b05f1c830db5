"""The AWD language model and its training step, operator by operator, as a user of today's PyTorch writes them.

The structure is that of awd-lstm-lm and torchqrnn: `nn.LSTM` layers whose recurrent weight goes through `F.dropout`
before every window, QRNN layers with a Python loop over time, locked dropout and embedding dropout with masks of their
own, all logits in memory, AR and TAR, gradient clipping, SGD. The masks are drawn by PyTorch's generator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastlm.models import LanguageModelConfig


class PlainAWD(nn.Module):
    """The model that a `LanguageModelConfig` describes, with weights tied."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.config = config
        widths = [config.embedding_size, *[config.hidden_size] * (config.num_layers - 1), config.embedding_size]
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        layers = []
        for i, (inner, outer) in enumerate(zip(widths, widths[1:], strict=False)):
            seen = 1 if i else config.window
            layers.append(nn.LSTM(inner, outer) if config.cell == "lstm" else nn.Linear(inner * seen, 3 * outer))
        self.layers = nn.ModuleList(layers)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def start(self, batch: int) -> list[tuple[Tensor, ...]]:
        """The state before the first window: (h, c) of an LSTM, (c, last input) of a QRNN."""
        state = []
        for layer in self.layers:
            if self.config.cell == "lstm":
                state.append(tuple(self.bias.new_zeros(1, batch, layer.hidden_size) for _ in range(2)))
            else:
                sizes = layer.out_features // 3, self.config.embedding_size
                state.append(tuple(self.bias.new_zeros(batch, size) for size in sizes))
        return state

    def loss(self, tokens: Tensor, targets: Tensor, state: list[tuple[Tensor, ...]]):
        """What to train on, with AR and TAR; the cross entropy alone; the state for the next window."""
        nll, raw, dropped, after = self._run(tokens, targets, state)
        loss = nll + self.config.ar * dropped.pow(2).mean() + self.config.tar * (raw[1:] - raw[:-1]).pow(2).mean()
        return loss, nll.detach(), after

    def _run(self, tokens, targets, state):
        """Cross entropy, the last layer's output before and after its dropout, the state for the next window."""
        config, after = self.config, []
        x = self._locked(self._embed(tokens), config.input_dropout)
        for i, (layer, before) in enumerate(zip(self.layers, state, strict=True)):
            x = self._locked(x, config.hidden_dropout) if i else x
            x, kept = (self._lstm if config.cell == "lstm" else self._qrnn)(layer, x, before, i == 0)
            after.append(tuple(s.detach() for s in kept))
        dropped = self._locked(x, config.output_dropout)
        logits = F.linear(dropped.flatten(0, 1), self.embedding.weight, self.bias)
        return F.cross_entropy(logits, targets.flatten()), x, dropped, after

    def _locked(self, x: Tensor, p: float) -> Tensor:
        """One mask [1, B, H] for all steps."""
        if not (p and self.training):
            return x
        return x * x.new_empty(1, *x.shape[1:]).bernoulli_(1 - p).div_(1 - p).expand_as(x)

    def _embed(self, tokens: Tensor) -> Tensor:
        weight, p = self.embedding.weight, self.config.embedding_dropout
        if p and self.training:
            weight = weight.new_empty(len(weight), 1).bernoulli_(1 - p).div_(1 - p) * weight
        return F.embedding(tokens, weight)

    def _lstm(self, layer, x, before, first):
        weight = F.dropout(layer.weight_hh_l0, self.config.weight_dropout, self.training)
        return functional_call(layer, {"weight_hh_l0": weight}, (x, before))

    def _qrnn(self, layer, x, before, first):
        c, last = before
        source = torch.cat([x, torch.cat([last[None].to(x.dtype), x[:-1]])], 2) if first else x
        weight = F.dropout(layer.weight, self.config.weight_dropout, self.training)
        z, f, o = F.linear(source, weight, layer.bias).chunk(3, 2)
        z, f, o = z.tanh(), f.sigmoid(), o.sigmoid()
        states = []
        for new, write in zip((f * z).unbind(0), f.unbind(0), strict=True):
            c = new + (1 - write) * c
            states.append(c)
        return o * torch.stack(states), (c, x[-1] if first else last)
