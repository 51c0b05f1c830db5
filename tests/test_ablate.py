import json

import pytest
from test_cli import fails, last_json
from test_reproduce import no_shared_cache, stop_at, untimed, write_recipe  # noqa: F401
from tiny_run import write_text

from fastlm import cli
from fastlm.errors import RecipeError
from fastlm.training import ablate, stages
from fastlm.training.plots import draw_ablation
from fastlm.training.recipe import load_recipe, make_recipe, read_recipe, recipe_names
from fastlm.training.run import read_run

TABLE = """
[published]
vocab_size = 14
parameters = 1000
[published.ablation]
full = [60.7, 58.8]
weight-dropout = [71.1, 68.9]
finetuning = [60.0, 57.3]
"""


@pytest.fixture
def command(tmp_path):
    """The command line of an ablation into a folder of that name, whose results go into `results`."""
    text, recipe = write_text(tmp_path / "text"), write_recipe(tmp_path / "tiny.toml", TABLE)

    def of(name, *more):
        where = ["--out", str(tmp_path / name), "--results", str(tmp_path / "results")]
        return ["ablate", "--data", str(text), "--recipe", str(recipe), *where, *more]

    return of


def test_the_rows_of_the_published_table():
    changes, left_out = ablate.plan(load_recipe("ptb-lstm"))
    assert left_out == {} and list(changes) == ["full", *ablate.ROWS]
    assert changes == {
        "full": {},
        "nt-asgd": {"optimizer": "sgd"},
        "variable-bptt": {"variable_bptt": False},
        "embedding-dropout": {"embedding_dropout": 0.0},
        "weight-decay": {"weight_decay": 0.0},
        "ar-tar": {"ar": 0.0, "tar": 0.0},
        "full-embedding": {"embedding_size": 1150},
        "weight-dropout": {"weight_dropout": 0.0},
    }
    for name in ("ptb-lstm", "wt2-lstm"):
        assert list(read_recipe(name).published.ablation) == ["full", *ablate.ROWS, "finetuning"]


def test_rows_of_tricks_that_a_recipe_has_not_are_left_out():
    changes, left_out = ablate.plan(load_recipe("ptbc-lstm"))
    assert list(changes) == ["full", "variable-bptt", "weight-decay", "full-embedding", "weight-dropout"]
    assert left_out == {
        "nt-asgd": "optimizer is 'adam' in the recipe",
        "embedding-dropout": "embedding_dropout is 0.0 in the recipe",
        "ar-tar": "ar is 0.0 and tar is 0.0 in the recipe",
    }
    assert ablate.plan(make_recipe({"ar": 0.0}))[0]["ar-tar"] == {"tar": 0.0}
    assert list(ablate.plan(make_recipe({}), ["ar-tar", "nt-asgd"])[0]) == ["full", "nt-asgd", "ar-tar"]
    with pytest.raises(RecipeError, match="unknown row 'ar'; the nearest valid one is 'ar-tar'"):
        ablate.plan(make_recipe({}), ["ar"])


def test_every_row_is_a_run_beside_the_published_differences(command, tmp_path, monkeypatch, capsys):
    only = ["--only", "weight-dropout", "embedding-dropout", "nt-asgd"]
    sets = ["--set", "embedding_dropout=0", "--set", "finetune.epochs=5"]
    settings = [*sets, "--finetune", "--epochs", "2", *only]
    assert cli.main(command("rows", *settings, "--json")) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "results" / "tiny-ablation.json").read_text())
    assert json.loads(last).items() >= found.items()
    assert (tmp_path / "results" / "tiny-ablation.png").read_bytes().startswith(b"\x89PNG")
    assert {"recipe": "tiny", "overrides": {"embedding_dropout": 0, "finetune.epochs": 5}}.items() <= found.items()
    assert found["budget"] == {"epochs": 2, "max_seconds": 0.0}
    assert found["left_out"] == {"embedding-dropout": "embedding_dropout is 0.0 in the recipe"}
    assert any(line.startswith("left out: - embedding dropout: ") for line in lines)

    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == ["full", "nt-asgd", "weight-dropout", "finetuning"]
    for name, row in rows.items():
        folder = tmp_path / "rows" / name if name != "finetuning" else tmp_path / "rows" / "full" / "finetune"
        results = json.loads((folder / "results.json").read_text())
        assert row["starts"] == results["starts"] and len(row["starts"]) == 1
        assert row["test"] == results["test"] and len(row["curve"]) == row["epochs"] == 2
        difference = results["valid"]["ppl"] - rows["full"]["valid"]["ppl"]
        assert row["delta"]["valid"] == pytest.approx(difference)
    assert rows["full"]["delta"] == rows["full"]["published"] == {"valid": 0.0, "test": 0.0}
    assert rows["weight-dropout"]["published"] == pytest.approx({"valid": 71.1 - 60.7, "test": 68.9 - 58.8})
    assert rows["finetuning"]["published"] == pytest.approx({"valid": 60.0 - 60.7, "test": 57.3 - 58.8})
    assert rows["nt-asgd"]["published"] is None
    assert found["published_model"] == {"recipe": "tiny", "valid": 60.7, "test": 58.8}
    assert rows["finetuning"]["averaged_from"] == 1
    assert read_run(tmp_path / "rows" / "weight-dropout").recipe.weight_dropout == 0
    assert rows["weight-dropout"]["delta"]["valid"] != 0
    assert any(line.startswith("- weight dropout ") and "+10.40 / +10.10" in line for line in lines)
    # Too short for NT-ASGD to begin, so that this row is the full model once more.
    assert rows["nt-asgd"]["delta"] == pytest.approx({"valid": 0.0, "test": 0.0}, abs=1e-3)
    assert "never averaged" in "\n".join(lines) and "no differences were published" not in "\n".join(lines)

    monkeypatch.setattr(stages.Trainer, "fit", lambda self: pytest.fail("trained again"))
    assert cli.main(command("rows", *settings, "--json")) == 0
    assert untimed(last_json(capsys)["rows"]) == untimed(found["rows"])
    assert "another budget (epochs 2, max_seconds 0)" in fails(capsys, *command("rows", "--epochs", "1"))
    wrong = f"{tmp_path / 'rows' / 'full'}: embedding_dropout is 0.0 in this run"
    assert wrong in fails(capsys, *command("rows", "--epochs", "2"))


def test_interrupted_it_goes_on(command, tmp_path, monkeypatch, capsys):
    settings = ["--epochs", "1", "--only", "ar-tar", "--json"]
    with monkeypatch.context() as m:
        stop_at(m, "ar-tar", 2)
        assert cli.main(command("rows", *settings)) == 130
    assert not (tmp_path / "results").exists()
    capsys.readouterr()
    assert cli.main(command("rows", *settings)) == 0
    stopped = last_json(capsys)
    assert cli.main(command("undisturbed", *settings)) == 0
    assert untimed(stopped["rows"]) == untimed(last_json(capsys)["rows"])


def test_a_budget_in_seconds_and_a_recipe_of_characters(command, tmp_path, capsys):
    write_recipe(tmp_path / "tiny.toml", "", level="char", bptt=60)
    assert cli.main(command("rows", "--seconds", "0.001", "--only", "weight-decay", "--json")) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert "no differences were published for a model of this kind on this text" in lines
    assert found["unit"] == "bpc" and found["published_model"] is None
    assert [row["steps"] for row in found["rows"]] == [1, 1]
    assert [row["published"] for row in found["rows"]] == [None, None]
    assert found["rows"][1]["delta"]["test"] == pytest.approx(
        found["rows"][1]["test"]["bpc"] - found["rows"][0]["test"]["bpc"]
    )


def test_the_published_model_is_that_of_the_text():
    def of_text(words):
        models = {name: ablate._published(read_recipe(name), words)[0] for name in recipe_names()}
        return {name: model for name, model in models.items() if model}

    assert of_text(10_000) == {"ptb-lstm": "ptb-lstm", "ptb-lstm-small": "ptb-lstm"}
    assert of_text(33_278) == {"wt2-lstm": "wt2-lstm"} and of_text(9_999) == {}
    assert ablate._published(read_recipe("wt2-lstm"), 33_278)[1]["full"] == (69.1, 66.0)
    for other in ({"cell": "qrnn"}, {"optimizer": "adam", "lr": 1e-3}, {"level": "char"}):
        assert ablate._published(read_recipe("ptb-lstm", other), 10_000) == (None, {})


def test_the_table_of_a_recipe_of_ones_own(tmp_path):
    path = write_recipe(tmp_path / "own.toml", TABLE)
    assert ablate._published(read_recipe(path), 14)[0] == "own"
    assert ablate._published(read_recipe(write_recipe(path, "")), 14) == (None, {})


def test_one_line_errors(command, tmp_path, capsys):
    assert "unknown row 'wdrop'" in fails(capsys, *command("rows", "--epochs", "1", "--only", "wdrop"))
    adam = ["--set", "optimizer=adam", "--set", "lr=0.01", "--finetune"]
    assert "set a rate" in fails(capsys, *command("rows", "--epochs", "1", *adam))
    assert not (tmp_path / "rows").exists()
    for budget in ([], ["--epochs", "1", "--seconds", "3"], ["--seconds", "0"], ["--epochs", "0"]):
        with pytest.raises(SystemExit):
            cli.main(command("rows", *budget))


def test_a_picture_of_no_rows_at_all():
    score = {"ppl": 90.0}
    found = {
        **{"recipe": "r", "unit": "ppl", "overrides": {}, "published_model": None},
        **{"budget": {"epochs": 1, "max_seconds": 0.0}, "rows": [{"valid": score, "test": score}]},
    }
    assert draw_ablation(found).startswith(b"\x89PNG")
