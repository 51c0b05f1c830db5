"""What the native modules define and what they refer to: code for each machine, the stable ABI, every source."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeFiles"
INSTRUCTION_SETS = ("avx2", "avx512", "avx512_bf16")
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")


def module(name):
    """A native module of the tree under test."""
    path = ROOT / "fastlm" / name
    if not path.exists():
        pytest.skip(f"no {name} was built")
    return path


def symbols(path, *options):
    """(type, name) of the symbols of an object file or module."""
    result = subprocess.run(["nm", *options, path], capture_output=True, text=True, check=True)
    return [line.split()[-2:] for line in result.stdout.splitlines() if line.strip()]


@needs_nm
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_wider_kernels_share_no_code(instruction_set):
    """A weak symbol of an AVX-512 unit may be the copy that the linker keeps for all: code a machine may lack."""
    objects = list((OBJECTS / f"kernels_{instruction_set}.dir" / "csrc").glob("*.o"))
    if not objects:
        pytest.skip(f"no kernels for {instruction_set} were built in this tree")
    for path in objects:
        for kind, name in symbols(path, "--defined-only"):
            if name.startswith("DW.ref."):  # a pointer to the runtime's own function, the same in every unit
                continue
            assert kind not in "WwVvu", f"{path.name} defines {name}, which other units may share"
            if kind.isupper():
                assert name.startswith(f"_ZN6fastlm{len(instruction_set)}{instruction_set}"), name


@needs_nm
@pytest.mark.parametrize("name", ["_C.so", "_C_cuda.so"])
def test_modules_use_the_stable_abi_only(name):
    for _, symbol in symbols(module(name), "-D", "--undefined-only"):
        assert not any(part in symbol for part in ("N2at", "N3c10", "N5torch", "Py")), symbol


@pytest.mark.parametrize("name", ["_C.so", "_C_cuda.so"])
def test_every_source_is_in_its_module(name):
    content = module(name).read_bytes()
    sources = (ROOT / "csrc").glob("*.cpp" if name == "_C.so" else "*.cu")
    for stem in {path.stem for path in sources} - {"host", "host_lstm", "isa"}:
        assert stem.encode() in content, f"{name} registers nothing of {stem}"


@pytest.mark.parametrize("name", ["_C.so", "_C_cuda.so"])
def test_no_path_of_the_machine_that_built_it(name):
    """Errors raised in a kernel name their source file; it is to be that of the project, not where it was built."""
    content = module(name).read_bytes()
    assert b"csrc/common.h" in content
    assert not re.search(rb"/csrc/[a-z_]+\.(cpp|cu|h|cuh)\0", content.replace(b"torch/csrc/", b""))
    assert str(ROOT).encode() + b"/" not in content and b"site-packages" not in content


def test_cuda_module_is_built_where_nvcc_is():
    build_record = ROOT / "fastlm" / "_build.json"
    if shutil.which("nvcc") is None or not build_record.exists() or os.environ.get("FASTLM_CUDA") == "0":
        pytest.skip("no nvcc, or no native build was wanted")
    if not (ROOT / "fastlm" / "_C.so").exists():
        pytest.skip("no native build")
    assert "_C_cuda.so" in json.loads(build_record.read_text())["modules"]


def test_cuda_module_asks_for_the_library_of_its_functions():
    """PyTorch loads libtorch_cuda.so for itself alone: a module that does not name it finds no symbol of it."""
    import torch

    from fastlm import _lib

    assert b"libtorch_cuda.so" in module("_C_cuda.so").read_bytes()
    if torch.version.cuda is not None and Path(_lib.__file__).parent == ROOT / "fastlm":
        assert _lib.status["_C_cuda"] is None
