import json
import os
import signal

import pytest
from test_cli import fails, last_json
from tiny_run import SMALL, write_text

from fastlm import cli, machine
from fastlm.nn import NeuralCache
from fastlm.training import reproduce, stages
from fastlm.training.evaluate import cache_evaluate
from fastlm.training.recipe import make_recipe, read_recipe, recipe_names
from fastlm.training.run import read_run, run_corpus, run_model
from fastlm.training.trainer import Trainer

TABLES = """
[finetune]
epochs = 2
[published]
vocab_size = 14
parameters = 1000
source = "a paper"
base_valid = 9.5
base_test = 9.25
finetuned_test = 9.0
"""


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path_factory.getbasetemp() / "corpora"))


def write_recipe(path, tables=TABLES, **changes):
    settings = {**SMALL, "epochs": 2, "log_interval": 1, **changes}
    path.write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in settings.items()) + tables)
    return path


@pytest.fixture
def command(tmp_path):
    """The command line of a reproduction into a folder of that name, whose results go into `results`."""
    text, recipe = write_text(tmp_path / "text"), write_recipe(tmp_path / "tiny.toml")

    def of(name, *more):
        where = ["--out", str(tmp_path / name), "--results", str(tmp_path / "results" / name)]
        return ["reproduce", "--data", str(text), "--recipe", str(recipe), *where, *more]

    return of


def untimed(found):
    """Without what differs between two runs: clocks, and where and when they were started."""
    if isinstance(found, dict):
        return {k: untimed(v) for k, v in found.items() if "second" not in k and k not in ("starts", "machine")}
    return [untimed(v) for v in found] if isinstance(found, list) else found


def stop_at(monkeypatch, folder, step):
    """A signal comes in the middle of a step of the run in a folder of that name."""

    class Signalled(Trainer):
        def _train_step(self, *args):
            if self.run_dir.name == folder and self.step + 1 == step:
                os.kill(os.getpid(), signal.SIGINT)
            return super()._train_step(*args)

    monkeypatch.setattr(stages, "Trainer", Signalled)


def test_every_stage_is_trained_and_written_down(command, tmp_path, monkeypatch, capsys):
    assert cli.main(command("run", "--set", "seed=5", "--set", "finetune.seed=6", "--json")) == 0
    output = capsys.readouterr()
    found = json.loads((tmp_path / "results" / "run" / "tiny.json").read_text())
    assert json.loads(output.out.splitlines()[-1]).items() >= found.items()
    assert (tmp_path / "results" / "run" / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "finetune" / "report.html").exists()

    assert (found["recipe"], found["unit"], found["source"]) == ("tiny", "ppl", "a paper")
    assert found["overrides"] == {"seed": 5, "finetune.seed": 6}
    assert found["finetune"] == {"epochs": 2, "seed": 6} and found["values"]["seed"] == 5
    assert make_recipe(found["values"]) == read_run(tmp_path / "run").recipe
    assert found["text"]["tokens"]["train"] > 100

    base, finetuned, cached = (found["stages"][stage] for stage in ("base", "finetuned", "cached"))
    assert {"commit", "torch", "processor", "threads"} <= cached["machine"].keys()
    for stage in (base, finetuned):
        assert [(start["step"], start["ranks"]) for start in stage["starts"]] == [(0, 1)]
        assert {"machine", "commit", "torch", "fastlm", "environment", "date"} <= stage["starts"][0].keys()
        assert [epoch["epoch"] for epoch in stage["curve"]] == [1, 2]
        assert min(epoch["valid_nll"] for epoch in stage["curve"]) >= stage["valid"]["nll"]
        walls = [epoch["wall_seconds"] for epoch in stage["curve"]] + [stage["wall_seconds"]]
        assert walls == sorted(walls) and all(e["wall_seconds"] > e["seconds"] > 0 for e in stage["curve"])
        assert {"step", "lr", "train_ppl", "valid_ppl", "valid_bpc", "averaging"} <= stage["curve"][0].keys()
    assert [epoch["averaging"] for epoch in finetuned["curve"]] == [True, True]
    assert finetuned["valid"]["nll"] <= base["valid"]["nll"]
    model, corpus = run_model(tmp_path / "run" / "finetune"), run_corpus(read_run(tmp_path / "run"))
    cache = NeuralCache(cached["theta"], cached["lambda"], cached["window"])
    for split in ("valid", "test"):
        plain, with_cache = cache_evaluate(model, getattr(corpus, split), cache)
        assert cached[split]["nll"] == pytest.approx(with_cache.nll, rel=1e-5)
        assert cached["plain"][split]["nll"] == pytest.approx(plain.nll, rel=1e-5)
        assert abs(with_cache.nll - plain.nll) > 1e-4
    assert base["published"] == {"valid": 9.5, "test": 9.25}
    assert finetuned["published"] == {"valid": None, "test": 9.0}
    assert "9.5 / 9.25" in output.out and "- / 9" in output.out

    # Once more: nothing is trained again.
    monkeypatch.setattr(stages.Trainer, "fit", lambda self: pytest.fail("trained again"))
    monkeypatch.setattr(machine, "commit", lambda: "another")
    assert cli.main(command("run", "--set", "seed=5", "--set", "finetune.seed=6", "--json")) == 0
    again = last_json(capsys)["stages"]
    assert untimed(again) == untimed(found["stages"])
    assert [again[stage]["starts"] for stage in ("base", "finetuned")] == [base["starts"], finetuned["starts"]]
    assert again["cached"]["machine"]["commit"] == "another"


@pytest.mark.parametrize(("stage", "step"), [("run", 2), ("finetune", 3)])
def test_interrupted_it_goes_on(command, tmp_path, monkeypatch, capsys, stage, step):
    with monkeypatch.context() as m:
        stop_at(m, stage, step)
        m.setattr(machine, "commit", lambda: "one")
        assert cli.main(command("run", "--json")) == 130
    output = capsys.readouterr()
    assert json.loads(output.out.splitlines()[-1]) == {"interrupted": True}
    assert output.err.splitlines()[-1].endswith("go on with the same command")
    assert not (tmp_path / "results").exists()
    with monkeypatch.context() as m:
        m.setattr(machine, "commit", lambda: "two")
        assert cli.main(command("run", "--json")) == 0
    stopped = last_json(capsys)
    starts = stopped["stages"]["base" if stage == "run" else "finetuned"]["starts"]
    assert [(start["step"], start["commit"]) for start in starts] == [(0, "one"), (step, "two")]
    assert cli.main(command("undisturbed", "--json")) == 0
    whole = last_json(capsys)
    assert untimed(stopped["stages"]) == untimed(whole["stages"])


def test_stopped_while_the_cache_is_tuned_it_goes_on_there(command, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(reproduce, "cache_run", interrupt)
        assert cli.main(command("run")) == 130
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(stages.Trainer, "fit", lambda self: pytest.fail("trained again"))
    assert cli.main(command("run")) == 0
    assert (tmp_path / "results" / "run" / "tiny.json").exists()


def test_a_recipe_of_characters_without_finetuning_has_one_stage(command, tmp_path, capsys):
    write_recipe(tmp_path / "tiny.toml", "", level="char", epochs=1, bptt=60)
    assert cli.main(command("run", "--json")) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert list(found["stages"]) == ["base"] and found["unit"] == "bpc" and found["source"] is None
    assert any(line.startswith(f"base  {found['stages']['base']['valid']['bpc']:.4g} / ") for line in lines)


def test_results_go_into_the_run_unless_told_otherwise(command, tmp_path, capsys):
    short = ["--set", "epochs=1", "--set", "finetune.epochs=1"]
    assert cli.main([*command("run")[:-2], *short, "--json"]) == 0
    assert last_json(capsys)["files"] == [str(tmp_path / "run" / f"tiny.{end}") for end in ("json", "png")]
    assert not (tmp_path / "results").exists()


def test_more_epochs_go_on_and_tell_of_an_old_finetuning(command, tmp_path, monkeypatch, capsys):
    assert cli.main(command("run", "--json")) == 0
    steps = last_json(capsys)["stages"]["base"]["steps"]
    more = command("run", "--set", "epochs=3")
    assert "finetune started from weights that" in fails(capsys, *more)
    for path in sorted((tmp_path / "run" / "finetune").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    with monkeypatch.context() as m:
        stop_at(m, "run", steps + 2)  # there are results then, those of fewer epochs
        assert cli.main(more) == 130
    capsys.readouterr()
    assert cli.main([*more, "--json"]) == 0
    assert len(last_json(capsys)["stages"]["base"]["curve"]) == 3


def test_what_decides_no_weight_may_change_afterwards(command, tmp_path, monkeypatch, capsys):
    short = ["--set", "epochs=1", "--set", "finetune.epochs=1"]
    assert cli.main(command("run", *short, "--json")) == 0
    before, path = last_json(capsys)["stages"], tmp_path / "run" / "results.json"
    results = json.loads(path.read_text())
    del results["recipe"]["cuda_graphs"]  # as a version without that key wrote it
    path.write_text(json.dumps(results))
    monkeypatch.setattr(stages.Trainer, "_train_step", lambda self, *args: pytest.fail("trained again"))
    with monkeypatch.context() as m:
        m.setattr(stages.Trainer, "fit", lambda self: pytest.fail("not even tested again"))
        assert cli.main(command("run", *short, "--set", "log_interval=20", "--set", "cache_window=100", "--json")) == 0
    assert untimed(last_json(capsys)["stages"]["finetuned"]) == untimed(before["finetuned"])
    recipe = read_run(tmp_path / "run" / "finetune").recipe
    assert (recipe.log_interval, recipe.cache_window) == (20, 100)
    assert cli.main(command("run", *short, "--set", "test_batch_size=3", "--json")) == 0
    after = last_json(capsys)["stages"]
    for stage in ("base", "finetuned"):
        assert after[stage]["valid"] == before[stage]["valid"] and after[stage]["test"] != before[stage]["test"]


def test_one_line_errors(command, tmp_path, capsys):
    assert cli.main(command("run", "--set", "epochs=1", "--set", "finetune.epochs=1")) == 0
    capsys.readouterr()
    wrong = command("run", "--set", "epochs=1", "--set", "lr=3")
    assert f"{tmp_path / 'run'}: lr is 5.0 in this run" in fails(capsys, *wrong)
    write_text(tmp_path / "text")
    (tmp_path / "text" / "train.txt").write_text("another text\n" * 50)
    assert "no longer, the one" in fails(capsys, *command("run", "--set", "epochs=1", "--set", "finetune.epochs=1"))
    adam = command("adam", "--set", "optimizer=adam", "--set", "lr=0.01")
    assert "set a rate" in fails(capsys, *adam)
    assert "nearest valid one is 'epochs'" in fails(capsys, *command("b", "--set", "finetune.epoch=3"))
    assert "no recipe 'nope'" in fails(capsys, "reproduce", "--data", tmp_path / "text", "--recipe", "nope")
    assert "--out" in fails(capsys, *command("b")[:-4], "--out", "")
    assert not (tmp_path / "adam").exists() and not (tmp_path / "b").exists()


def test_a_cut_short_history_is_an_error(command, tmp_path, capsys):
    assert cli.main(command("run")) == 0
    capsys.readouterr()
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"wall_seconds"', '"wall"'))
    assert "metrics.jsonl cannot be read" in fails_last(capsys, *command("run"))


def fails_last(capsys, *arguments):
    """Exit status 2; the last line on stderr."""
    assert cli.main(list(arguments)) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_published_recipes_name_the_unit_of_their_level():
    files = [read_recipe(name) for name in recipe_names()]
    assert all(file.published.unit == file.recipe.unit for file in files if file.published)
