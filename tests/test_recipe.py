import dataclasses
import json

import pytest
from tiny_run import SMALL

from fastlm.cli import main
from fastlm.errors import FastlmError, RecipeError
from fastlm.models import LanguageModel
from fastlm.training.recipe import Recipe, load_recipe, make_recipe, parse_override, read_recipe, recipe_names
from fastlm.training.run import read_run, run_corpus

# Words, bytes or characters of the text, published parameters, how near to them the recipe is.
PARAMETERS = {
    "ptb-lstm": (10_000, 24_221_600, 0),
    "ptb-qrnn": (10_000, 24_020_150, 0),
    "wt2-lstm": (33_278, 33_556_078, 0),
    "wt2-qrnn": (33_278, 33_354_628, 0),
    "wt103-qrnn": (267_735, 153_886_638, 0),
    "enwik8-lstm": (205, 47_270_045, 0),
    "enwik8-qrnn": (205, 26_000_000, 0.001),
    "ptbc-lstm": (51, 13_787_851, 0),
    "ptbc-qrnn": (51, 13_800_000, 0.05),  # how its parameters were spent is not published
}
# Valid and test of the base, the finetuned and the cached model, None where nothing was published.
NOTHING = (None, None)
FIGURES_OF = {
    "ptb-lstm": ("ppl", (61.2, 58.8), (58.8, 56.5), (53.2, 52.5)),
    "ptb-qrnn": ("ppl", (60.6, 58.3), (59.1, 56.7), (53.4, 52.6)),
    "wt2-lstm": ("ppl", (68.7, 65.6), (67.4, 64.7), (52.2, 50.6)),
    "wt2-qrnn": ("ppl", (69.3, 66.8), (68.5, 65.9), (53.6, 52.1)),
    "wt103-qrnn": ("ppl", (32.0, 33.0), NOTHING, NOTHING),
    "enwik8-lstm": ("bpc", (None, 1.232), NOTHING, NOTHING),
    "enwik8-qrnn": ("bpc", (None, 1.336), NOTHING, NOTHING),
    "ptbc-lstm": ("bpc", (None, 1.175), NOTHING, NOTHING),
    "ptbc-qrnn": ("bpc", (None, 1.187), NOTHING, NOTHING),
}
OURS = {"ptb-lstm-small", "demo-lstm", "demo-qrnn"}
FIGURES = "[published]\nvocab_size = 1\nparameters = 1\n"


def write(tmp_path, text):
    path = tmp_path / "r.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_load_and_make_a_model_config(name):
    config = load_recipe(name).model_config(100_000)
    assert config.vocab_size == 100_000
    assert config.cell in name


def test_packaged_recipes_are_the_promised_ones():
    assert {name for name in recipe_names() if read_recipe(name).published} == set(PARAMETERS)
    assert {name for name in recipe_names() if not read_recipe(name).published} == OURS


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_their_parameters(name):
    file = read_recipe(name)
    vocab_size, parameters, tolerance = PARAMETERS[name]
    model = LanguageModel(file.recipe.model_config(vocab_size), device="meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=tolerance, abs=0)
    assert (file.published.vocab_size, file.published.parameters) == (vocab_size, parameters)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_figures(name):
    published = read_recipe(name).published
    stages = [tuple(published.figures(stage).values()) for stage in ("base", "finetuned", "cached")]
    assert (published.unit, *stages) == FIGURES_OF[name]


def test_published_finetuning():
    assert read_recipe("ptb-qrnn").finetune == {"seed": 404, "epochs": 300}
    assert [read_recipe(name).finetune for name in ("ptb-lstm", "wt2-lstm", "wt2-qrnn")] == [{}] * 3
    assert all(read_recipe(name).finetune is None for name in PARAMETERS if name[:2] not in ("pt", "wt"))
    assert read_recipe("ptbc-lstm").finetune is None


def test_keys_of_the_finetuning_can_be_set():
    file = read_recipe("ptb-qrnn", {"epochs": 2, "finetune.epochs": 3})
    assert file.recipe.epochs == 2 and file.finetune == {"seed": 404, "epochs": 3}
    assert read_recipe("demo-lstm", {"finetune.lr": 5}).finetune == {"lr": 5}
    assert read_recipe("ptb-lstm", {"optimizer": "adam", "lr": 1e-3}).finetune == {}
    with pytest.raises(RecipeError, match="finetune.*unknown key 'epoch'"):
        read_recipe("ptb-lstm", {"finetune.epoch": 3})


def test_the_list_of_recipes(capsys):
    assert main(["recipes", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    rows = {row["name"]: row for row in json.loads(last)["recipes"]}
    assert list(rows) == recipe_names() == [line.split()[0] for line in lines[1:]]
    assert rows["ptb-lstm"]["cached"] == {"valid": 53.2, "test": 52.5}
    assert rows["enwik8-qrnn"]["base"] == {"valid": None, "test": 1.336}
    assert rows["ptb-lstm-small"]["source"] == "ours" and rows["ptb-lstm-small"]["base"] is None
    [line] = [line for line in lines if line.startswith("ptb-qrnn ")]
    assert "60.6 / 58.3  59.1 / 56.7  53.4 / 52.6" in line and "24.0M" in line


def test_published_hyper_parameters():
    ptb, wt2 = load_recipe("ptb-lstm"), load_recipe("wt2-qrnn")
    assert (ptb.batch_size, ptb.input_dropout, ptb.hidden_dropout, ptb.seed, ptb.epochs) == (
        20,
        0.4,
        0.25,
        141,
        500,
    )
    assert (wt2.num_layers, wt2.hidden_size, wt2.weight_dropout, wt2.batch_size) == (4, 1550, 0.1, 40)
    wt103 = load_recipe("wt103-qrnn")
    assert (wt103.optimizer, wt103.when, wt103.cutoffs) == ("adam", (12,), (2800, 20000, 76000))
    assert (wt2.cache_theta, wt2.cache_lambda, wt2.cache_window) == (0.662, 0.1279, 3785)


def test_unknown_key_is_named_with_the_nearest_one(tmp_path):
    path = write(tmp_path, "hiden_size = 10\n")
    with pytest.raises(RecipeError, match="unknown key 'hiden_size'; the nearest valid one is 'hidden_size'") as e:
        load_recipe(path)
    assert isinstance(e.value, FastlmError)
    assert "\n" not in str(e.value)
    assert "r.toml" in str(e.value)


def test_a_key_like_no_other_has_no_suggestion():
    with pytest.raises(RecipeError, match="unknown key 'xyzzy'$"):
        make_recipe({"xyzzy": 1})


def test_the_vocabulary_of_a_recipe_reaches_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("a a a a b b c\n" * 2 + "d e\n")
    run, out = ["train", "--data", str(tmp_path)], tmp_path / "run"
    settings = {**SMALL, "batch_size": 1, "eval_batch_size": 1, "epochs": 1}
    (tmp_path / "r.toml").write_text("\n".join(f"{k} = {v}" for k, v in settings.items()))
    limits = ["min_count=2", "max_vocabulary=4"]
    run += ["--recipe", str(tmp_path / "r.toml"), "--out", str(out), *(x for s in limits for x in ("--set", s))]
    assert main(run) == 0
    words = ["a", "b", "<eos>", "<unk>"]
    corpus = run_corpus(read_run(out))
    assert sorted(corpus.vocabulary.words) == sorted(words)
    assert (corpus.train == corpus.vocabulary.unk_id).sum() == 4  # c twice, d, e: seen while training


def test_the_default_count_is_left_to_the_corpus():
    assert make_recipe({}).corpus_settings()["min_count"] is None
    assert make_recipe({"min_count": 3}).corpus_settings()["min_count"] == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr = 0", "lr must be greater than 0"),
        ("lr = nan", "lr must be finite, got nan"),
        ("lr = inf", "lr must be finite, got inf"),
        ("max_seconds = inf", "max_seconds must be finite"),
        ("min_count = 0", "min_count must be at least 1"),
        ("max_vocabulary = 2", "max_vocabulary must be 0 or at least 3, got 2"),
        ('min_count = 2\ncompat = "awd-lstm-lm"', "go neither with compat nor with the byte level"),
        ('max_vocabulary = 9\nlevel = "byte"', "go neither with compat nor with the byte level"),
        ('lr = "fast"', "lr must be a number"),
        ("lr = true", "lr must be a number"),
        ("hidden_size = 1.5", "hidden_size must be an integer"),
        ("tie_weights = 1", "tie_weights must be true or false"),
        ("hidden_dropout = 1.0", "hidden_dropout must be less than 1"),
        ("cache_lambda = 1.5", "cache_lambda must be at most 1"),
        ('cell = "rnn"', "cell must be one of"),
        ("when = 3", "when must be a list"),
        ("when = [0]", "when must be at least 1"),
        ("when = [3]", "'when' goes with optimizer sgd or adam"),
        ("[finetune]\nlr = 0", r"\[finetune\]: lr must be greater than 0"),
        ("[finetune]\nepoch = 3", r"\[finetune\]: unknown key 'epoch'; the nearest valid one is 'epochs'"),
        ("[finetun]\nepochs = 3", "unknown table 'finetun'; the nearest valid one is 'finetune'"),
        ("[published]\nbase_tset = 1", r"\[published\]: unknown key 'base_tset'; the nearest valid one is 'base_test'"),
        ("[published]\nparameters = 1", r"\[published\]: vocab_size is missing"),
        ("[published]\nvocab_size = 0\nparameters = 1", r"\[published\]: vocab_size must be at least 1, got 0"),
        (FIGURES + 'unit = "bits"', "unit must be one of 'ppl', 'bpc'"),
        (FIGURES + "ablation = 3", "ablation must be a table"),
        (FIGURES + "[published.ablation]\nfull = [1.0]", "ablation.full must be the figures of valid and test"),
        (FIGURES + "[published.ablation]\nar-tar = [1.0, 2]", "ablation must have .* the row 'full'"),
        ("finetune = 3", "unknown key 'finetune'"),
        ("[model]\nlr = 1", "unknown table 'model'"),
    ],
)
def test_wrong_values(tmp_path, text, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(write(tmp_path, text))


def test_a_file_that_is_not_toml(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(write(tmp_path, "lr = = 3"))
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "missing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "binary.toml")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(RecipeError, match="ptb-lstm"):
        load_recipe("ptb-lsmt")


def test_overrides_come_last_and_are_checked():
    assert load_recipe("ptb-lstm", {"lr": 5, "when": [], "epochs": 3}).lr == 5.0
    with pytest.raises(RecipeError, match="epoch"):
        load_recipe("ptb-lstm", {"epoch": 3})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=3", ("lr", 3)),
        ("lr = 1e-3", ("lr", 1e-3)),
        ("cell=qrnn", ("cell", "qrnn")),
        ('cell="qrnn"', ("cell", "qrnn")),
        ("when=[3, 4]", ("when", [3, 4])),
        ("tie_weights=false", ("tie_weights", False)),
        ("compat=", ("compat", "")),
        ("x=a=b", ("x", "a=b")),
    ],
)
def test_overrides_are_read_as_toml_or_text(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["lr", "=3"])
def test_override_without_key_or_value(text):
    with pytest.raises(RecipeError, match="key=value"):
        parse_override(text)


def test_recipes_are_frozen_and_round_trip():
    recipe = make_recipe({"optimizer": "adam", "when": [2, 5]})
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.lr = 3
    assert make_recipe(dataclasses.asdict(recipe)) == recipe
    assert recipe != Recipe()
