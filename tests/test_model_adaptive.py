"""The language model with an adaptive softmax: its loss, its distribution, its training and its commands."""

import json
import sys

import pytest
import torch
from tiny_run import SMALL, write_text

from fastlm import cli
from fastlm.data import load_corpus
from fastlm.errors import RecipeError
from fastlm.models import LanguageModel, LanguageModelConfig
from fastlm.nn import NeuralCache
from fastlm.optim import NTASGD
from fastlm.training.evaluate import evaluate
from fastlm.training.generate import choose, generate
from fastlm.training.recipe import make_recipe
from fastlm.training.trainer import Trainer

V, CUTOFFS = 13, (3, 5, 9)


def make(**options):
    """A model whose tombstones count, as after some training."""
    sizes = {"embedding_size": 4, "hidden_size": 7, "num_layers": 2, "cutoffs": CUTOFFS}
    model = LanguageModel(LanguageModelConfig(V, **{**sizes, **options}))
    for tail in (model.softmax.tail_vectors, model.softmax.tail_bias):
        torch.nn.init.normal_(tail)
    return model


def batch():
    return torch.randint(V, (6, 3)), torch.randperm(18).view(6, 3) % V


@pytest.mark.parametrize("tied", [True, False])
def test_loss_score_and_logits_are_of_one_distribution(tied):
    model, (tokens, targets) = make(tie_weights=tied, ar=0.0, tar=0.0).eval(), batch()
    hidden, raw, _ = model(tokens)
    log_prob = model.logits(hidden)
    expected = model.softmax.log_prob(hidden, model.output_weight, model.decoder_bias)
    assert torch.equal(log_prob, expected)
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(6, 3))
    nll = -log_prob.gather(-1, targets[..., None])[..., 0]
    score = model.score(tokens, targets)
    torch.testing.assert_close((score.nll, score.raw), (nll, raw))
    torch.testing.assert_close(model.loss(tokens, targets).loss, nll.mean())


def test_a_state_dict_has_every_tensor_once():
    model, plain = make(), make(cutoffs=(3,))
    tails = ["softmax.tail_vectors", "softmax.tail_bias"]
    assert [name for name in model.state_dict() if name.startswith("softmax")] == tails
    numbers = sum(p.numel() for p in model.parameters())
    assert numbers == sum(p.numel() for p in model.state_dict().values())
    assert numbers == sum(p.numel() for p in plain.parameters()) + 2 * (4 + 1)


def test_initial_tails_are_zero():
    model = make()
    model.reset_parameters()
    assert not model.softmax.tail_vectors.any() and not model.softmax.tail_bias.any()


@pytest.mark.parametrize("lag", [None, "awd-lstm-lm"])
def test_every_parameter_moves_before_and_after_the_switch_and_is_averaged(lag):
    """In the original the tombstones stood still from the switch on."""
    model, (tokens, targets) = make(), batch()
    optimizer = NTASGD(model.parameters(), lr=1.0, lag=lag)
    iterates = []
    for step in range(6):
        if step == 3:
            optimizer.start_averaging()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        model.loss(tokens, targets).loss.backward()
        optimizer.step()
        for name, p in model.named_parameters():
            assert not torch.equal(p, before[name]), f"{name} at step {step}"
        iterates.append([p.detach().clone() for p in model.softmax.parameters()])
    counted = iterates[3 if lag is None else 4 :]
    with optimizer.average():
        for average, *values in zip(model.softmax.parameters(), *counted, strict=True):
            torch.testing.assert_close(average.detach(), torch.stack(values).mean(0))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_what_is_sampled_is_the_distribution(monkeypatch, temperature):
    model, seen, banned = make().eval(), [], 4

    def spy(probabilities, *args):
        seen.append(probabilities)
        return choose(probabilities, *args)

    # fastlm.training.generate is the function; its module is found by name.
    monkeypatch.setattr(sys.modules[generate.__module__], "choose", spy)
    prompt = torch.tensor([3, 1, 4])
    tokens = list(generate(model, prompt, 5, temperature=temperature, banned=banned, seed=0))
    with torch.no_grad():
        whole = torch.cat([prompt, torch.tensor(tokens)])[:, None]
        p = model.logits(model(whole).hidden)[2:-1, 0].exp() ** (1 / temperature)
    p[:, banned] = 0
    torch.testing.assert_close(torch.stack(seen), p / p.sum(-1, keepdim=True))
    cached = generate(model, prompt, 5, cache=NeuralCache(0.5, 0.3, 8), seed=0)
    assert all(0 <= token < V for token in cached)


def test_train_evaluate_cache_generate(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "corpora"))
    text, run = str(write_text(tmp_path / "text")), str(tmp_path / "run")
    settings = [f"--set={key}={value}" for key, value in {**SMALL, "epochs": 1, "cutoffs": [3, 7]}.items()]
    assert cli.main(["train", "--data", text, "--recipe", "ptb-lstm", "--out", run, *settings]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    capsys.readouterr()
    for command in (["eval"], ["cache"]):
        assert cli.main([*command, "--run", run, "--json"]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found.get("nll", found.get("test", {}).get("plain", {}).get("nll")) == pytest.approx(
            results["test"]["nll"], rel=1e-5
        )
    command = ["generate", "--run", run, "--prompt", "the cat", "--tokens", "12", "--seed", "1", "--cache"]
    assert cli.main(command) == 0 and capsys.readouterr().out.startswith("the cat")
    assert cli.main(["train", "--out", run, "--resume", "--set", "cutoffs=[3]"]) == 2
    assert "cutoffs is (3, 7) in this run and cannot become (3,)" in capsys.readouterr().err


def test_wrong_cutoffs():
    for cutoffs, message in [
        ([0], "cutoffs must be at least 1, got 0"),
        ([5, 3], r"cutoffs must increase, got \[5, 3\]"),
        ([3, 3], r"cutoffs must increase, got \[3, 3\]"),
        ([2.5], "cutoffs must be a list of integers"),
    ]:
        with pytest.raises(RecipeError, match=message):
            make_recipe({"cutoffs": cutoffs})
    recipe = make_recipe({"cutoffs": [3, V]})
    with pytest.raises(
        RecipeError, match=r"makes no model: cutoffs must increase and lie in \[1, 13\), the vocabulary"
    ):
        recipe.model_config(V)
    assert recipe.model_config(V + 1).cutoffs == (3, V)


@pytest.mark.gpu
def test_training_on_a_gpu_sorts_the_targets_on_the_host(tmp_path, monkeypatch):
    corpus = load_corpus(write_text(tmp_path / "text"), cache_dir=tmp_path / "cache")
    monkeypatch.setattr(sys.modules["fastlm.ops.adaptive_softmax"], "_all_rows", None)
    trainer = Trainer(tmp_path / "run", make_recipe({**SMALL, "epochs": 1, "cutoffs": [3, 7]}), corpus, device="cuda")
    test = trainer.fit()
    on_cpu = evaluate(trainer.model.cpu(), corpus.test, trainer.recipe.test_batch_size)
    assert test.nll == pytest.approx(on_cpu.nll, rel=2e-3)
