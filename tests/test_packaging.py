"""What pip builds: pure or native, decided by what is there, and said in one line."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])


def tool(name):
    """A program of this environment or of the machine."""
    return shutil.which(name, path=SCRIPTS)


COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
BUILD_TOOLS = [name for name in (COMPILER, "cmake", "ninja", "ld", "as", "ar", "ranlib") if name and tool(name)]
PIP = "-m", "pip", "--disable-pip-version-check", "wheel", "-v", "--no-deps"
needs_compiler = pytest.mark.skipif(
    not all(map(tool, (COMPILER or "c++", "cmake", "ninja"))), reason="needs a C++ compiler, cmake and ninja"
)


@pytest.fixture
def source(tmp_path):
    """A copy of the tree with one operator's kernel, and with modules that an earlier build left behind."""
    tree = tmp_path / "source"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    for folder in ("fastlm", "csrc"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, tree)
    for path in (tree / "csrc").iterdir():
        if path.suffix in (".cpp", ".cu") and path.stem not in ("isa", "host", "host_lstm", "dropconnect"):
            path.unlink()
    for name in ("_C.so", "_C_cuda.so", f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"):
        (tree / "fastlm" / name).write_text("left behind")
    return tree


@pytest.fixture
def python(tmp_path):
    """An interpreter that has the packages of this one, but no build tool beside it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    executable = tmp_path / "venv" / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([executable, "-c", query], check=True, capture_output=True, text=True).stdout.strip()
    (Path(site) / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return executable


def build(python, source, *options, tools=(), **environment):
    """`pip wheel`, with nothing but `tools` on PATH; returns the exit status, the output and the wheel."""
    path = source.parent / "tools"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name in tools:
        (path / name).symlink_to(tool(name))
    environment = {key: value for key, value in os.environ.items() if key[:6] != "FASTLM"} | environment
    environment.pop("CXX", None)
    wheels = source.parent / "wheels"
    command = [python, *PIP, *options, "--wheel-dir", wheels, source]
    result = subprocess.run(
        command, env=environment | {"PATH": str(path)}, capture_output=True, text=True, cwd=source.parent
    )
    return result.returncode, result.stdout + result.stderr, next(wheels.glob("*.whl"), None)


def record(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("fastlm/_build.json"))


def native_modules(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.endswith(".so")}


def run_installed(wheel, code):
    """Run code where the wheel is installed and the tree is not."""
    folder = wheel.parent / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    result = subprocess.run(
        [sys.executable, "-c", f"import fastlm; assert fastlm.__file__.startswith({str(folder)!r}); {code}"],
        env=os.environ | {"PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


CALL = (
    "import torch; from fastlm.ops import dropconnect, which; w = torch.ones(5);"
    "print(which('dropconnect', w), dropconnect(w, 0.5, torch.tensor(3)).tolist())"
)


def test_isolated_build_is_pure_and_works(source):
    from fastlm.ops import dropconnect

    status, output, wheel = build(sys.executable, source)
    if "No matching distribution found for setuptools" in output:
        pytest.skip("pip cannot fetch setuptools for an isolated build here")
    assert status == 0, output
    assert wheel.name.endswith("-py3-none-any.whl")
    assert native_modules(wheel) == set()
    assert "no torch in the build environment" in record(wheel)["reason"]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("dist-info/WHEEL"))
        assert "Root-Is-Purelib: true" in archive.read(metadata).decode()
    files = [*(ROOT / "fastlm").rglob("*.py"), *(ROOT / "fastlm").rglob("*.toml")]
    assert {str(path.relative_to(ROOT)) for path in files} <= names

    import torch

    expected = dropconnect(torch.ones(5), 0.5, torch.tensor(3), impl="reference").tolist()
    assert run_installed(wheel, CALL) == f"reference {expected}"


@needs_compiler
def test_build_without_isolation_is_native_and_works(source):
    pytest.importorskip("pybind11")
    # The operator of CONTRIBUTING.md comes along: new files are built with no other edit.
    for language, place in (("python", "fastlm/ops/scale.py"), ("cpp", "csrc/scale.cpp")):
        text = (ROOT / "CONTRIBUTING.md").read_text().partition(f"```{language}\n")[2]
        (source / place).write_text(text.partition("```")[0])
    options = {"tools": BUILD_TOOLS, "FASTLM_BUILD": "1", "FASTLM_CUDA": "0"}
    status, output, wheel = build(sys.executable, source, "--no-build-isolation", **options)
    assert status == 0, output
    assert "none-any" not in wheel.name
    assert "fastlm/_C.so" in native_modules(wheel) and "fastlm/_C_cuda.so" not in native_modules(wheel)
    assert record(wheel)["reason"] is None
    assert {f"fastlm/{name}" for name in record(wheel)["modules"]} == native_modules(wheel)
    assert run_installed(wheel, CALL).startswith("cpu ")
    code = "import torch; from fastlm.ops.scale import scale; x = torch.arange(5.0, requires_grad=True);"
    code += "y = scale(x, 3.0, impl='cpu'); y.sum().backward(); print(y.tolist(), x.grad.tolist())"
    assert run_installed(wheel, code) == "[0.0, 3.0, 6.0, 9.0, 12.0] [3.0, 3.0, 3.0, 3.0, 3.0]"


@pytest.mark.parametrize(
    ("tools", "missing"),
    [((), "no C++ compiler"), (("c++",), "no cmake"), (("c++", "cmake"), "no ninja")],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_one_line_says_what_is_missing(source, python, tools, missing):
    if not all(map(tool, tools)):
        pytest.skip(f"needs {' and '.join(tools)}")
    status, output, wheel = build(python, source, "--no-build-isolation", tools=tools)
    assert status == 0, output
    assert wheel.name.endswith("-py3-none-any.whl") and native_modules(wheel) == set()
    lines = [line.strip() for line in output.splitlines() if line.strip().startswith("fastlm: ")]
    assert len(lines) == 1 and lines[0].startswith(f"fastlm: {missing}")
    assert record(wheel)["reason"].startswith(missing)

    status, output, _ = build(python, source, "--no-build-isolation", tools=tools, FASTLM_BUILD="1")
    assert status != 0
    assert f"FASTLM_BUILD=1 but {missing}" in output


@needs_compiler
def test_without_pybind11_the_kernels_are_built(source, tmp_path):
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "pybind11.py").touch()
    options = {"tools": BUILD_TOOLS, "FASTLM_CUDA": "0", "PYTHONPATH": str(fake)}
    status, output, wheel = build(sys.executable, source, "--no-build-isolation", **options)
    assert status == 0, output
    assert native_modules(wheel) == {"fastlm/_C.so"}
    assert "fastlm: no pybind11 (pip install pybind11); native modules: _C.so" in output
    status, output, _ = build(sys.executable, source, "--no-build-isolation", FASTLM_BUILD="1", **options)
    assert status != 0 and "FASTLM_BUILD=1 but no pybind11" in output


@needs_compiler
def test_a_source_that_does_not_compile(source):
    pytest.importorskip("pybind11")
    for path in (source / "csrc").glob("*.c*"):
        path.unlink()
    (source / "csrc" / "isa.cpp").write_text("#error broken\n")
    options = {"tools": BUILD_TOOLS, "FASTLM_CUDA": "0"}
    status, output, wheel = build(sys.executable, source, "--no-build-isolation", **options)
    assert status == 0, output
    assert "fastlm: the native build failed" in output
    assert native_modules(wheel) == set() and "the native build failed" in record(wheel)["reason"]
    status, output, _ = build(sys.executable, source, "--no-build-isolation", FASTLM_BUILD="1", **options)
    assert status != 0 and "FASTLM_BUILD=1 but the native build failed" in output


def test_settings_of_the_build(source, python):
    status, output, wheel = build(python, source, "--no-build-isolation", tools=("c++",), FASTLM_BUILD="0")
    assert status == 0, output
    assert record(wheel)["reason"] == "FASTLM_BUILD=0"
    status, output, _ = build(python, source, "--no-build-isolation", FASTLM_BUILD="yes")
    assert status != 0
    assert "FASTLM_BUILD must be auto, 0 or 1, got 'yes'" in output


def test_torch_is_never_imported(source, python, tmp_path):
    fake = tmp_path / "fake" / "torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise SystemExit('torch was imported')\n")
    status, output, wheel = build(python, source, "--no-build-isolation", PYTHONPATH=str(fake.parent))
    assert status == 0, output
    assert "no C++ compiler" in record(wheel)["reason"]  # so torch was looked for, and found


def test_sdist_can_build_everything(source):
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(source.parent)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with tarfile.open(source.parent / result.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(source)) for path in (source / "csrc").iterdir()}
    assert sources | {"setup.py", "CMakeLists.txt", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("given", "status"), [([], 2), (["RECIPE=r"], 2), (["DATA=d"], 2), (["RECIPE=r", "DATA=d"], 0)]
)
def test_make_reproduce_needs_a_recipe_and_a_text(given, status, tmp_path):
    command = ["make", "--dry-run", "reproduce", f"VENV={tmp_path / 'venv'}", *given]
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    if status:
        assert "needs RECIPE=... and DATA=..." in result.stderr and len(result.stderr.splitlines()) == 1
        assert not result.stdout
    else:
        where = "--results benchmarks/results/reproduction"
        assert f'fastlm reproduce --recipe "r" --data "d" {where}' in result.stdout.splitlines()[-1]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["demo", "test", "sanitize"])
def test_make_installs_torch_first_and_alone(target, tmp_path):
    command = ["make", "--dry-run", target, f"VENV={tmp_path / 'venv'}", "TORCH=torch==9.9", "PYTHON=python9"]
    # without what a make that runs this test hands down
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert lines[1] == f"python9 -m venv {tmp_path / 'venv'}"
    pip = [line for line in lines if "pip install" in line]
    assert pip[0].endswith('bin/pip install "torch==9.9"')
    assert len(pip) == 3 and "cmake" in pip[1] and pip[2].endswith('pip install --no-build-isolation -e ".[plot,test]"')
