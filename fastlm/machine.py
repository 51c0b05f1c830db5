"""The machine and the software that figures belong to; never the name of a host."""

import datetime
import importlib.metadata
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastlm import __version__, _lib

ROOT = Path(__file__).resolve().parents[1]


def processor() -> str:
    """The model of the processor, with family and model numbers where the name alone says little."""
    path = Path("/proc/cpuinfo")
    lines = (line.partition(":") for line in path.read_text().splitlines()) if path.exists() else ()
    fields = {key.strip(): value.strip() for key, _, value in lines}
    name = fields.get("model name", "") or os.uname().machine
    name = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*", "", name, flags=re.IGNORECASE)
    if not re.search(r"\d", name) and "cpu family" in fields:
        name += f" family {fields['cpu family']} model {fields['model']}"
    return " ".join(name.split())


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slug(text: str) -> str:
    """The text as a part of a file name."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def machine_name(device: str) -> str:
    """By what the files of results are called: the GPU, or the processor and its cores."""
    return slug(torch.cuda.get_device_name() if device == "cuda" else f"{processor()} {cores()} cores")


def version(package: str) -> str | None:
    """The installed version of a package, which is not imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_state() -> dict[str, str] | None:
    """Driver, clocks, power and temperature as they are now; None without nvidia-smi."""
    names = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu"]
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(names, done.stdout.partition("\n")[0].split(", "), strict=False))


def describe(device: str) -> dict[str, Any]:
    """What a reader must know to repeat a figure."""
    return {
        "machine": machine_name(device),
        "device": device,
        "processor": processor(),
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "gpu_state": gpu_state() if device == "cuda" else None,
        "triton": version("triton"),
        "fastlm": __version__,
        "commit": commit(),
        "native": {name: reason or "loaded" for name, reason in _lib.status.items()},
        "instruction_set": _lib.instruction_set(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("FASTLM_", "OMP_", "MKL_"))},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """The commit of the tree, with "+" where a file of the package or the benchmarks differs from it.

    None where the package is installed and not run from its tree: the tree around it would be another one.
    """
    if not (ROOT / "csrc").is_dir():
        return None
    try:
        git = ["git", "-C", str(ROOT)]
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        paths = ["fastlm", "csrc", "benchmarks/*.py", "setup.py", "CMakeLists.txt"]
        changed = subprocess.run([*git, "status", "--porcelain", "--", *paths], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")
