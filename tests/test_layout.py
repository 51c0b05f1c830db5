"""The shape of the tree: one operator one stem, sizes, the direction of imports, what importing costs."""

import ast
import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastlm"
PUBLIC_OPS = {
    "adaptive_softmax",
    "cache_attention",
    "cache_distribution",
    "dropconnect",
    "dropconnect_mask",
    "embedding_dropout",
    "forget_mult",
    "linear_cross_entropy",
    "locked_dropout",
    "lstm",
    "qrnn_pool",
}
NOT_OPS = {"philox"}  # what operators share, beside the modules with a leading underscore
# Each part of the package and the parts that it may import.
MAY_IMPORT = {
    "errors": set(),
    "machine": {"_lib"},
    "recipes": set(),
    "triton": set(),
    "_lib": set(),
    "data": {"errors", "_host"},
    "optim": {"errors"},
    "ops": {"_lib", "errors", "triton"},
    "nn": {"ops", "errors"},
    "models": {"nn", "ops", "errors"},
    "training": {"models", "nn", "ops", "data", "optim", "errors", "machine"},
    "testing": {"_lib", "ops"},
    "info": {"_lib", "_host", "ops", "errors"},
    "bench": {"errors"},
    "cli": {"training", "models", "nn", "ops", "data", "optim", "errors", "info", "bench"},
}


def relative(path):
    return str(path.relative_to(ROOT))


def package_files():
    return sorted(PACKAGE.rglob("*.py"))


def op_files():
    return sorted(p for p in (PACKAGE / "ops").glob("*.py") if p.stem[0] != "_" and p.stem not in NOT_OPS)


def imports(path):
    """The full names of all that a file imports, at any depth of its code."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            # "from fastlm import ops" imports a module, so the name belongs to what is imported
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", op_files(), ids=relative)
def test_an_op_is_one_stem(path):
    assert (ROOT / "tests" / f"test_{path.stem}.py").exists()
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "an op file starts with its mathematics"
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == path.stem]
    assert public, f"{path.name} defines no {path.stem}()"
    assert "impl" in [argument.arg for argument in public[0].args.kwonlyargs]


def test_other_folders_use_the_stems_of_the_ops():
    stems = {path.stem for path in op_files()}
    sources = {path.stem for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".cu")}
    parts = {stem for stem in sources if stem.rpartition("_")[0] in stems}  # of an operator: lstm_forward
    assert sources - parts <= stems | {"host", "host_lstm", "isa", "matmul"}
    assert {path.stem for path in (PACKAGE / "triton").glob("*.py")} <= stems | {"__init__", "common"}
    benches = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert benches == stems | {"host", "training"}


def test_a_header_is_what_two_files_share():
    """Or a part of an operator, by its name: lstm_ways.cuh."""
    stems = {path.stem for path in op_files()}
    files = [path for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".cu", ".h", ".cuh")]
    headers = [path for path in files if path.suffix in (".h", ".cuh")]
    files += (ROOT / "tests" / "emulator").glob("*.cpp")
    for header in headers:
        users = [path.name for path in files if f'#include "{header.name}"' in path.read_text()]
        part = header.suffix == ".cuh" and header.stem.rpartition("_")[0] in stems
        assert len(users) >= (1 if part else 2), f"{header.name} is used by {users} alone"


def test_public_ops():
    import fastlm.ops

    assert set(fastlm.ops.__all__) == PUBLIC_OPS | {"which"}
    assert {path.stem for path in op_files()} == PUBLIC_OPS - {"dropconnect_mask"}
    for name in PUBLIC_OPS:
        impl = inspect.signature(getattr(fastlm.ops, name)).parameters["impl"]
        assert impl.kind is impl.KEYWORD_ONLY and impl.default == "auto", name


def test_sizes():
    limits = {"setup.py": 120, "CMakeLists.txt": 90}
    files = [ROOT / name for name in limits]
    for folder in ("fastlm", "csrc", "tests", "benchmarks"):
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".toml")]
    lines = {relative(path): len(path.read_text().splitlines()) for path in files}
    too_long = {name: count for name, count in lines.items() if count > limits.get(name, 500)}
    assert not too_long, "past 500 lines a file holds two ideas"
    long = [f"{name} ({count})" for name, count in sorted(lines.items()) if count > 300]
    if long:
        warnings.warn(f"a file should seldom have more than 300 lines: {', '.join(long)}", stacklevel=1)


def test_every_variable_of_the_environment_is_in_the_table():
    sources = (".py", ".cpp", ".cu", ".cuh", ".h")
    files = [path for folder in ("fastlm", "csrc", "tests") for path in (ROOT / folder).rglob("*.[chp]*")]
    files.append(ROOT / "setup.py")
    read = re.compile(r"""(?:environ(?:\.get)?[\[(]|getenv\()"(FASTLM_\w+)""")
    used = {name for path in files if path.suffix in sources for name in read.findall(path.read_text())}
    table = set(re.findall(r"^\| `(FASTLM_\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    assert used == table


@pytest.mark.parametrize("path", package_files(), ids=relative)
def test_imports_run_one_way(path):
    modules = list(imports(path))
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    used = {name.split(".")[1] for name in modules if name.startswith("fastlm.")} - {own, "__version__"}
    if own != "__init__":
        assert own in MAY_IMPORT, f"give fastlm/{own} a place in the order of imports, in MAY_IMPORT"
        assert used <= MAY_IMPORT[own]
    if own == "ops" and path.stem != "__init__":
        others = {name.split(".")[2] for name in modules if name.startswith("fastlm.ops.")}
        assert {name for name in others if name[0] != "_"} <= NOT_OPS | {"dropconnect", "linear_cross_entropy"}
    if own == "triton":  # an implementation never imports another
        assert {name.split(".")[2] for name in modules if name.startswith("fastlm.triton.")} <= {"common"}
    else:
        assert "triton" not in {name.split(".")[0] for name in modules}


@pytest.mark.parametrize("path", package_files(), ids=relative)
def test_nothing_is_pickled(path):
    modules = {name.split(".")[0] for name in imports(path)}
    assert not modules & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("load", "save"), f"line {node.lineno}: torch.{node.attr} pickles"


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("fastlm, fastlm.info", "torch numpy matplotlib transformers triton"),
        ("fastlm.ops", "matplotlib transformers triton"),
        ("fastlm.cli, fastlm.training, fastlm.models", "matplotlib transformers triton"),
    ],
)
def test_cost_of_import(modules, heavy):
    code = f"import sys, {modules}; print(*(name for name in {heavy.split()} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
