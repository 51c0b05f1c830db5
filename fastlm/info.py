"""`python -m fastlm.info [--json]`: what is installed, what loaded, what runs, and what would improve it.

Only the standard library is imported at module level and every probe is guarded: a failure becomes a value of
the report, so that it prints even when PyTorch, NumPy or a native module is broken.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import fastlm
from fastlm.errors import run_for_reader

REQUIRED = ("numpy", "safetensors", "tqdm")
OPTIONAL = ("triton", "matplotlib", "transformers", "tensorboard")
BUILD_PACKAGES = ("setuptools", "cmake", "ninja", "pybind11")
FEATURES = {
    *("sse4_2", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"),
    *("avx512_fp16", "amx_bf16", "asimd", "sve", "bf16"),
}
INSTALL = "pip install --no-build-isolation ."
COMPILER = "install a C++ compiler (Debian: apt install g++; macOS: xcode-select --install)"


def guarded(probe, *args):
    """Call a probe; what goes wrong is its value."""
    try:
        return probe(*args)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def first_line(*command: str) -> str | None:
    """The first line that a program prints, or None when it is not installed."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return (result.stdout.strip() or result.stderr.strip()).partition("\n")[0]


def package_version(name: str) -> str | None:
    """The installed version of a package, which is not imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def required_package(name: str) -> str | None:
    """The version of a package that fastlm cannot do without, once it is seen to import."""
    importlib.import_module(name)
    return package_version(name)


def torch_report() -> dict:
    torch = importlib.import_module("torch")
    folder = str(Path(torch.__file__).parent)
    return {"version": torch.__version__, "cuda": torch.version.cuda, "path": folder}


def compiler() -> str | None:
    names = (os.environ.get("CXX", "c++"), "g++", "clang++")
    return next((line for name in names if (line := first_line(name, "--version"))), None)


def nvcc() -> str | None:
    if shutil.which("nvcc") is None:
        return None
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=30).stdout
    return next((line for line in text.splitlines() if "release" in line), "version unknown")


def processor() -> dict:
    """Name and vector features, from what the system says of itself."""
    fields = {}
    if Path("/proc/cpuinfo").exists():
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
    try:
        host = importlib.import_module("fastlm._host")
        features = [name for name, there in host.cpu_features().items() if there is True]
    except ImportError:
        flags = fields.get("flags", fields.get("Features", "")).split()
        features = [flag for flag in flags if flag in FEATURES]
    name = fields.get("model name") or platform.processor() or platform.machine()
    return {"name": name, "cores": os.cpu_count(), "features": features}


def gpus() -> list[str]:
    """The GPUs that the driver sees, whether or not PyTorch can use them."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return result.stdout.split("\n")[:-1] if result.returncode == 0 else []


def switched_off() -> bool:
    return os.environ.get("FASTLM_DISABLE_NATIVE", "0") not in ("", "0")


def native(name: str) -> str | None:
    return importlib.import_module("fastlm._lib").status[name]


def host() -> str | None:
    if switched_off():
        return "switched off by FASTLM_DISABLE_NATIVE"
    try:
        importlib.import_module("fastlm._host")
    except ModuleNotFoundError:
        return f"not built for this Python; `{INSTALL}` builds it"
    return None


def triton() -> str | None:
    missing = importlib.import_module("fastlm._lib").triton_missing
    if missing is None:
        importlib.import_module("triton")
    return missing


def loading(probe, *args) -> dict:
    """Whether compiled code loaded; `probe` returns or raises the reason why it did not."""
    reason = probe(*args)
    return {"loaded": reason is None, "reason": reason["error"] if isinstance(reason, dict) else reason}


def auto_report() -> dict:
    """What `impl="auto"` takes, by device and operator."""
    torch = importlib.import_module("torch")
    library = importlib.import_module("fastlm._lib")
    importlib.import_module("fastlm.ops")
    report = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        chosen = {}
        for name, op in sorted(library.ops.items()):
            tensor = torch.empty(0, dtype=op.dtypes[0], device=device)
            chosen[name] = library.resolve(name, "auto", tensor)
        report[device] = {name: impl.replace("fallback", "reference") for name, impl in chosen.items()}
    return report


def passed_over() -> dict:
    """The native kernels that are here and that `impl="auto"` does not take before they are measured, by device."""
    library = importlib.import_module("fastlm._lib")
    importlib.import_module("fastlm.ops")
    found = [(device, name) for name, op in sorted(library.ops.items()) for device in op.unmeasured]
    report = {}
    for device, name in found:
        if library.native(name, device) and library._automatic(name, device, True) != device:
            report.setdefault(device, []).append(name)
    return report


def build_report() -> dict:
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {"native": "no record: not built by setup.py"}


def advice(report: dict) -> str | None:
    """The one command, or step, that would improve this installation most."""
    modules, compilers = report["modules"], report["compilers"]
    # first, since PyTorch does not import either when NumPy is broken
    broken = [name for name, version in report["required"].items() if isinstance(version, dict)]
    if broken:
        return f"pip install --force-reinstall {' '.join(broken)}"
    if "error" in report["torch"]:
        return 'pip install --force-reinstall "torch>=2.10"'
    if switched_off():
        return "unset FASTLM_DISABLE_NATIVE"
    if not (modules["_C"]["loaded"] and modules["_host"]["loaded"]):
        if compilers["c++"] is None:
            return f"{COMPILER}, then {INSTALL}"
        tools = report["build_tools"]
        absent = [name for name in tools if tools[name] is None and shutil.which(name) is None]
        return f"pip install {' '.join(absent)} && {INSTALL}" if absent else INSTALL
    if report["gpus"] and report["torch"]["cuda"] is None:
        return "install a PyTorch with CUDA (https://pytorch.org/get-started/locally)"
    if report["gpus"] and not modules["triton"]["loaded"]:
        return 'pip install "triton>=3.6"'
    if report["gpus"] and not modules["_C_cuda"]["loaded"]:
        return INSTALL if compilers["nvcc"] else f"install the CUDA toolkit (nvcc), then {INSTALL}"
    return None


def collect() -> dict:
    """The whole report, as plain data for JSON."""
    torch = guarded(torch_report)

    def with_torch(probe, *args):
        # a second import of a broken package fails in another way, which would hide the first
        return {"error": "PyTorch does not import"} if "error" in torch else guarded(probe, *args)

    report = {
        "fastlm": {"version": fastlm.__version__, "path": str(Path(fastlm.__file__).parent)},
        "python": f"{platform.python_version()} {sys.executable}",
        "system": platform.platform(),
        "torch": torch,
        "required": {name: guarded(required_package, name) for name in REQUIRED},
        "optional": {name: guarded(package_version, name) for name in OPTIONAL},
        "build_tools": {name: guarded(package_version, name) for name in BUILD_PACKAGES},
        "compilers": {"c++": guarded(compiler), "nvcc": guarded(nvcc)},
        "processor": guarded(processor),
        "gpus": guarded(gpus),
        "modules": {
            "_C": loading(with_torch, native, "_C"),
            "_C_cuda": loading(with_torch, native, "_C_cuda"),
            "_host": loading(guarded, host),
            "triton": loading(with_torch, triton),
        },
        "instruction_set": with_torch(lambda: importlib.import_module("fastlm._lib").instruction_set()),
        "auto": with_torch(auto_report),
        "not_measured": with_torch(passed_over),
        "build": guarded(build_report),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith("FASTLM_")},
    }
    report["advice"] = guarded(advice, report)
    return report


def text(value) -> str:
    """One value of the report in one line."""
    if isinstance(value, dict):
        return value["error"] if "error" in value else ", ".join(f"{k} {text(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return " ".join(map(text, value)) or "none"
    return "none" if value is None else " ".join(str(value).split())


def table(rows: dict) -> list[str]:
    return [f"  {key:<22}{text(value)}" for key, value in rows.items()]


def render(report: dict) -> str:
    """The report for people."""
    auto = report["auto"]
    if "error" not in auto:
        ops = {name: "".join(f"{auto[d][name]:<12}" for d in auto).rstrip() for name in auto["cpu"]}
        auto = {"": "".join(f"{device:<12}" for device in auto).rstrip(), **ops}
    lines = [f"fastlm {report['fastlm']['version']} in {report['fastlm']['path']}", ""]
    lines += table({key: report[key] for key in ("python", "system", "torch")})
    lines += table(report["required"] | report["optional"] | report["compilers"])
    lines += table({"build tools": report["build_tools"]})
    lines += table({key: report[key] for key in ("processor", "gpus")})
    modules = {name: module["reason"] or "loaded" for name, module in report["modules"].items()}
    lines += ["", "compiled code"] + table(modules | {"instruction set": report["instruction_set"]})
    lines += ["", 'what impl="auto" takes'] + table(auto) + table({"not measured yet": report["not_measured"]})
    lines += ["", "build"] + table(report["build"])
    lines += ["", "environment"] + table(report["environment"] or {"FASTLM_*": "not set"})
    lines += ["", f"to improve this: {text(report['advice'])}"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the report; the exit status is 0 whatever it says."""
    parser = argparse.ArgumentParser(prog="fastlm info", description="What is installed, loaded and used.")
    parser.add_argument("--json", action="store_true", help="print one JSON object, on one line")
    options = parser.parse_args(arguments)
    report = collect()
    print(json.dumps(report) if options.json else render(report))
    return 0


if __name__ == "__main__":
    sys.exit(run_for_reader(main))
