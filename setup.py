"""Builds the native modules with CMake when it can, and says in one line why when it cannot.

FASTLM_BUILD=auto (default): native if possible, else pure Python; 1: native or fail; 0: pure Python.
FASTLM_CUDA=0 leaves out the CUDA module. CXX, TORCH_CUDA_ARCH_LIST, CMAKE_ARGS and MAX_JOBS are honoured.
torch is located, never imported: its import costs seconds and fails in isolated builds.
"""

import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("FASTLM_BUILD", "auto")
HOST_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
MODULES = ("_C.so", "_C_cuda.so", f"_host{HOST_SUFFIX}")


def package_dir(name):
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def tool(name):
    """A build tool: its pip package, beside this interpreter, is newer than most that are on PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def why_not():
    """The first missing piece of a native build, or None."""
    if MODE == "0":
        return "FASTLM_BUILD=0"
    if sys.platform == "win32":
        return "no native build for Windows"
    if package_dir("torch") is None:
        return "no torch in the build environment (install torch, then use --no-build-isolation)"
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers):
        return "no C++ compiler (install g++ or clang++, or set CXX)"
    for name in ("cmake", "ninja"):
        if tool(name) is None:
            return f"no {name} (pip install {name})"
    return None if package_dir("pybind11") else "no pybind11 (pip install pybind11)"


def cmake_options(out):
    """What CMakeLists.txt is told; every option every time, since CMake remembers those of the last build."""
    cuda = os.environ.get("FASTLM_CUDA", "1") != "0" and (tool("nvcc") or os.environ.get("CUDACXX"))
    arches = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX").replace(".", "").replace(";", " ").split()
    # CMake's "90" is code and PTX, its "90-real" code alone
    kinds = [arch[:-4] if arch.endswith("+PTX") else f"{arch}-real" for arch in arches]
    options = {
        "OUT": out,
        "TORCH_DIR": package_dir("torch"),
        "PYBIND11_INCLUDE": package_dir("pybind11") / "include",
        "PYTHON_INCLUDE": sysconfig.get_path("include"),
        "HOST_SUFFIX": HOST_SUFFIX,
        "FASTLM_CUDA": "ON" if cuda else "OFF",
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "CMAKE_CUDA_ARCHITECTURES": ";".join(kinds),
        "CMAKE_CXX_COMPILER_LAUNCHER": shutil.which("ccache") or "",
        "CMAKE_CUDA_COMPILER_LAUNCHER": shutil.which("ccache") or "",
    }
    return [*(f"-D{k}={v}" for k, v in options.items()), *shlex.split(os.environ.get("CMAKE_ARGS", ""))]


class Build(build):
    # build_ext runs in a pure build too: it is what says why, and writes it down
    sub_commands = [("build_py", None), ("build_ext", None)]


class CMakeBuild(build_ext):
    def run(self):
        in_place = self.inplace or self.editable_mode
        out = (ROOT if in_place else Path(self.build_lib).resolve()) / "fastlm"
        out.mkdir(parents=True, exist_ok=True)
        for name in MODULES:  # those of an earlier build, which a pure one must not take along
            (out / name).unlink(missing_ok=True)
        reason = WHY_NOT or self.cmake(out)
        modules = [name for name in MODULES if (out / name).exists()]
        if reason:
            print(f"fastlm: {reason}; native modules: {', '.join(modules) or 'none'}", file=sys.stderr)
        torch = importlib.metadata.version("torch") if modules else None
        report = {"modules": modules, "reason": reason, "python": sys.version.split()[0], "torch": torch}
        (out / "_build.json").write_text(json.dumps(report) + "\n")

    def cmake(self, out):
        """Build all that builds; returns the reason of a failure, or None."""
        # not build_temp: a new folder at every editable install, which would compile everything again
        tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        try:
            subprocess.check_call([tool("cmake"), "-S", ROOT, "-B", tree, "-G", "Ninja", *cmake_options(out)])
            subprocess.check_call([tool("cmake"), "--build", tree, *jobs, "--", "-k", "0"])
        except subprocess.CalledProcessError as error:
            if MODE == "1":
                sys.exit(f"FASTLM_BUILD=1 but the native build failed (exit status {error.returncode})")
            return f"the native build failed (exit status {error.returncode}; pip install -v shows why)"
        return None


if MODE not in ("auto", "0", "1"):
    sys.exit(f"FASTLM_BUILD must be auto, 0 or 1, got {MODE!r}")
WHY_NOT = why_not()
if WHY_NOT and MODE == "1":
    sys.exit(f"FASTLM_BUILD=1 but {WHY_NOT}")
# any extension makes a wheel of this platform; none, one for all
extensions = [] if WHY_NOT else [Extension("fastlm._C", [])]
setup(ext_modules=extensions, cmdclass={"build": Build, "build_ext": CMakeBuild})
