"""The README tells the truth: its examples run, its table is what there is."""

import re
import shlex
from pathlib import Path

import pytest
from tiny_run import SMALL, write_text

from fastlm import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^`fastlm\.([\w.]+)`[^\n]*\n+```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_every_python_block_is_an_example():
    assert len(EXAMPLES) == README.count("```python")
    names = [name for name, _ in EXAMPLES]
    modules = ("LSTM", "QRNN", "QRNNDecoder", "WeightDrop", "NeuralCache", "LinearCrossEntropyLoss", "AdaptiveSoftmax")
    assert names == [f"nn.{module}" for module in modules]


@pytest.mark.parametrize(("name", "source"), EXAMPLES, ids=lambda value: value if "\n" not in value else "")
def test_example_runs(name, source):
    assert source.count("\n") <= 16, "an example has 15 lines or so"
    exec(compile(source, f"README.md: {name}", "exec"), {"__name__": "example"})


def test_table_of_operators():
    from fastlm import _lib, ops

    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", README, re.MULTILINE)
    assert {name for name, _ in rows} == set(_lib.ops) == set(ops.__all__) - {"which"}
    for name, cells in rows:
        reference, cpu, triton, cuda, aten = (cell == "yes" for cell in cells.split(" | "))
        has_others = {"adaptive_softmax": "linear_cross_entropy", "dropconnect_mask": "dropconnect"}  # kernels
        stem = has_others.get(name, name)
        assert reference
        assert cpu is (ROOT / "csrc" / f"{stem}.cpp").exists(), name
        assert cuda is (ROOT / "csrc" / f"{stem}.cu").exists(), name
        assert triton is bool(_lib.ops[name].triton), name
        assert aten is ("aten" in _lib.ops[name].extra), name


def test_commands_run(tmp_path, monkeypatch):
    """The block as it stands, but for a small text and a small model."""
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "corpora"))
    monkeypatch.chdir(tmp_path)
    text = str(write_text(tmp_path / "text"))
    sizes = {key: value for key, value in SMALL.items() if key != "lr"}
    section = README.partition("## Models from the command line")[2].partition("\n## ")[0]
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^fastlm (.+)$", section, re.MULTILINE)]
    assert [command[0] for command in commands] == ["train", "finetune", "eval", "cache", "generate"]
    for command in commands:
        arguments = [text if argument == "stdlib" else argument for argument in command]
        if command[0] == "train":
            arguments += [f"--set={key}={value}" for key, value in {**sizes, "epochs": 1}.items()]
        assert cli.main(arguments) == 0, command


def test_targets_exist():
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
