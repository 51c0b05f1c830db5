"""`make gpu`: builds what can be built, runs every test that is marked gpu, then the benchmarks, within nine minutes.

    make gpu                          build, test, check, bench
    make gpu ONLY="test"              one part; also "build", "check" and "bench"
    make gpu ONLY="qrnn_pool lstm"    the tests and benchmarks of these operators
    make gpu ONLY="build bench lstm"  parts of operators

"check" runs each CUDA kernel on a tiny problem under NVIDIA's compute-sanitizer, where that is installed.

It takes the interpreter and the packages that are here: no virtual environment, no network. A part has a limit and
leaves what it does not use to the benchmarks, which measure in the order of worth and write what they have when time
is up. A part that fails stops no other; the last lines say how each went, and the exit status is 1 if one failed, 2
where there is no GPU. With --device cpu it tries itself out where there is none: tests of operators in Triton's
interpreter, benchmarks of tiny shapes.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("build", "test", "check", "bench")
MODULES = ("_C", "_C_cuda", "_host")
LIMITS = {"build": 150.0, "test": 200.0, "check": 60.0}  # seconds; the benchmarks have what is left
CHECKS = ("memcheck", "racecheck", "synccheck")
SECONDS = 525.0  # of all parts, for the whole to end within nine minutes
TO_WRITE = 30.0  # seconds that the benchmarks get after their last case began, for table, plots and files
WORKERS = 4  # processes of tests that share the GPU: most of their time goes to compilers on the CPU


NO_TESTS = 5  # pytest's status where an operator has no test of the kind


class Part(NamedTuple):
    """A part of the run.

    Attributes:
        name: of the part. commands: what it runs in turn. limit: its seconds. right: what may be its status.
        log: the file that its output goes to, of which the end is shown where it fails.
    """

    name: str
    commands: list[list[str]]
    limit: float
    right: tuple[int, ...] = (0,)
    log: Path | None = None


def operators() -> list[str]:
    """What has tests or benchmarks on a GPU: the operators, and training."""
    sources = (path.read_text() for path in (ROOT / "fastlm" / "ops").glob("[a-z]*.py"))
    return sorted({"training"}.union(*(re.findall(r'_lib\.declare\(\s*"(\w+)"', source) for source in sources)))


def choose(only: Sequence[str]) -> tuple[list[str], list[str]]:
    """The parts and the operators that the words of ONLY ask for; no operators are all of them.

    Raises:
        ValueError: a word is neither.
    """
    known = operators()
    for word in only:
        if word not in PARTS and word not in known:
            raise ValueError(f"ONLY: {word!r} is none of {', '.join([*PARTS, *known])}")
    parts, ops = [p for p in PARTS if p in only], [word for word in only if word not in PARTS]
    if not parts:
        parts = list(PARTS[1:] if ops else PARTS)
    elif ops and parts == ["build"]:
        parts = list(PARTS)
    return parts, ops


def build() -> list[list[str]]:
    install = ["-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    return [[sys.executable, *install], [sys.executable, __file__, "--built"]]


def test(ops: Sequence[str], device: str) -> list[list[str]]:
    """pytest over the tests that are marked; on a CPU over those of the same table that are not."""
    files = [str(ROOT / "tests" / name) for name in ("test_gpu.py", "test_gpu_streams.py")]
    if device == "cuda":
        own = [path for op in ops for path in sorted((ROOT / "tests").glob(f"test_{op.removesuffix('_mask')}*.py"))]
        files = [*files, *map(str, dict.fromkeys(own))] if ops else [str(ROOT / "tests")]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-rfE", "--tb=short", "--durations=8"]
    command += ["-p", "no:cacheprovider", "-m", "gpu" if device == "cuda" else "not gpu"]
    command += ["-k", " or ".join(ops)] if ops else []
    if device == "cuda" and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(WORKERS)]
    return [command]


def check(ops: Sequence[str], device: str) -> list[list[str]]:
    """Each CUDA kernel on a tiny problem, once under each tool of compute-sanitizer, of the CUDA toolkit."""
    run = [sys.executable, str(ROOT / "tests" / "tiny_kernels.py"), "--device", device, *ops]
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(home))
    if tool is None or device == "cpu":
        print("make gpu: no compute-sanitizer here: the kernels run without it", flush=True)
        return [run]
    ours = ["--kernel-name", "kernel_substring=fastlm", "--error-exitcode", "1"]  # else the libraries' take minutes
    return [[tool, "--tool", name, *ours, *run] for name in CHECKS]


def bench(ops: Sequence[str], device: str, out: str | None, seconds: float) -> list[list[str]]:
    """`fastlm bench` over the operators that have one; on a CPU on tiny shapes, in a folder that git ignores."""
    if device == "cpu" and out is None:
        out = str(ROOT / "build" / "gpu")
    found = [op for op in ops if (ROOT / "benchmarks" / f"bench_{op}.py").exists()]
    if ops and not found:
        return []
    command = [sys.executable, "-m", "fastlm.cli", "bench", "--device", device, "--seconds", f"{seconds:.0f}"]
    command += ["--out", out] if out else []
    return [[*command, *(["--tiny"] if device == "cpu" else []), *(["--op", *found] if found else [])]]


def environment(name: str) -> dict[str, str]:
    """The tree comes before an installed package; processes of tests share the cores."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = str(max(1, (os.cpu_count() or 1) // WORKERS))
    shared = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": "1"} if name == "test" else {}
    return {**shared, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run(part: Part) -> tuple[str | None, float]:
    """Run a part in processes that end with it; returns what went wrong, or None, and its seconds."""
    start, wrong, into = time.monotonic(), None, None
    print(f"\n==> {part.name}, at most {part.limit:.0f} s", flush=True)
    if part.log is not None:
        part.log.parent.mkdir(exist_ok=True)
        into = part.log.open("w")
    for command in part.commands:
        print("+", *command, flush=True)
        # A group of its own, so that what it has started ends with it, and by SIGINT, which a shell's & would ignore.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(part.name),
            start_new_session=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
            stdout=into,
            stderr=into,
        )
        try:
            left = max(0.1, part.limit - (time.monotonic() - start))
            status = process.wait(left)
            wrong = None if status in part.right else f"status {status}"
        except subprocess.TimeoutExpired:
            wrong = f"stopped after {part.limit:.0f} s"
        finally:
            end(process)
        if wrong:
            break
    if into is not None:
        into.close()
        lines = part.log.read_text(errors="replace").splitlines()
        print(*lines[-60 if wrong else -len(MODULES) :], sep="\n", flush=True)
    return wrong, time.monotonic() - start


def end(process: subprocess.Popen) -> None:
    """End a process and all of its group: as Ctrl-C does first, for pytest to say what failed until then."""
    for number, grace in ((signal.SIGINT, 8.0), (signal.SIGKILL, 5.0)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.built:
        return built()
    begin = time.monotonic()
    try:
        names, ops = choose(options.only.replace(",", " ").split())
    except ValueError as e:
        print(f"make gpu: {e}", file=sys.stderr)
        return 2
    if importlib.util.find_spec("torch") is None:
        print(f"make gpu: {sys.executable} has no PyTorch; make gpu PYTHON=... takes another", file=sys.stderr)
        return 2
    if options.device == "cuda" and not has_gpu():
        print("make gpu: this PyTorch finds no GPU; --device cpu tries the target out on a CPU", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that parts end with this process
    lines, failed = [], False
    for name in names:
        left = options.seconds - (time.monotonic() - begin)
        if name == "bench":
            commands = bench(ops, options.device, options.out, max(1.0, left - TO_WRITE))
        else:
            commands = build() if name == "build" else (test if name == "test" else check)(ops, options.device)
            left = min(left, LIMITS[name])
        right = (0, NO_TESTS) if name == "test" and ops else (0,)
        log = ROOT / "build" / "gpu.log" if name == "build" else None  # of compilers, which say much
        wrong, seconds = run(Part(name, commands, left, right, log)) if left > 0 else ("no time left", 0.0)
        failed |= wrong is not None
        lines.append(f"{name:6} {seconds:5.0f} s  {wrong or 'ok'}")
    print("", *lines, f"whole  {time.monotonic() - begin:5.0f} s", sep="\n", flush=True)
    return int(failed)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--only", default="", help=f"parts ({', '.join(PARTS)}) and operators, separated by blanks")
    made.add_argument("--out", help="folder of the results; default: benchmarks/results")
    made.add_argument("--seconds", type=float, default=SECONDS, help=f"for all parts, default {SECONDS:.0f}")
    made.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: try the target out without a GPU")
    made.add_argument("--built", action="store_true", help="say what was built, with status 1 if something should be")
    return made


def has_gpu() -> bool:
    """In a process of its own, which gives back the memory of its context."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def build_is_wanted() -> bool:
    """Whether native modules can and should be built."""
    tools = any(map(shutil.which, ("c++", "g++", "clang++"))) and shutil.which("cmake") and shutil.which("ninja")
    return bool(tools) and os.environ.get("FASTLM_BUILD") != "0"


def built() -> int:
    """Print what was built; 1 if a module is not there although its compiler is."""
    done = subprocess.run([sys.executable, "-m", "fastlm.info", "--json"], capture_output=True, text=True, check=True)
    modules = {name: json.loads(done.stdout)["modules"][name] for name in MODULES}
    wanted = {"_C"} if build_is_wanted() else set()
    if wanted and shutil.which("nvcc") and os.environ.get("FASTLM_CUDA") != "0":
        wanted.add("_C_cuda")
    for name, module in modules.items():
        print(f"{name:10} {module['reason'] or 'loaded'}")
    return int(any(not modules[name]["loaded"] for name in wanted))


if __name__ == "__main__":
    sys.exit(main())
