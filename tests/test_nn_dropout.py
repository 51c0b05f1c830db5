"""Locked and embedding dropout."""

import copy

import pytest
import torch

from fastlm import nn
from fastlm.ops import dropconnect_mask, philox


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_locked_dropout_holds_over_time_and_differs_over_rows(dtype):
    dropout, x = nn.LockedDropout(0.3), torch.randn(6, 5, 80, dtype=dtype, requires_grad=True)
    torch.manual_seed(1)
    y = dropout(x)
    torch.manual_seed(1)
    mask = dropconnect_mask((1, 5, 80), 0.3, philox.draw_seed("cpu"), stream=philox.LOCKED)
    assert torch.equal(y, x * (mask.to(dtype) / 0.7))
    assert y.dtype == dtype and not torch.equal(mask[0, 0], mask[0, 1])
    y.sum().backward()
    assert torch.equal(x.grad != 0, mask.expand(6, 5, 80))
    assert not torch.equal(dropout(x), y)


def test_locked_dropout_does_nothing_when_there_is_nothing_to_do():
    x, state = torch.randn(2, 3, 4), torch.get_rng_state()
    assert nn.LockedDropout(0.0)(x) is x and nn.LockedDropout(0.5).eval()(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    assert not nn.LockedDropout(1.0)(x).any()
    assert nn.LockedDropout(0.5)(torch.randn(0, 3, 4)).shape == (0, 3, 4)
    with pytest.raises(ValueError, match=r"x must have shape \[T, B, H\], got \[3, 4\]"):
        nn.LockedDropout(0.5)(x[0])
    with pytest.raises(ValueError, match="p must lie in"):
        nn.LockedDropout(-0.1)


def test_embedding_dropout_drops_whole_words_everywhere():
    dropout = nn.EmbeddingDropout(torch.nn.Embedding(50, 7), 0.4)
    ids = torch.randint(50, (9, 11))
    torch.manual_seed(1)
    y = dropout(ids)
    torch.manual_seed(1)
    mask = dropconnect_mask((50,), 0.4, philox.draw_seed("cpu"), stream=philox.EMBEDDING)
    weight = dropout.embedding.weight
    torch.testing.assert_close(y, (weight * (mask / 0.6).unsqueeze(1))[ids])
    y.sum().backward()
    seen = torch.zeros(50, dtype=torch.bool).index_fill(0, ids.flatten(), True)
    assert torch.equal(weight.grad.any(1), seen & mask)
    assert not torch.equal(dropout(ids), y)
    assert torch.equal(dropout.eval()(ids), weight[ids])


def test_the_last_word_learns():
    """The old code passed padding_idx = -1 for none, which today names the last row: it never learned."""
    dropout = nn.EmbeddingDropout(torch.nn.Embedding(5, 3), 0.5)
    for _ in range(20):
        dropout(torch.tensor([[4]])).sum().backward()
    assert dropout.embedding.weight.grad[4].all() and not dropout.embedding.weight.grad[:4].any()


def test_settings_of_the_embedding_stay():
    dropout = nn.EmbeddingDropout(torch.nn.Embedding(5, 3, padding_idx=1), 0.5)
    for _ in range(20):
        dropout(torch.tensor([1, 2])).sum().backward()
    assert not dropout.embedding.weight.grad[1].any() and dropout.embedding.weight.grad[2].all()
    with pytest.raises(ValueError, match="p must lie in"):
        nn.EmbeddingDropout(torch.nn.Embedding(5, 3), 1.1)
    for id in (-1, 5):
        with pytest.raises(ValueError, match=rf"ids must lie in \[0, 5\), the vocabulary, got {id}"):
            dropout(torch.tensor([[2, id]], dtype=torch.int32))
    assert dropout(torch.tensor([], dtype=torch.int64)).shape == (0, 3)


def with_a_hook(embedding):
    embedding.register_forward_hook(lambda module, args, out: 2 * out)
    return embedding


class Doubled(torch.nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


def doubled_weight(embedding):
    class Double(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(embedding, "weight", Double())
    return embedding


@pytest.mark.parametrize(
    "embedding",
    [
        torch.nn.Embedding(50, 7, max_norm=0.5),
        torch.nn.Embedding(50, 7, sparse=True),
        torch.nn.Embedding(50, 7, scale_grad_by_freq=True),
        with_a_hook(torch.nn.Embedding(50, 7)),
        Doubled(50, 7),
        doubled_weight(torch.nn.Embedding(50, 7)),
    ],
    ids=["max_norm", "sparse", "scale_grad_by_freq", "hook", "subclass", "parametrized"],
)
def test_what_else_an_embedding_does_stays(embedding):
    ids, dropout = torch.randint(50, (9, 11)), nn.EmbeddingDropout(embedding, 0.4)
    torch.manual_seed(1)
    y = dropout(ids)
    (gradient,) = torch.autograd.grad(y.sum(), list(embedding.parameters()))
    torch.manual_seed(1)
    mask = dropconnect_mask((50,), 0.4, philox.draw_seed("cpu"), stream=philox.EMBEDDING)
    expected = embedding(ids) * (mask / 0.6)[ids].unsqueeze(-1)
    (wanted,) = torch.autograd.grad(expected.sum(), list(embedding.parameters()))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradient.to_dense(), wanted.to_dense())
    assert gradient.is_sparse == embedding.sparse


def test_compile_and_copies():
    modules = torch.nn.Sequential(nn.EmbeddingDropout(torch.nn.Embedding(9, 4), 0.3), nn.LockedDropout(0.3))
    ids = torch.randint(9, (5, 3))
    modules(ids)
    compiled = torch.compile(copy.deepcopy(modules), fullgraph=True, backend="aot_eager")
    first = compiled(ids)
    first.sum().backward()
    assert not torch.equal(compiled(ids), first)
    assert torch.equal(compiled.eval()(ids), modules.eval()(ids))
