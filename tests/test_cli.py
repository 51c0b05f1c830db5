import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny_run import SMALL, write_text

from fastlm import cli
from fastlm.training import commands, demo
from fastlm.training.run import read_run

SETTINGS = [f"--set={key}={value}" for key, value in {**SMALL, "epochs": 2}.items()]


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path_factory.getbasetemp() / "corpora"))


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text")


@pytest.fixture
def run(tmp_path, text, capsys):
    assert (
        cli.main(["train", "--data", str(text), "--recipe", "ptb-lstm", "--out", str(tmp_path / "run"), *SETTINGS]) == 0
    )
    capsys.readouterr()
    return tmp_path / "run"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run for many tests, which leave it as it was."""
    folder = tmp_path_factory.mktemp("fitted")
    text, out = write_text(folder / "text"), folder / "run"
    settings = [*SETTINGS, "--set=epochs=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLM_CACHE", str(folder / "corpora"))
        assert cli.main(["train", "--data", str(text), "--recipe", "ptb-lstm", "--out", str(out), *settings]) == 0
    return out


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def fails(capsys, *arguments):
    """Exit status 2 and one line on stderr, which is returned."""
    assert cli.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastlm: ") and captured.out == ""
    return lines[0]


def test_train_evaluate_cache_generate(run, text, capsys):
    assert {f.name for f in run.iterdir()} >= {
        *("config.toml", "vocabulary.json", "metrics.jsonl", "checkpoints", "results.json", "loss.png", "report.html")
    }
    results = json.loads((run / "results.json").read_text())
    assert cli.main(["eval", "--run", str(run), "--json"]) == 0
    scored = last_json(capsys)
    assert scored["nll"] == results["test"]["nll"] and scored["split"] == "test"
    assert cli.main(["eval", "--run", str(run), "--split", "valid"]) == 0
    assert capsys.readouterr().out.startswith(f"valid: perplexity {results['valid']['ppl']:.2f}, loss ")

    assert cli.main(["cache", "--run", str(run), "--tune", "--json"]) == 0
    tuned = last_json(capsys)
    assert tuned["test"]["plain"]["nll"] == pytest.approx(scored["nll"], rel=1e-5)
    assert cli.main(["cache", "--run", str(run), "--json"]) == 0
    again = last_json(capsys)
    assert [again[k] for k in ("theta", "lambda", "window")] == [tuned[k] for k in ("theta", "lambda", "window")]
    assert again["test"] == tuned["test"]
    assert cli.main(["cache", "--run", str(run), "--theta", "0.2", "--lambda", "0", "--window", "9", "--json"]) == 0
    given = last_json(capsys)
    assert [given[k] for k in ("theta", "lambda", "window")] == [0.2, 0.0, 9]
    assert given["test"]["cached"]["nll"] == pytest.approx(given["test"]["plain"]["nll"], rel=1e-6)

    command = ["generate", "--run", str(run), "--prompt", "the cat", "--seed", "7", "--tokens", "12", "--cache"]
    outputs = []
    for _ in range(2):
        assert cli.main(command) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and outputs[0].startswith("the cat")


def test_finetune_is_a_run_of_its_own_and_tested(run, capsys):
    assert cli.main(["finetune", "--run", str(run), "--set", "epochs=3", "--json"]) == 0
    result = last_json(capsys)
    assert result["test"]["tokens"] > 0
    assert (run / "finetune" / "results.json").exists()
    assert cli.main(["eval", "--run", str(run / "finetune"), "--json"]) == 0
    assert last_json(capsys)["nll"] == result["test"]["nll"]
    assert cli.main(["finetune", "--run", str(run), "--resume", "--json"]) == 0
    assert last_json(capsys)["test"] == result["test"]
    assert read_run(run / "finetune").recipe.epochs == 3  # as it was started, not as the run before it


def test_finetuning_follows_the_table_of_the_recipe(text, tmp_path, capsys):
    path, out = tmp_path / "r.toml", tmp_path / "run"
    keys = "\n".join(f"{k} = {v}" for k, v in {**SMALL, "epochs": 1}.items())
    path.write_text(f"{keys}\n[finetune]\nseed = 7\nepochs = 3\n")
    train = ["train", "--data", str(text), "--recipe", str(path), "--out", str(out)]
    assert cli.main([*train, "--set", "finetune.epochs=2", "--when", "1", "2", "--set", "optimizer=sgd"]) == 0
    config = read_run(out)
    assert (config.finetune, config.recipe.when) == ({"seed": 7, "epochs": 2}, (1, 2))
    assert cli.main(["train", "--out", str(out), "--resume", "--set", "finetune.lr=4.5"]) == 0
    assert read_run(out).finetune == {"seed": 7, "epochs": 2, "lr": 4.5}
    assert cli.main(["finetune", "--run", str(out), "--set", "seed=8"]) == 0
    recipe = read_run(out / "finetune").recipe
    assert (recipe.seed, recipe.epochs, recipe.lr, recipe.optimizer) == (8, 2, 4.5, "asgd")
    capsys.readouterr()
    assert "[finetune]: lr" in fails(capsys, "train", "--out", out, "--resume", "--set", "finetune.lr=0")


def test_resume_goes_on_with_more_epochs(run, capsys):
    assert cli.main(["train", "--out", str(run), "--resume", "--set", "epochs=4", "--json"]) == 0
    assert last_json(capsys)["epochs"] == 4
    assert "hidden_size" in fails(capsys, "train", "--out", run, "--resume", "--set", "hidden_size=13")
    assert "nearest valid one is 'epochs'" in fails(capsys, "train", "--out", run, "--resume", "--set", "epoch=13")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("nonmono", "nonmon"))
    assert "config.toml cannot be read: RecipeError: unknown key 'nonmon'" in fails(capsys, "eval", "--run", run)
    (run / "config.toml").write_text(config)
    assert "is 12 in this run" in fails(
        capsys, "train", "--out", run, "--resume", "--recipe", "ptb-lstm", *SETTINGS[:1]
    )


def test_resume_starts_what_has_no_checkpoint_yet(run, text, tmp_path, capsys):
    train = ["train", "--data", str(text), "--recipe", "ptb-lstm", "--resume", *SETTINGS]
    assert cli.main([*train, "--out", str(tmp_path / "b"), "--json"]) == 0
    started = last_json(capsys)
    assert started["test"] == json.loads((run / "results.json").read_text())["test"]
    assert cli.main([*train, "--out", str(tmp_path / "b"), "--json"]) == 0
    again = last_json(capsys)
    assert (again["seconds"], again["starts"]) == (started["seconds"], started["starts"])  # nothing was trained
    fine = ["finetune", "--run", str(run), "--resume", "--set", "epochs=1", "--json"]
    assert cli.main(fine) == 0
    assert last_json(capsys)["epochs"] == 1


def test_one_line_errors(run, text, tmp_path, capsys):
    train = ["train", "--data", text, "--recipe", "ptb-lstm", "--out"]
    assert "--resume" in fails(capsys, *train, run)
    assert "nearest valid one is 'hidden_size'" in fails(capsys, *train, tmp_path / "b", "--set", "hiden_size=3")
    assert "key=value" in fails(capsys, *train, tmp_path / "b", "--set", "lr")
    assert "no recipe 'nope'" in fails(capsys, "train", "--data", text, "--recipe", "nope", "--out", tmp_path / "b")
    assert "needs --data" in fails(capsys, "train", "--out", tmp_path / "b")
    no_name = "--data must name a folder or a file"
    assert no_name in fails(capsys, "train", "--data", "", "--recipe", "ptb-lstm", "--out", tmp_path / "b")
    assert no_name in fails(capsys, "train", "--data", "", "--out", run, "--resume")
    assert no_name in fails(capsys, "reproduce", "--data", "", "--recipe", "ptb-lstm", "--out", tmp_path / "b")
    assert no_name in fails(capsys, "eval", "--run", run, "--data", "")
    assert "give --data and --recipe to start one" in fails(capsys, "train", "--out", tmp_path / "b", "--resume")
    fails(capsys, "train", "--data", tmp_path / "none", "--recipe", "ptb-lstm", "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    for command in ("eval", "cache", "generate", "finetune"):
        assert "no run in" in fails(capsys, command, "--run", tmp_path / "b")
    assert "--device" in fails(capsys, "eval", "--run", run, "--device", "abacus")
    assert "lambda" in fails(capsys, "cache", "--run", run, "--tune", "--lambda", "0.1")


def test_what_is_no_training_refuses_torchrun(fitted, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (["demo", "--out", tmp_path / "demo"], ["cache", "--run", fitted]):
        assert f"{command[0]} runs in one process: start it without torchrun" in fails(capsys, *command)
    assert not (tmp_path / "demo").exists()


def test_no_run_is_made_in_a_folder_without_a_name(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "--out" in fails(capsys, "train", "--data", text, "--recipe", "ptb-lstm", "--out", "", *SETTINGS)
    assert "--out" in fails(capsys, "demo", "--out", "")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_another_text_is_noticed(fitted, tmp_path, capsys):
    other = write_text(tmp_path / "other")
    (other / "train.txt").write_text((other / "train.txt").read_text() + "the cat sat\n")
    resume = ["train", "--resume", "--out"]
    for command in (["eval", "--run"], ["cache", "--run"], ["finetune", "--run"], resume):
        assert fails(capsys, *command, fitted, "--data", other).endswith("the one that this run was started with")
    (other / "train.txt").write_text("another text\n" * 50)
    words = "was started with: its vocabulary has 4 entries instead of 14"
    assert words in fails(capsys, "eval", "--run", fitted, "--data", other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("hidden_size=13", "hidden_size is 13 there, 12 here"),
        ("seed=9", "seed is 9 there, 3 here"),  # whose weights fit
        ("text", "text is"),
    ],
)
def test_checkpoints_of_another_run(fitted, text, tmp_path, change, words, capsys):
    settings = [*SETTINGS, "--set=epochs=1"]
    if change == "text":
        (text / "train.txt").write_text((text / "train.txt").read_text() + "the cat sat\n")
    else:
        settings.append(f"--set={change}")
    other, copy = str(tmp_path / "other"), tmp_path / "copy"
    assert cli.main(["train", "--data", str(text), "--recipe", "ptb-lstm", "--out", other, *settings]) == 0
    capsys.readouterr()
    shutil.copytree(fitted, copy)
    shutil.rmtree(copy / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", copy / "checkpoints")
    assert f"last is of another run: {words}" in fails(capsys, "train", "--out", copy, "--resume")
    for command in ("eval", "finetune"):
        assert f"best is of another run: {words}" in fails(capsys, command, "--run", copy)
    assert not (copy / "finetune").exists()


def test_files_that_are_no_checkpoints(fitted, tmp_path, capsys):
    shutil.copytree(fitted, tmp_path / "run")
    for name, command in [("last", ["train", "--resume", "--out"]), ("best", ["eval", "--run"])]:
        path = tmp_path / "run" / "checkpoints" / name
        shutil.rmtree(path)
        assert f"no checkpoint at {path}" in fails(capsys, *command, tmp_path / "run")
        path.write_bytes(b"PK")
        assert f"{path} is not a checkpoint: it is a file" in fails(capsys, *command, tmp_path / "run")


WORD = {"word": "a", "model": 0.1, "cache": 0.1, "mixed": 0.1, "looked": [{"back": 1}]}


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "null", "{}", '{"theta": 1}', '{"theta": "1", "lambda": 0.1, "window": 5}'),
        *(f'{{"theta": {theta}, "lambda": 0.1, "window": 5}}' for theta in (-1, 1e31, "NaN", "Infinity", "true")),
        '{"theta": 1, "lambda": 2, "window": 5}',
        '{"theta": 1, "lambda": 0.1, "window": 0}',
        json.dumps({"theta": 1, "lambda": 0.1, "window": 5, "passage": [WORD]}),
        "[" * 100_000,
    ],
)
def test_damaged_cache_settings(fitted, content, capsys):
    (fitted / "cache.json").write_text(content)
    assert "cache.json" in fails(capsys, "cache", "--run", fitted)
    assert "cache.json" in fails(capsys, "generate", "--run", fitted, "--cache")
    (fitted / "cache.json").unlink()


@pytest.mark.parametrize(
    ("name", "content"),
    [("results.json", "{}"), ("results.json", "null"), ("metrics.jsonl", "null\n"), ("metrics.jsonl", b"\xff\n")]
    + [("metrics.jsonl", f'{{"event": "{event}"}}\n') for event in ("train", "epoch", "feast")],
)
def test_damaged_figures(fitted, name, content, capsys):
    before = (fitted / name).read_bytes()
    (fitted / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"{name} cannot be read" in fails(capsys, "cache", "--run", fitted)
    (fitted / name).write_bytes(before)
    (fitted / "cache.json").unlink()


@pytest.mark.parametrize("change", [{"words": ["<eos>"], "counts": [1]}, {"words": [1], "counts": [1]}, {"words": {}}])
def test_a_damaged_vocabulary(fitted, change, capsys):
    path = fitted / "vocabulary.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | change))
    assert "vocabulary.json" in fails(capsys, "generate", "--run", fitted)
    path.unlink()
    assert "vocabulary.json is missing" in fails(capsys, "generate", "--run", fitted)
    path.write_text(before)


def test_a_window_takes_no_more_room_than_the_text(fitted, capsys):
    texts = []
    for window in (200, 2**31 - 1):
        command = ["generate", "--run", str(fitted), "--cache", "--seed", "3", "--window", str(window), "--json"]
        assert cli.main(command) == 0
        texts.append(last_json(capsys)["text"])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:99", "cpu:-3", ""])
def test_devices_that_are_not_there(fitted, device, capsys):
    assert "--device" in fails(capsys, "eval", "--run", fitted, "--device", device)


def test_a_moved_text_is_found_by_data(run, text, tmp_path, capsys):
    text.rename(tmp_path / "moved")
    fails(capsys, "eval", "--run", run)
    # The digest does not cover the name of the folder.
    assert cli.main(["eval", "--run", str(run), "--data", str(tmp_path / "moved")]) == 0


def test_damaged_files_of_a_run(run, capsys):
    best = run / "checkpoints" / "best" / "model.safetensors"
    best.write_bytes(best.read_bytes()[:-3])
    assert "damaged" in fails(capsys, "eval", "--run", run)
    assert "damaged" in fails(capsys, "generate", "--run", run)
    (run / "vocabulary.json").write_text("{")
    assert "vocabulary.json cannot be read" in fails(capsys, "generate", "--run", run)
    (run / "config.toml").write_text("[recipe]\nlr = ")
    assert "config.toml cannot be read" in fails(capsys, "eval", "--run", run)


def test_unknown_words_of_a_prompt_are_said(run, capsys):
    assert cli.main(["generate", "--run", str(run), "--prompt", "the zebra sat", "--tokens", "3", "--json"]) == 0
    captured = capsys.readouterr()
    assert "zebra" in captured.err and captured.err.count("\n") == 1
    result = json.loads(captured.out.splitlines()[-1])
    assert result["text"].startswith("the <unk> sat")
    again = ["generate", "--run", str(run), "--prompt", "the zebra sat", "--tokens", "3", "--seed", str(result["seed"])]
    assert cli.main([*again, "--json"]) == 0
    assert last_json(capsys)["text"] == result["text"]


def test_without_a_prompt_a_line_is_started(run, capsys):
    command = ["generate", "--run", str(run), "--temperature", "0", "--json"]
    assert cli.main([*command, "--tokens", "0"]) == 0
    assert last_json(capsys)["text"] == ""  # the line end it starts from is not shown
    assert cli.main([*command, "--tokens", "5"]) == 0
    assert last_json(capsys)["text"] != ""


@pytest.mark.parametrize("level", ["char", "byte"])
def test_characters_and_bytes(tmp_path, text, level, capsys):
    out = tmp_path / level
    settings = [*SETTINGS, f"--set=level={level}", "--set=epochs=1", "--set=bptt=40"]
    assert cli.main(["train", "--data", str(text), "--recipe", "ptb-lstm", "--out", str(out), *settings]) == 0
    captured, results = capsys.readouterr(), json.loads((out / "results.json").read_text())
    assert (
        f"test: bits per character {results['test']['bpc']:.4f}, perplexity {results['test']['ppl']:.2f}"
        in captured.out
    )
    lines = captured.err.splitlines()
    assert " ppl " not in captured.err and any("| bpc " in line for line in lines if "ETA" in line)
    assert any(f"| valid bpc {results['valid']['bpc']:.4f} |" in line for line in lines)
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(event["bpc"] == pytest.approx(event["loss"] / math.log(2)) for event in events)
    assert cli.main(["eval", "--run", str(out)]) == 0
    assert f"test: bits per character {results['test']['bpc']:.4f}, " in capsys.readouterr().out
    assert cli.main(["cache", "--run", str(out), "--window", "50"]) == 0
    assert f"test: bits per character {results['test']['bpc']:.4f}, with the cache " in capsys.readouterr().out
    assert "<h2>Bits per character</h2>" in (out / "report.html").read_text()
    assert (
        cli.main(["generate", "--run", str(out), "--prompt", "the c", "--tokens", "20", "--seed", "1", "--json"]) == 0
    )
    result = last_json(capsys)
    assert result["text"].startswith("the c") and len(result["text"]) > 5


def test_one_file_is_a_corpus_of_bytes(text, tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "enwik8", tmp_path / "run"
    file.write_bytes((text / "train.txt").read_bytes())
    monkeypatch.chdir(tmp_path)
    train = ["train", "--data", "enwik8", "--recipe", "ptb-lstm", "--out", str(out), *SETTINGS, "--set=epochs=1"]
    assert "enwik8: one file is a corpus at the byte level alone" in fails(capsys, *train)
    assert "needs more than its" in fails(capsys, *train, "--set=level=byte")
    assert not out.exists()
    monkeypatch.setattr("fastlm.data.corpus.HELD_OUT", 300)
    assert cli.main([*train, "--set=level=byte", "--set=bptt=40"]) == 0
    monkeypatch.chdir("/")
    capsys.readouterr()
    assert cli.main(["eval", "--run", str(out), "--json"]) == 0
    assert last_json(capsys)["tokens"] == 299  # the first is never predicted


@pytest.mark.parametrize("arguments", [[], ["fly"], ["eval"], ["eval", "--run", "x", "--split", "nope"]])
def test_wrong_command_lines(arguments, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(arguments)
    assert e.value.code == 2
    assert "usage: fastlm" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        *("--temperature=-1", "--temperature=inf", "--top-p=2", "--top-p=0", "--top-k=-1", f"--top-k={10**20}"),
        *("--tokens=x", "--lambda=1.1", "--window=0", f"--window={10**20}", "--theta=inf", "--theta=1e30"),
        *("--seed=-1", f"--seed={2**64}"),
    ],
)
def test_options_out_of_range(option, capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--run", "x", option])
    assert option.split("=")[0] in capsys.readouterr().err


def test_info_and_help_need_no_torch(capsys):
    code = "import sys; sys.modules['torch'] = None; from fastlm import cli; sys.exit(cli.main(sys.argv[1:]))"
    for arguments in (["info"], ["--help"], ["train", "--help"]):
        assert subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True).returncode == 0


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(tmp_path, text):
    out = tmp_path / "run"
    settings = [*SETTINGS, "--set=epochs=100000", "--set=log_interval=1"]
    command = [
        sys.executable,
        "-m",
        "fastlm.cli",
        "train",
        "--data",
        str(text),
        "--recipe",
        "ptb-lstm",
        "--out",
        str(out),
    ]
    process = subprocess.Popen([*command, *settings], stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith(f"go on with: fastlm train --out {out} --resume")


@pytest.mark.parametrize("command", [["info"], ["info", "--json"], ["eval"], ["eval", "--json"], []])
def test_a_reader_that_has_gone_is_no_error(fitted, command):
    reader, writer = os.pipe()
    os.close(reader)
    module = "fastlm.cli" if command else "fastlm.info"
    command = [*command, "--run", str(fitted)] if command[:1] == ["eval"] else command
    try:
        process = subprocess.run(
            [sys.executable, "-m", module, *command], stdout=writer, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(writer)
    assert (process.returncode, process.stderr) == (141, "")


def test_json_has_null_for_what_is_no_number(monkeypatch, capsys):
    result = {"ppl": float("inf"), "of": [float("nan"), 1.5, {"nll": -float("inf")}], "split": "test", "n": 2}
    monkeypatch.setattr(commands, "evaluate", lambda args: (0, result))
    assert cli.main(["eval", "--run", "x", "--json"]) == 0
    out = capsys.readouterr().out
    wanted = {"ppl": None, "of": [None, 1.5, {"nll": None}], "split": "test", "n": 2}
    assert json.loads(out, parse_constant=pytest.fail) == wanted


def test_a_drawn_seed_is_a_number_that_json_keeps(fitted, capsys):
    seeds = set()
    for _ in range(5):
        assert cli.main(["generate", "--run", str(fitted), "--tokens", "0", "--json"]) == 0
        seeds.add(last_json(capsys)["seed"])
    assert len(seeds) == 5 and max(seeds) < 2**53


def rows(plain, cached):
    return [
        {"model": "unigram", "valid ppl": 400.0, "test ppl": 400.0},
        {"model": "demo-lstm", "test ppl": plain, "test, cache": cached, "parameters": 1234567},
    ]


def test_the_demo_checks_itself():
    assert all(holds for holds, _ in demo.checks(rows(200.0, 150.0)))
    assert [holds for holds, _ in demo.checks(rows(250.0, 150.0))] == [False, True]
    assert [holds for holds, _ in demo.checks(rows(200.0, 170.0))] == [True, False]
    assert not any(holds for holds, _ in demo.checks(rows(float("nan"), float("nan"))))


def test_the_table_is_aligned():
    lines = demo.table(rows(200.0, 150.0)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].startswith("model") and "1,234,567" in lines[2] and "-" in lines[1]


def test_the_demo_trains_tunes_and_checks(tmp_path, text, monkeypatch, capsys):
    path = tmp_path / "tiny.toml"
    path.write_text("\n".join(f"{k} = {v}" for k, v in {**SMALL, "epochs": 1}.items()))
    monkeypatch.setattr(demo, "SOURCE", str(text))
    monkeypatch.setattr(demo, "RECIPES", {"lstm": str(path)})
    for _ in range(2):  # the second time it goes on with what is there
        status = cli.main(["demo", "--out", str(tmp_path / "demo"), "--json"])
        out = capsys.readouterr().out.splitlines()
        result = json.loads(out[-1])
        assert status == 1 and not result["passed"]  # random words cannot be learnt
        assert any(line.startswith("FAIL") for line in out)
        assert [row["model"] for row in result["rows"]][0] == "unigram" and len(result["rows"]) == 2
    assert (tmp_path / "demo" / "lstm" / "report.html").exists()
