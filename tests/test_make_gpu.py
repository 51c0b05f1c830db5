"""`make gpu`: its parts, limits, statuses and last lines; on the CPU, where it can be tried out."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
spec = importlib.util.spec_from_file_location("make_gpu", SCRIPT)
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


def python(code):
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("only", "parts", "ops"),
    [
        ("", ["build", "test", "check", "bench"], []),
        ("test", ["test"], []),
        ("bench test", ["test", "bench"], []),
        ("qrnn_pool lstm", ["test", "check", "bench"], ["qrnn_pool", "lstm"]),
        ("build qrnn_pool", ["build", "test", "check", "bench"], ["qrnn_pool"]),
        ("check lstm", ["check"], ["lstm"]),
        ("bench training", ["bench"], ["training"]),
    ],
)
def test_only(only, parts, ops):
    assert gpu.choose(only.split()) == (parts, ops)


def test_what_the_parts_run(tmp_path):
    (command,) = gpu.test(["lstm"], "cuda")
    named = [Path(word).name for word in command if word.endswith(".py")]
    assert "test_lstm.py" in named and "test_gpu.py" in named and "test_qrnn_pool.py" not in named
    assert command[command.index("-k") + 1] == "lstm" and command[command.index("-m", 3) + 1] == "gpu"
    (command,) = gpu.test([], "cuda")
    assert str(ROOT / "tests") in command and "-k" not in command
    (command,) = gpu.bench(["lstm", "dropconnect_mask"], "cuda", str(tmp_path), 99.6)
    assert command[-2:] == ["--op", "lstm"] and command[command.index("--seconds") + 1] == "100"
    assert gpu.bench(["dropconnect_mask"], "cuda", None, 9.0) == []
    (command,) = gpu.test(["linear_cross_entropy"], "cuda")
    assert any(word.endswith("test_linear_cross_entropy_gpu.py") for word in command)
    install, report = gpu.build()
    assert {"--no-build-isolation", "--no-deps", "-e"} < set(install) and report[-1] == "--built"


def test_the_checks_run_under_each_tool(tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    (plain,) = gpu.check(["lstm"], "cuda")
    assert plain[-3:] == ["--device", "cuda", "lstm"] and Path(plain[1]).exists()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    commands = gpu.check(["lstm"], "cuda")
    assert [command[:3] for command in commands] == [[str(tool), "--tool", name] for name in gpu.CHECKS]
    assert all(command[-len(plain) :] == plain for command in commands)
    assert gpu.check(["lstm"], "cpu") == [[*plain[:-2], "cpu", "lstm"]]


def test_a_part_ends_with_all_that_it_started_when_its_time_is_over(tmp_path, capfd):
    left = tmp_path / "left"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(left)!r}).write_text('still there')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    start = time.monotonic()
    wrong, seconds = gpu.run(gpu.Part("test", [python(code), python("print('never')")], 1.0))
    assert wrong == "stopped after 1 s" and 1.0 <= seconds == pytest.approx(time.monotonic() - start, abs=0.5)
    assert "never\n" not in capfd.readouterr().out.replace("print('never')", "")
    time.sleep(max(0.0, 5 - seconds))
    assert not left.exists()


def test_parts_that_fail_stop_no_other(monkeypatch, capfd):
    monkeypatch.setattr(gpu, "build", lambda: [python("raise SystemExit(3)"), python("print('not reached')")])
    monkeypatch.setattr(gpu, "test", lambda ops, device: [python("import time; time.sleep(60)")])
    monkeypatch.setattr(gpu, "check", lambda ops, device: [python("print('checked')")])
    monkeypatch.setattr(gpu, "bench", lambda ops, device, out, seconds: [python(f"print('measured', {seconds:.0f})")])
    monkeypatch.setitem(gpu.LIMITS, "test", 1.0)
    assert gpu.main(["--device", "cpu", "--seconds", "60"]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[-5].split() == ["build", lines[-5].split()[1], "s", "status", "3"]
    assert lines[-4].startswith("test ") and lines[-4].endswith("s  stopped after 1 s")
    assert lines[-3].startswith("check ") and lines[-3].endswith("s  ok")
    assert lines[-2].startswith("bench ") and lines[-2].endswith("s  ok") and lines[-1].startswith("whole ")
    assert any(line.startswith("measured 2") for line in lines), "the benchmarks have what is left"


def test_the_log_of_a_build_shows_its_end_where_it_fails(tmp_path, capfd):
    log = tmp_path / "build" / "gpu.log"
    code = "print(*range(500), sep='\\n'); raise SystemExit({})"
    for status in (0, 3):
        wrong, _ = gpu.run(gpu.Part("build", [python(code.format(status))], 60.0, log=log))
        shown = capfd.readouterr().out.splitlines()[3:]
        assert shown[-1] == "499" and len(shown) == (60 if status else 3) and bool(wrong) == bool(status)
    assert log.read_text().startswith("0\n1\n")


def test_no_part_begins_after_the_time(monkeypatch, capfd):
    monkeypatch.setattr(gpu, "build", lambda: [python("import time; time.sleep(60)")])
    assert gpu.main(["--device", "cpu", "--seconds", "1", "--only", "build bench"]) == 1
    assert capfd.readouterr().out.splitlines()[-2].endswith("0 s  no time left")


def test_what_is_not_built_although_it_could_be(monkeypatch, capsys):
    modules = {name: {"loaded": True, "reason": None} for name in ("_C", "_host")}
    modules["_C_cuda"] = {"loaded": False, "reason": "not built"}
    tools = {"c++", "cmake", "ninja"}
    report = subprocess.CompletedProcess([], 0, json.dumps({"modules": modules}))
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: report)
    for there, skipped, status in (("nvcc", "1", 1), ("nvcc", "0", 0), ("none", "1", 0)):
        monkeypatch.setattr(gpu.shutil, "which", lambda name, there=there: name in {there, *tools} or None)
        monkeypatch.setenv("FASTLM_CUDA", skipped)
        assert gpu.main(["--built"]) == status
    monkeypatch.setenv("FASTLM_BUILD", "0")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    assert gpu.main(["--built"]) == 0
    assert "_C_cuda    not built" in capsys.readouterr().out


def make(*arguments, **environment):
    command = ["make", "-s", "gpu", f"PYTHON={sys.executable}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line():
    status, out, err = make()
    lines = [line for line in err.splitlines() if not re.match(r"make(\[\d+\])?: ", line)]
    assert status == 2 and not out and len(lines) == 1 and "finds no GPU" in lines[0]


def test_an_unknown_word():
    status, _, err = make("ONLY=gru")
    assert status == 2 and "ONLY: 'gru' is none of build, test, check, bench, adaptive_softmax, cache" in err


def test_a_dry_run(tmp_path):
    """The tests and benchmarks of an operator, as on a GPU but for the device."""
    arguments = [f"OUT={tmp_path}", "ONLY=forget_mult", "ARGS=--device cpu"]
    status, out, err = make(*arguments, OMP_NUM_THREADS="1")
    assert status == 0, out + err
    assert [line.split()[0] for line in out.splitlines()[-4:]] == ["test", "check", "bench", "whole"]
    assert "forget_mult: impl=auto on cpu" in out
    assert any(path.suffix == ".json" for path in tmp_path.iterdir())
