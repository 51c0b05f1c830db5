"""The regularisers of the AWD-LSTM as modules: locked, embedding and weight dropout.

Merity, Keskar and Socher, arXiv 1708.02182, section 4; every mask is a Philox mask whose seed is drawn from
PyTorch's default generator at each training call.
"""

import contextlib
from collections.abc import Iterable
from operator import attrgetter

import torch
from torch import Tensor
from torch.func import functional_call

from fastlm import ops
from fastlm.ops import _checks, philox


class LockedDropout(torch.nn.Module):
    """Dropout with one mask `[1, B, H]` for all steps of `[T, B, H]`, fresh at each call.

    Gal and Ghahramani, arXiv 1512.05287. Each row of the batch has its own mask.

    Args:
        p: probability that an element is dropped, in [0, 1]; the rest is scaled by 1 / (1 - p).
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = _checks.probability("p", p)

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, x: Tensor, column: int = 0) -> Tensor:
        """Drops elements of `[T, B, H]`; `column` is the place of its first row in the batch that it is a part of."""
        return ops.locked_dropout(x, self.p, offset=column * x.shape[-1]) if self.training and self.p else x


class EmbeddingDropout(torch.nn.Module):
    """An embedding that drops whole words: one mask `[V]` per call, applied to the rows looked up.

    A dropped word is zero wherever it stands in the call. The embedding itself is untouched, so tied
    output weights see it undropped, and every row that is looked up learns.

    Args:
        embedding: the `torch.nn.Embedding`, used with all its settings.
        p: probability that a word is dropped, in [0, 1]; the rest is scaled by 1 / (1 - p).
    """

    def __init__(self, embedding: torch.nn.Embedding, p: float):
        super().__init__()
        self.embedding = embedding
        self.p = _checks.probability("p", p)

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, ids: Tensor) -> Tensor:
        """Looks up `ids` of any shape `[...]`; returns `[..., E]`.

        Raises:
            ValueError: ids outside the vocabulary (a device assertion on a GPU).
        """
        embedding, dropping = self.embedding, self.training and self.p > 0
        if dropping and _only_looks_up(embedding):
            return ops.embedding_dropout(embedding.weight, ids, self.p, padding_idx=embedding.padding_idx)
        _checks.within("ids", ids, 0, embedding.num_embeddings, "the vocabulary")
        rows = embedding(ids)
        if not dropping:
            return rows
        seed = philox.draw_seed(rows.device)
        mask = ops.dropconnect_mask((embedding.num_embeddings,), self.p, seed, stream=philox.EMBEDDING)
        return rows * (mask.to(rows.dtype) * philox.scale(self.p))[ids].unsqueeze(-1)


def _only_looks_up(embedding: torch.nn.Embedding) -> bool:
    """Whether a call is a lookup with a dense gradient and nothing else: no setting, subclass or hook adds to it."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return (
        type(embedding) is torch.nn.Embedding
        and embedding.max_norm is None
        and not (embedding.sparse or embedding.scale_grad_by_freq)
        and not any(getattr(embedding, name) for name in hooks)
    )


class WeightDrop(torch.nn.Module):
    """Any module with DropConnect on the weights named.

    The raw weights stay the only parameters, under their own names; the dropped ones are computed inside
    `forward`, one mask per weight and call, and passed to the module for that call alone. In evaluation,
    or with p = 0, the module runs as it is.

    Args:
        module: the module to wrap.
        names: names of its parameters, dotted for those of submodules.
        p: probability that an element is dropped, in [0, 1]; the rest is scaled by 1 / (1 - p).

    Raises:
        ValueError: a name is not a parameter of the module, or `p` is out of range.
    """

    def __init__(self, module: torch.nn.Module, names: Iterable[str], p: float):
        super().__init__()
        self.module = module
        self.names = [names] if isinstance(names, str) else list(names)
        self.p = _checks.probability("p", p)
        known = dict(module.named_parameters())
        for name in self.names:
            if name not in known:
                raise ValueError(f"names must be parameters ({', '.join(known)}), got {name!r}")

    def extra_repr(self) -> str:
        return f"{', '.join(self.names)}, p={self.p}"

    def forward(self, *args, **kwargs):
        dropped = {}
        if self.training and self.p:
            dropped = {name: ops.dropconnect(attrgetter(name)(self.module), self.p) for name in self.names}
        with _flat_weights(self.module, dropped):
            return functional_call(self.module, dropped, args, kwargs)


@contextlib.contextmanager
def _flat_weights(module, tensors):
    """For the length of a call, give PyTorch's recurrent layers the tensors in the list that they really read.

    They keep a second list of their weights, which `functional_call` does not know: without this the dropped
    weights would be ignored in silence.
    """
    saved = []
    for prefix, layer in module.named_modules():
        if isinstance(layer, torch.nn.RNNBase):
            saved.append((layer, layer._flat_weights))
            dot = prefix and prefix + "."
            layer._flat_weights = [tensors.get(dot + name, getattr(layer, name)) for name in layer._flat_weights_names]
    try:
        yield
    finally:
        for layer, weights in saved:
            layer._flat_weights = weights
