"""Every CUDA kernel is there for Ampere and Hopper, without a spill or a stack frame, by what its assembler said.

The build keeps that beside each object (csrc/ptxas_report.cmake). Where there is no report of the sources as they are,
they are compiled here, side by side.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
OBJECTS = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeFiles" / "_C_cuda.dir" / "csrc"
ARCHES = ("sm_80", "sm_90")
# Most kernels live on bandwidth: 64 registers keep four blocks of 256 threads a multiprocessor. Those that keep the
# weights of an LSTM, or tiles of scores, have a multiprocessor to themselves, 256 threads that may fill it; for pooling
# 16 warps do, each with 4 KB or more on their way.
REGISTERS, MAX_REGISTERS = (
    64,
    {"qrnn_pool": 128, **dict.fromkeys(("lstm_forward", "lstm_backward", "cache_attention"), 255)},
)
SOURCES = [path for path in sorted(ROOT.glob("csrc/*.cu")) if "__global__" in path.read_text()]


class Kernel(NamedTuple):
    name: str
    arch: str
    registers: int
    memory: tuple[int, ...]  # bytes: stack frame, spill stores, spill loads


def kernels(report: str) -> list[Kernel]:
    """What a report says; a function that was not inlined counts as a kernel of its own, as it may spill too."""
    found, entry, arch = [], "", ""
    for line in report.splitlines():
        if begun := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            entry, arch = begun.groups()
        elif name := re.search(r"Function properties for (\w+)", line):
            found.append(Kernel(name[1], arch, 0, ()))
        elif memory := re.match(r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[-1] = found[-1]._replace(memory=tuple(map(int, memory.groups())))
        elif registers := re.search(r"Used (\d+) registers", line):
            count = int(registers[1])
            found = [k._replace(registers=count) if (k.name, k.arch) == (entry, arch) else k for k in found]
    return found


def included(path: Path) -> set[Path]:
    """A source and the headers of the tree that it includes, directly or not."""
    names = re.findall(r'^#include "([\w.]+)"', path.read_text(), re.MULTILINE)
    headers = {path.with_name(name) for name in names if path.with_name(name).exists()}
    return {path}.union(*map(included, headers))


def kept(source: Path) -> str | None:
    """The report of the build, if it is of the source as it is."""
    path = OBJECTS / f"{source.name}.o.ptxas"
    times = [file.stat().st_mtime for file in included(source)]
    return path.read_text() if path.exists() and path.stat().st_mtime >= max(times) else None


def compiled(source: Path, arch: str, folder: Path) -> str:
    include = ["-isystem", str(TORCH / "include")]
    defines = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "--expt-relaxed-constexpr"]
    command = ["nvcc", "-std=c++20", "-O3", f"-arch={arch}", "--cubin", "-Xptxas", "-v", *include, *defines]
    out = folder / f"{source.stem}.{arch}"
    done = subprocess.run([*command, str(source), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The kernels of each source: of the build, or compiled for what it lacks."""
    reports = {source: kernels(kept(source) or "") for source in SOURCES}
    missing = [
        (source, arch)
        for source, there in reports.items()
        for arch in ARCHES
        if arch not in {kernel.arch for kernel in there}
    ]
    if missing and shutil.which("nvcc") is None:
        pytest.skip("no nvcc, and no report of a build")
    folder = tmp_path_factory.mktemp("cubin")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = pool.map(lambda one: compiled(*one, folder), missing)
        for (source, _), text in zip(missing, texts, strict=True):
            reports[source] += kernels(text)
    return reports


def declared(source: Path) -> set[str]:
    """The kernels that a source defines."""
    text = re.sub(r"__launch_bounds__\([^)]*\)", "", source.read_text())
    return set(re.findall(r"__global__\s+void\s+(\w+)\(", text))


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_resources(source, arch, found):
    there = [kernel for kernel in found[source] if kernel.arch == arch]
    listed = "\n".join(f"{k.registers:4} registers, stack and spills {k.memory}: {k.name}" for k in there)
    print(f"{source.name}, {arch}\n{listed}")
    assert there, f"{source.name} has no kernel for {arch}"
    for name in declared(source):
        assert any(name in kernel.name for kernel in there), f"no instantiation of {name}\n{listed}"
    most = MAX_REGISTERS.get(source.stem, REGISTERS)
    for kernel in there:
        assert kernel.memory == (0, 0, 0) and kernel.registers <= most, f"at most {most} registers, no spill\n{listed}"


def test_what_a_report_says(tmp_path):
    """A spill, a function beside a kernel, an architecture that is not there."""
    report = """ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_Zfirst' for 'sm_80'
ptxas info    : Function properties for _Zfirst
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for _Zbeside
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : Compiling entry function '_Zsecond' for 'sm_90'
ptxas info    : Function properties for _Zsecond
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers
"""
    first, beside, second = kernels(report)
    assert first.name == "_Zfirst" and first.arch == "sm_80" and first.memory == (8, 4, 12)
    assert first.registers == 255 and beside == Kernel("_Zbeside", "sm_80", 0, (16, 0, 0))
    assert second == Kernel("_Zsecond", "sm_90", 40, (0, 0, 0))
    source = tmp_path / "a.cu"
    source.write_text('#include "b.h"\n__global__ void __launch_bounds__(kOne, 2)\n    a_kernel(int) {}')
    (tmp_path / "b.h").write_text('#include "c.h"\n')
    assert declared(source) == {"a_kernel"} and included(source) == {source, tmp_path / "b.h"}


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@pytest.mark.parametrize("status", [0, 3])
def test_the_build_keeps_the_report_and_says_the_rest(tmp_path, status):
    kept = """ptxas info    : 28 bytes gmem
ptxas /tmp/a; b.ptx, line 2; warning : Advisory: '.multicast::cluster' [elsewhere]
ptxas info    : Function properties for _Za
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    compiler, out = tmp_path / "nvcc", tmp_path / "a.cu.o"
    compiler.write_text(f"cat >&2 <<'END'\n{kept}a.cu(3): warning: [x]; unused\nEND\nexit {status}\n")
    (tmp_path / "a.cu.o.ptxas").write_text("of an earlier build")
    script = ROOT / "csrc" / "ptxas_report.cmake"
    command = ["cmake", "-P", str(script), "--", "sh", str(compiler), "-c", "a.cu", "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == (status == 0) and "a.cu(3): warning: [x]; unused" in done.stderr
    assert "ptxas" not in done.stderr.replace("ptxas_report.cmake", "")
    report = tmp_path / "a.cu.o.ptxas"
    assert report.read_text() == kept.replace(";", ",") if status == 0 else not report.exists()
