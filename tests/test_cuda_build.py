"""Every CUDA source compiles for Ampere and Hopper without a spill or a stack frame, where nvcc is at hand."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
MAX_REGISTERS = 64  # these kernels live on bandwidth: 64 registers keep four blocks of 256 threads a multiprocessor


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/*.cu")), ids=lambda path: path.stem)
def test_resources(source, arch, tmp_path):
    include = ["-isystem", str(TORCH / "include")]
    defines = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "--expt-relaxed-constexpr"]
    command = ["nvcc", "-std=c++20", "-O3", f"-arch={arch}", "--cubin", "-Xptxas", "-v", *include, *defines]
    done = subprocess.run([*command, str(source), "-o", str(tmp_path / "a.cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers",
        done.stderr,
    )
    assert kernels, done.stderr
    for stack, stores, loads, registers in kernels:
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), done.stderr
        assert int(registers) <= MAX_REGISTERS, done.stderr
