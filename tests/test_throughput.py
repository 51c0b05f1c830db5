"""The ceiling that a run is measured against."""

import json

import pytest
import torch
from test_trainer import recipe
from tiny_run import write_text

from fastlm.data import load_corpus
from fastlm.models import LanguageModel, LanguageModelConfig
from fastlm.training import throughput
from fastlm.training.parallel import Ranks
from fastlm.training.throughput import Ceiling, find_ceiling, multiplied_weights, product_flops
from fastlm.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, 4 * (1150 * (400 + 1150) + 1150 * (1150 + 1150) + 400 * (1150 + 400)) + 10_000 * 400),
        (
            {"cell": "qrnn", "hidden_size": 1550, "num_layers": 4},
            3 * (1550 * 2 * 400 + 2 * 1550 * 1550 + 400 * 1550) + 10_000 * 400,
        ),
        ({"num_layers": 1, "cutoffs": (2800, 5000)}, 4 * 400 * (400 + 400) + (2800 + 2) * 400),
        ({"cell": "gru", "tie_weights": False, "num_layers": 1}, 3 * 1150 * (400 + 1150) + 10_000 * 1150),
    ],
)
def test_weights_that_a_token_is_multiplied_by(options, weights):
    assert multiplied_weights(LanguageModel(LanguageModelConfig(10_000, **options), device="meta")) == weights


def test_products_are_timed_and_random_numbers_left_alone(monkeypatch):
    monkeypatch.setitem(throughput.SIZES, "cpu", 128)
    monkeypatch.setattr(throughput, "SECONDS", 0.01)
    before = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e6 < product_flops(CPU, dtype) < 1e14
    assert torch.equal(torch.get_rng_state(), before)


def test_the_best_call_counts(monkeypatch):
    monkeypatch.setitem(throughput.SIZES, "cpu", 100)
    monkeypatch.setattr(throughput, "SECONDS", 0.0)
    times = iter([0.5, 0.1, 0.2])
    monkeypatch.setattr(throughput, "_seconds", lambda *_: next(times))
    assert product_flops(CPU, torch.float32) == pytest.approx(2 * 100**3 / 0.1)


def test_a_small_model_is_not_measured_and_ranks_are_added_up(monkeypatch):
    monkeypatch.setattr(throughput, "product_flops", lambda *_: 1e9)
    model = LanguageModel(LanguageModelConfig(100, embedding_size=8, hidden_size=9), device="meta")
    assert find_ceiling(model, CPU, torch.float32, Ranks()) is None
    monkeypatch.setattr(throughput, "LEAST", 1)
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [3 * value, value])  # rank 0 has a faster machine
    assert find_ceiling(model, CPU, torch.float32, Ranks(1, 2)) == Ceiling(6 * multiplied_weights(model), 4e9)


def test_words():
    assert Ceiling(25_000_000, 221.4e9).words(6315) == "71% of the 221 GFLOP/s that the machine multiplies at"
    assert Ceiling(10**9, 791.26e12).words(395_630) == "50% of the 791.3 TFLOP/s that the machine multiplies at"


def test_epochs_and_results_say_the_share(tmp_path, monkeypatch, capsys):
    corpus = load_corpus(write_text(tmp_path / "text"), cache_dir=tmp_path / "cache")
    Trainer(tmp_path / "a", recipe(epochs=1), corpus).fit()
    assert "FLOP/s" not in capsys.readouterr().err
    monkeypatch.setattr(throughput, "LEAST", 1)
    monkeypatch.setattr(throughput, "product_flops", lambda *_: 1e9)
    trainer = Trainer(tmp_path / "b", recipe(epochs=1), corpus)
    trainer.fit()
    assert "% of the 1 GFLOP/s that the machine multiplies at | " in capsys.readouterr().err
    a, b = (json.loads((tmp_path / run / "results.json").read_text()) for run in "ab")
    assert "share_of_ceiling" not in a and b["ceiling_flops"] == 1e9
    flops = 6 * multiplied_weights(trainer.model) * b["tokens_per_second"]
    assert b["share_of_ceiling"] == pytest.approx(flops / 1e9)
