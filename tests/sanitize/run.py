"""Builds the native modules with sanitizers, beside the tree, and runs the tests of the kernels and of the encoder.

    python tests/sanitize/run.py [address|thread ...] [arguments of pytest]

address: AddressSanitizer and UndefinedBehaviorSanitizer. thread: ThreadSanitizer, where threads of its own stand in for
OpenMP's (parallel_for.cpp). A report ends the process, so it fails the run. Needs Linux and g++ with its libraries.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "sanitize"
FLAGS = {
    "address": "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-sanitize=vptr",
    # That warning: a fence, which the sanitizer does not understand. Nor does it see what g++ inlines for a memcpy of a
    # few bytes: a race of parts of vectors stays unseen.
    "thread": "-fsanitize=thread -Werror=tsan",
}
LIBRARIES = {"address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so", "libstdc++.so")}
# With an abort Python's fault handler shows the test. Python leaks, and neither it nor PyTorch is instrumented.
COMMON = "abort_on_error=1:handle_abort=0"
OPTIONS = {
    # the frames that g++ puts on the heap to find uses after a return are not aligned for vectors of 64 bytes
    "ASAN_OPTIONS": f"{COMMON}:detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": f"{COMMON}:print_stacktrace=1",
    "TSAN_OPTIONS": f"{COMMON}:halt_on_error=1:ignore_noninstrumented_modules=1:die_after_fork=0",
    "OMP_NUM_THREADS": "3",
    "OMP_WAIT_POLICY": "passive",  # there may be fewer processors
}
# What calls no kernel, what compiles, and what measures the memory of the process.
LEFT_OUT = {
    "address": " and ".join(f"not {name}" for name in ("reference", "compile", "export", "registered", "memory", "gpu"))
}
# Threads do the same in every instruction set; the widest runs in the process itself.
LEFT_OUT["thread"] = LEFT_OUT["address"] + " and not (every_instruction_set and avx)"


def build(kind: str) -> Path:
    """A copy of the tree with its own build folder, so that only what changed is compiled again."""
    tree = BUILD / kind
    for folder in ("csrc", "fastlm"):
        shutil.rmtree(tree / folder, ignore_errors=True)
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.json"))
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree)
    for source in HERE.glob("*.cpp") if kind == "thread" else [HERE / "planted.cpp"]:
        shutil.copy2(source, tree / "csrc")
    flags = f"-O1 -g1 -fno-omit-frame-pointer {FLAGS[kind]}"
    options = f"-DCMAKE_BUILD_TYPE=Sanitize -DCMAKE_CXX_FLAGS='{flags}' -DCMAKE_MODULE_LINKER_FLAGS=-Wl,-Bsymbolic"
    environment = os.environ | {"CXX": "g++", "CMAKE_ARGS": options, "FASTLM_BUILD": "1", "FASTLM_CUDA": "0"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the {kind} build failed\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}")
    return tree


def library(name: str) -> str:
    path = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"g++ has no {name} (Debian: apt install g++)")
    return path


def run(kind: str, arguments: list[str]) -> subprocess.CompletedProcess:
    tree = build(kind)
    tests = [ROOT / "tests" / f"test_{path.stem}.py" for path in sorted((ROOT / "csrc").glob("*.cpp"))]
    tests = [
        HERE / "planted.py",
        ROOT / "tests" / "test_concurrent_calls.py",
        *(path for path in tests if path.exists()),
    ]
    environment = os.environ | OPTIONS | {"PYTHONPATH": str(tree), "TRITON_INTERPRET": "0"}  # no Triton
    # setarch: some kernels spread addresses wider than the sanitizers of older compilers can follow
    fixed = ["setarch", "-R"] if subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0 else []
    preload = " ".join(map(library, LIBRARIES[kind]))
    # not `python -m pytest`, which puts the tree itself first; captured in Python only, so that reports come through
    options = ["-p", "no:cacheprovider", "--capture=sys", "-r", "fE", "-k", LEFT_OUT[kind]]
    command = ["env", f"LD_PRELOAD={preload}", Path(sys.executable).with_name("pytest"), *options, *tests, *arguments]
    return subprocess.run([*fixed, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def main() -> int:
    kinds = [name for name in sys.argv[1:] if name in FLAGS] or list(FLAGS)
    arguments = [name for name in sys.argv[1:] if name not in FLAGS]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda kind: run(kind, arguments), kinds))
    for kind, result in zip(kinds, results, strict=True):
        output = re.sub(r"(?m)^[E ]+#\d\d+ .*\n", "", result.stdout + result.stderr)  # frames of Python and PyTorch
        print(f"==> {kind}: {'passed' if result.returncode == 0 else 'FAILED'}\n{output}")
    return max(result.returncode != 0 for result in results)


if __name__ == "__main__":
    sys.exit(main())
