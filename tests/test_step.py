"""The training step: pieces of the batch."""

import pytest
import torch
from tiny_run import SMALL

from fastlm.errors import RecipeError
from fastlm.models import LanguageModel
from fastlm.training.parallel import Ranks
from fastlm.training.recipe import make_recipe
from fastlm.training.step import TrainStep, make_optimizer

WORDS = 30


def make(**changes):
    """A step and its model, the same at every call, with all dropouts unless told otherwise."""
    recipe = make_recipe({**SMALL, **changes})
    torch.manual_seed(recipe.seed)
    model = LanguageModel(recipe.model_config(WORDS))
    return TrainStep(recipe, model, make_optimizer(recipe, model), Ranks())


def run(step, lengths=(7, 4, 1, 7)):
    """The losses and the last state of windows of random words, under the same masks at every call."""
    torch.manual_seed(2)
    words, state, losses = torch.Generator().manual_seed(1), None, []
    for length in lengths:
        inputs, targets = torch.randint(WORDS, (2, length, step.recipe.batch_size), generator=words)
        nll, state = step(inputs, targets, state, 1.0, length / 7)
        losses.append(nll)
    return torch.stack(losses), state


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cell", ["lstm", "qrnn", "gru"])
def test_pieces_make_the_step_of_the_whole_batch(cell):
    whole, pieces = make(cell=cell), make(cell=cell, accumulate=2)
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
        lambda model, inputs, *args, column: (
            seen.append((inputs.shape[1], column)),
            loss(model, inputs, *args, column=column),
        )[1],
    )
    run(step, [5])
    assert seen == [(1, 0), (1, 1), (1, 2), (1, 3)]


def test_pieces_must_be_equal():
    with pytest.raises(RecipeError, match="accumulate must divide the 4 columns of each rank, got 3"):
        make(accumulate=3)
    with pytest.raises(RecipeError, match="accumulate must be at least 1, got 0"):
        make(accumulate=0)
