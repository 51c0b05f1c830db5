"""The plain program that runs are compared with: the same model, and the loop of awd-lstm-lm."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import PACKAGE_ROOT

from fastlm.data import load_corpus
from fastlm.models import LanguageModel
from fastlm.optim import NonMonotone
from fastlm.training import Trainer, evaluate, load_recipe

sys.path.append(str(PACKAGE_ROOT / "benchmarks"))
train_plain = pytest.importorskip("train_plain")  # an installed package has no benchmarks

SETTINGS = dict(embedding_size=12, hidden_size=16, batch_size=4, eval_batch_size=2, bptt=12, epochs=6, seed=3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sentences that a small model can learn: each word says which comes next, but for the first."""
    folder = tmp_path_factory.mktemp("text")
    chooses = torch.Generator().manual_seed(1)
    for split, lines in [("train", 200), ("valid", 60), ("test", 60)]:
        starts = torch.randint(6, (lines,), generator=chooses).tolist()
        text = "".join(" ".join(f"w{(a + i) % 6}" for i in range(5)) + "\n" for a in starts)
        (folder / f"{split}.txt").write_text(text)
    return load_corpus(folder, cache_dir=folder / "cache")


@pytest.mark.parametrize("cell", ["lstm", "qrnn"])
def test_evaluation_is_that_of_the_package(corpus, cell):
    recipe = load_recipe("ptb-lstm-small", {**SETTINGS, "cell": cell})
    config = recipe.model_config(len(corpus.vocabulary))
    ours, plain = LanguageModel(config), train_plain.PlainAWD(config)
    with torch.no_grad():
        for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            theirs.copy_(mine)
    wanted = evaluate(ours, corpus.valid, 2, 12).nll
    assert train_plain.evaluate(plain, corpus.valid, 2, 12) == pytest.approx(wanted, rel=1e-5)
    assert plain.training


@pytest.mark.parametrize("optimizer", [dict(optimizer="sgd", lr=5.0), dict(optimizer="adam", lr=0.01)])
def test_both_programs_make_the_same_steps(corpus, tmp_path, optimizer):
    """From the same weights, with nothing drawn at random."""
    bare = dict.fromkeys(
        ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout"), 0
    )
    settings = {**SETTINGS, **bare, **optimizer, "variable_bptt": False, "epochs": 3, "when": [1], "ar": 0.5}
    recipe, rows = load_recipe("ptb-lstm-small", settings), []
    trainer = Trainer(tmp_path / "run", recipe, corpus)
    model = train_plain.PlainAWD(recipe.model_config(len(corpus.vocabulary)))
    with torch.no_grad():
        for mine, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    found = train_plain.train(recipe, corpus, rows.append, model)
    test = trainer.fit()
    assert test.nll == pytest.approx(found["test_nll"], rel=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [(line["loss"], line["valid_nll"]) for line in lines if line["event"] == "epoch"]
    assert ours == [pytest.approx((row["train_nll"], row["valid_nll"]), rel=1e-4) for row in rows]
    assert rows[-1]["valid_nll"] < rows[0]["valid_nll"]


@pytest.mark.parametrize("nonmono, first", [(0, 3), (1, 4), (5, None)])
def test_averaging_starts_where_the_losses_say(corpus, monkeypatch, nonmono, first):
    losses, rows, trigger, switched = [3.0, 3.5, 3.2, 2.9, 3.1, 2.8], [], NonMonotone(nonmono), False
    scores = iter([*losses, 2.7])
    monkeypatch.setattr(train_plain, "evaluate", lambda *_: next(scores))
    train_plain.train(load_recipe("ptb-lstm-small", {**SETTINGS, "nonmono": nonmono}), corpus, rows.append)
    assert [row["valid_nll"] for row in rows] == losses
    for row in rows:
        assert row["averaging"] == switched
        switched = switched or trigger.observe(row["valid_nll"])
    assert next((row["epoch"] for row in rows if row["averaging"]), None) == first


def test_a_run_that_was_stopped_goes_on(corpus, tmp_path, monkeypatch):
    recipe = load_recipe("ptb-lstm-small", {**SETTINGS, "nonmono": 0, "epochs": 4})
    evaluate, rows = train_plain.evaluate, []
    monkeypatch.setattr(train_plain, "evaluate", lambda *args: evaluate(*args) + len(rows))  # worse at every epoch
    wanted = train_plain.train(recipe, corpus, rows.append)
    straight, rows = rows, []
    for epochs in (3, 4):
        rows.clear()  # of which it tells again
        found = train_plain.train(replace(recipe, epochs=epochs), corpus, rows.append, checkpoint=tmp_path / "run.pt")
    assert straight[2]["averaging"] and rows == straight
    assert {**found, "seconds": 0} == {**wanted, "seconds": 0}
    for other in ({"lr": 20.0}, {"seed": 7}, {"embedding_size": 14}):
        with pytest.raises(ValueError, match="run.pt is of another recipe or text: delete it, or give another --out"):
            train_plain.train(replace(recipe, **other), corpus, rows.append, checkpoint=tmp_path / "run.pt")


def test_a_run_that_was_killed_tells_of_each_epoch_once(corpus, tmp_path, monkeypatch):
    recipe, rows, save = load_recipe("ptb-lstm-small", {**SETTINGS, "epochs": 3}), [], torch.save
    with monkeypatch.context() as m:
        m.setattr(torch, "save", lambda state, path: save(state, path) if not rows else pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            train_plain.train(recipe, corpus, rows.append, checkpoint=tmp_path / "run.pt")
    rows.clear()
    train_plain.train(recipe, corpus, rows.append, checkpoint=tmp_path / "run.pt")
    assert [row["epoch"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize(
    "changes",
    [{"cell": "gru"}, {"optimizer": "asgd"}, {"tie_weights": False}, {"cutoffs": [3]}, {"precision": "bfloat16"}],
)
def test_what_the_loop_does_not_know_is_refused(corpus, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        train_plain.train(load_recipe("ptb-lstm-small", {**SETTINGS, **changes}), corpus, list().append)


def test_picture_of_both():
    pytest.importorskip("matplotlib")
    rows = [{"epoch": i, "valid_nll": 6 - i, "valid_ppl": 300 / i, "averaging": i > 2} for i in (1, 2, 3)]
    picture = train_plain.draw({"epochs": rows}, {"recipe": "small", "stages": {"base": {"curve": rows}}})
    assert picture.startswith(b"\x89PNG")
