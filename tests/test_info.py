"""The report prints, and says the exact reason, however broken the installation is."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


def run(*arguments, before=None, **environment):
    """Run `python -m fastlm.info` in a fresh process, with a folder of packages that come before all others."""
    import fastlm

    # from a folder without a fastlm, since the current one comes first: the package is the one under test
    folders = [str(before)] if before else []
    folders += [str(Path(fastlm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | environment | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    command = [sys.executable, "-m", "fastlm.info", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tempfile.gettempdir())
    assert result.returncode == 0, result.stderr
    return result.stdout


def break_package(folder, name, line):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(line + "\n")


@pytest.fixture(scope="module")
def report():
    return json.loads(run("--json"))


def test_json_names_everything(report):
    import torch

    import fastlm

    assert report["fastlm"]["version"] == fastlm.__version__
    assert report["torch"]["version"] == torch.__version__
    assert set(report["modules"]) == {"_C", "_C_cuda", "_host", "triton"}
    for module in report["modules"].values():
        assert module["loaded"] is (module["reason"] is None)


def test_json_is_one_line():
    assert run("--json").count("\n") == 1


def test_auto_is_what_a_call_takes(report):
    import torch

    from fastlm import _lib, ops

    assert set(report["auto"]["cpu"]) == set(ops.__all__) - {"which"}
    assert ("cuda" in report["auto"]) is torch.cuda.is_available()
    for name, impl in report["auto"]["cpu"].items():
        assert impl == ("cpu" if _lib.native(name, "cpu") else "aten" if name == "lstm" else "reference")


def test_instruction_set_can_be_forced(report):
    if not report["modules"]["_C"]["loaded"]:
        pytest.skip("no native kernels here")
    assert json.loads(run("--json", FASTLM_CPU="baseline"))["instruction_set"] == "baseline"


def test_text_shows_each_op_and_module(report):
    lines = run().splitlines()
    names = {line.split()[0] for line in lines if line.startswith("  ")}
    assert names >= {*report["auto"]["cpu"], *report["modules"], "torch", "numpy", "nvcc"}
    assert lines[-1].startswith("to improve this: ")


def test_native_switched_off():
    report = json.loads(run("--json", FASTLM_DISABLE_NATIVE="1"))
    for name in ("_C", "_C_cuda", "_host"):
        assert report["modules"][name] == {"loaded": False, "reason": "switched off by FASTLM_DISABLE_NATIVE"}
    assert set(report["auto"]["cpu"].values()) <= {"reference", "aten"}
    assert report["instruction_set"] is None
    assert report["advice"] == "unset FASTLM_DISABLE_NATIVE"


@pytest.mark.parametrize(
    "line",
    [
        "raise OSError('libtorch_cpu.so: cannot open shared object file')",
        "raise ModuleNotFoundError('No module named torch')",
        "",  # imports, but nothing is in it
    ],
)
def test_broken_torch(tmp_path, line):
    break_package(tmp_path, "torch", line)
    report = json.loads(run("--json", before=tmp_path))
    if line:
        assert line.split("'")[1] in report["torch"]["error"]
    assert not report["modules"]["_C"]["loaded"]
    assert report["advice"] == 'pip install --force-reinstall "torch>=2.10"'
    text = run(before=tmp_path)
    assert "PyTorch does not import" in text and text.splitlines()[-1].endswith(report["advice"])


def test_broken_numpy(tmp_path):
    break_package(tmp_path, "numpy", "raise ImportError('numpy.core.multiarray failed to import')")
    report = json.loads(run("--json", before=tmp_path))
    assert "multiarray" in report["required"]["numpy"]["error"]
    assert report["advice"] == "pip install --force-reinstall numpy"


def test_unreadable_build_record(tmp_path, monkeypatch):
    from fastlm import info

    monkeypatch.setattr(info, "__file__", str(tmp_path / "info.py"))
    (tmp_path / "_build.json").write_text('{"native": tr')
    report = info.collect()
    assert "JSONDecodeError" in report["build"]["error"]
    assert info.render(report)


def complete():
    """A report of an installation that lacks nothing."""
    return {
        "torch": {"version": "2.13.0", "cuda": "13.0"},
        "required": {"numpy": "2.0"},
        "build_tools": {"cmake": "4.0", "no-such-tool": "1.0"},
        "compilers": {"c++": "c++ 12", "nvcc": "release 13.0"},
        "gpus": ["H200"],
        "modules": {name: {"loaded": True, "reason": None} for name in ("_C", "_C_cuda", "_host", "triton")},
    }


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({}, None),
        ({"_C": False}, "pip install --no-build-isolation ."),
        ({"_host": False}, "pip install --no-build-isolation ."),
        ({"_C": False, "c++": None}, "install a C++ compiler"),
        (
            {"_C": False, "no-such-tool": None},
            "pip install no-such-tool && pip install --no-build-isolation .",
        ),
        ({"triton": False}, 'pip install "triton>=3.6"'),
        ({"triton": False, "gpus": []}, None),
        ({"_C_cuda": False}, "pip install --no-build-isolation ."),
        ({"_C_cuda": False, "nvcc": None}, "install the CUDA toolkit"),
        ({"_C_cuda": False, "cuda": None}, "install a PyTorch with CUDA"),
        ({"_C_cuda": False, "nvcc": None, "gpus": []}, None),
    ],
)
def test_advice(change, advice, monkeypatch):
    from fastlm import info

    monkeypatch.delenv("FASTLM_DISABLE_NATIVE", raising=False)
    report = complete()
    for key, value in change.items():
        if key in report:
            report[key] = value
        for section in report.values():
            if isinstance(section, dict) and key in section:
                section[key] = {"loaded": value} if section is report["modules"] else value
    found = info.advice(report)
    assert found is None if advice is None else found.startswith(advice)
