"""Runs the benchmarks for `fastlm bench`: in a process of their own, then the table, the files and the comparison."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from compare import check_same, compare, lines, read_old
from measure import GPU_LOST
from plots import draw
from report import as_markdown, as_text

from fastlm.errors import FastlmError
from fastlm.machine import describe
from fastlm.training.checkpoint import write_file

FOLDER = Path(__file__).resolve().parent
OUT_OF_TIME = 124
AFTER_THE_LAST = 15  # seconds that the case under way at the end of --seconds may take longer
BENCHMARKS = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


def run(args: Namespace) -> tuple[int, dict[str, Any]]:
    """Measure, print, write, compare.

    Returns:
        The exit status, 1 after a failure or a slowdown, and everything for JSON.

    Raises:
        FastlmError: something is missing or given wrong. OSError: the folder of results cannot be written.
    """
    ops, device = _ops(args.op), _device(args.device)
    for package in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(package) is None:
            raise FastlmError(f"the benchmarks need {package}: pip install pytest-benchmark matplotlib")
    old = read_old(args.compare) if args.compare is not None else None
    if old is not None:
        check_same(old, describe(device))
    out = FOLDER / "results" if args.out is None else Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # better to fail now than after all the work

    found = _measure(ops, device, "tiny" if args.tiny else "quick" if args.quick else "full", args.seconds)
    print(as_text(found))
    verdict = None if old is None else compare(old, found)
    if verdict is not None:
        print("\n".join(lines(verdict)))
    # Parts of a run never take the place of a whole one, nor do the figures of a tiny one.
    parts = [*(args.op or []), *(["tiny"] if args.tiny else [])]
    files = _write(found, out, "-".join([found["machine"], *dict.fromkeys(parts)]))
    print("\n".join(f"wrote {path}" for path in files), file=sys.stderr)
    status = 1 if found["failures"] or (verdict and verdict["slower"]) else 0
    return status, {**found, "comparison": verdict, "files": [str(path) for path in files]}


def _ops(names: list[str] | None) -> list[str]:
    for name in names or ():
        if name not in BENCHMARKS:
            raise FastlmError(f"--op: there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return names or BENCHMARKS


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise FastlmError(f"--device must be auto, cpu or cuda, got {name}")
    if name == "cuda" and not torch.cuda.is_available():
        raise FastlmError("--device cuda: this PyTorch finds no GPU")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def _measure(ops: list[str], device: str, size: str, seconds: float | None = None) -> dict[str, Any]:
    """Run pytest; what it and the cases say goes to stderr. A case that ends the process costs no other one."""
    end = None if seconds is None else time.monotonic() + seconds
    files = [str(FOLDER / f"bench_{op}.py") for op in ops]
    with tempfile.TemporaryDirectory(prefix="fastlm-bench-") as folder:
        results = Path(folder) / "results.json"
        command = [sys.executable, "-m", "pytest", *files, "-s", "-q", "--no-header", "--tb=short", "-W", "ignore"]
        command += ["-c", str(FOLDER.parent / "pyproject.toml"), "-p", "no:cacheprovider", "--benchmark-quiet"]
        command += ["--size", size, "--device", device, "--results", str(results)]
        while True:
            left = None if end is None else max(1.0, end - time.monotonic())
            limits = [] if left is None else ["--seconds", str(left)]
            status = _pytest([*command, *limits], folder, None if left is None else left + AFTER_THE_LAST)
            if not results.exists():
                raise FastlmError(f"no case was measured on {device} (pytest's status {status})")
            found = json.loads(results.read_text())
            running = found.pop("running", None)
            if status == OUT_OF_TIME:
                found["not_measured"] += [running] if running else []
                return found
            if running is not None:
                found["failures"][running] = f"the process ended: {_name(status)}"
                results.write_text(json.dumps(found))
            elif status < 0:
                raise FastlmError(f"the benchmarks died of {_name(status)}, after the last line above")
            if 0 <= status != GPU_LOST:
                return found


def _pytest(command: list[str], folder: str, limit: float | None) -> int:
    """The exit status; its own temporary files go with the folder, however it ends."""
    environment = {**os.environ, "TMPDIR": folder, "KINETO_LOG_LEVEL": "99"}
    try:
        done = subprocess.run(command, cwd=FOLDER.parent, stdout=sys.stderr, env=environment, timeout=limit)
        return done.returncode
    except subprocess.TimeoutExpired:
        return OUT_OF_TIME


def _name(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def _write(found: dict[str, Any], out: Path, name: str) -> list[Path]:
    files: dict[str, str | bytes] = {
        f"{name}.json": json.dumps(found, indent=1) + "\n",
        f"{name}.md": f"# Benchmarks on {found['machine']}\n\n{as_markdown(found)}\n",
    }
    files |= {f"{name}-{kind}.png": picture for kind, picture in draw(found).items()}
    for path, content in files.items():
        write_file(out / path, content)
    return [out / path for path in files]
