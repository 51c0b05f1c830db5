"""The training step: pieces of the batch."""

import pytest
import torch
from tiny_run import SMALL

from fastlm.data import Corpus, Vocabulary
from fastlm.errors import RecipeError
from fastlm.models import LanguageModel
from fastlm.training.parallel import Ranks
from fastlm.training.recipe import make_recipe
from fastlm.training.step import TrainStep, make_optimizer
from fastlm.training.trainer import Trainer

WORDS = 30


def make(device="cpu", **changes):
    """A step and its model, the same at every call, with all dropouts unless told otherwise."""
    recipe = make_recipe({**SMALL, **changes})
    torch.manual_seed(recipe.seed)
    model = LanguageModel(recipe.model_config(WORDS)).to(device)
    return TrainStep(recipe, model, make_optimizer(recipe, model), Ranks())


def run(step, lengths=(7, 4, 1, 7)):
    """The losses and the last state of windows of random words, under the same masks at every call."""
    torch.manual_seed(2)
    device = next(step.model.parameters()).device
    words, state, losses = torch.Generator().manual_seed(1), None, []
    for length in lengths:
        window = torch.randint(WORDS, (2, length, step.recipe.batch_size), generator=words)
        nll, state = step(window[0].to(device), window[1], state, 1.0, length / 7)
        losses.append(nll.item())
    return torch.tensor(losses), state


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{}, {"cell": "qrnn", "zoneout": 0.4}, {"cell": "gru"}, {"cutoffs": [9, 20]}], ids=str
)
def test_pieces_make_the_step_of_the_whole_batch(changes):
    whole, pieces = make(**changes), make(**changes, accumulate=2)
    (nll, state), (others, other) = run(whole), run(pieces)
    close(others, nll)
    close(list(other), list(state))
    close(list(pieces.model.parameters()), list(whole.model.parameters()))
    close([p.grad for p in pieces.model.parameters()], [p.grad for p in whole.model.parameters()])


def test_pieces_are_computed_one_after_the_other(monkeypatch):
    step, loss, seen = make(accumulate=4), LanguageModel.loss, []
    monkeypatch.setattr(
        LanguageModel,
        "loss",
        lambda model, inputs, *args, **place: (
            seen.append((inputs.shape[1], *place.values())),
            loss(model, inputs, *args, **place),
        )[1],
    )
    run(step, [5])
    assert seen == [(1, 0, 4), (1, 1, 4), (1, 2, 4), (1, 3, 4)]


def test_pieces_must_be_equal():
    with pytest.raises(RecipeError, match="accumulate must divide the 4 columns of each rank, got 3"):
        make(accumulate=3)
    with pytest.raises(RecipeError, match="accumulate must be at least 1, got 0"):
        make(accumulate=0)


def test_bfloat16_is_the_precision_of_the_products_alone():
    step, dtypes = make(precision="bfloat16"), []
    step.model.layers[0].register_forward_hook(lambda _, inputs, output: dtypes.append(output[0].dtype))
    nll, state = run(step)
    assert set(dtypes) == {torch.bfloat16} and nll.dtype == torch.float32
    kept = [*step.model.parameters(), *(p.grad for p in step.model.parameters()), *(t for s in state for t in s)]
    assert {t.dtype for t in kept} == {torch.float32}
    exact, _ = run(make())
    assert not torch.equal(nll, exact)
    torch.testing.assert_close(nll, exact, rtol=0.01, atol=0)


@pytest.fixture(scope="module")
def following():
    """A text in which four words may follow each, out of thirty: perplexity 4 at best, 30 for what learns nothing."""
    random = torch.Generator().manual_seed(0)
    ids = [0]
    for step in torch.randint(4, (9000,), generator=random).tolist():
        ids.append((ids[-1] * 7 + step) % WORDS)
    ids = torch.tensor(ids)
    vocabulary = Vocabulary(map(str, range(WORDS)))
    return Corpus("following", "word", vocabulary, ids[:8000], ids[8000:8500], ids[8500:], "following")


@pytest.mark.parametrize("cell", ["lstm", "qrnn"])
def test_bfloat16_reaches_the_perplexity_of_float32(tmp_path, following, cell):
    changes = {"optimizer": "adam", "lr": 0.02, "embedding_size": 32, "num_layers": 1, "batch_size": 16, "when": [2]}
    dropouts = dict.fromkeys(("input_dropout", "output_dropout", "weight_dropout"), 0.1)
    changes |= {**dropouts, "embedding_dropout": 0, "ar": 0.1, "tar": 0.1, "cell": cell, "log_interval": 1000}
    found = []
    for precision in ("float32", "bfloat16"):
        recipe = make_recipe({**SMALL, **changes, "precision": precision})
        trainer = Trainer(tmp_path / precision, recipe, following)
        trainer.fit()
        found.append(trainer.best.ppl)
    assert found[0] < 6 and found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.02)
