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
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    pieces = {
        "FASTLM_BUILD=0": MODE != "0",
        "no native build for Windows": sys.platform != "win32",
        "no torch in the build environment (install torch, then use --no-build-isolation)": package_dir("torch"),
        "no C++ compiler (install g++ or clang++, or set CXX)": any(map(shutil.which, compilers)),
        "no cmake (pip install cmake)": tool("cmake"),
        "no ninja (pip install ninja)": tool("ninja"),
    }
    return next((reason for reason, there in pieces.items() if not there), None)


def host_why_not():
    """The first missing piece of _host, without which the kernels can do, or None."""
    if package_dir("pybind11") is None:
        return "no pybind11 (pip install pybind11)"
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return None if headers else "no headers of Python (Debian: apt install python3-dev)"


def cmake_options(out):
    """What CMakeLists.txt is told; every option every time, since CMake remembers those of the last build."""
    cuda = os.environ.get("FASTLM_CUDA", "1") != "0" and (tool("nvcc") or os.environ.get("CUDACXX"))
    arches = (os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0 9.0+PTX").replace(".", "").replace(";", " ").split()
    kinds = [arch[:-4] if arch.endswith("+PTX") else f"{arch}-real" for arch in arches]  # "90" is both, "90-real" code
    options = {
        "OUT": out,
        "TORCH_DIR": package_dir("torch"),
        "FASTLM_HOST": "OFF" if host_why_not() else "ON",
        "PYBIND11_DIR": package_dir("pybind11"),
        "PYTHON_INCLUDE": sysconfig.get_path("include"),
        "HOST_SUFFIX": HOST_SUFFIX,
        "FASTLM_CUDA": "ON" if cuda else "OFF",
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "CMAKE_CUDA_ARCHITECTURES": ";".join(kinds),
    }
    return [*(f"-D{k}={v}" for k, v in options.items()), *shlex.split(os.environ.get("CMAKE_ARGS", ""))]


class Build(build):
    # build_ext runs in a pure build too: it is what says why, and writes it down
    sub_commands = [("build_py", None), ("build_ext", None)]


class CMakeBuild(build_ext):
    def run(self):
        out = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "fastlm"
        for name in MODULES:  # those of an earlier build, which a pure one must not take along
            (out / name).unlink(missing_ok=True)
        reason = WHY_NOT or self.cmake(out) or host_why_not()
        modules = [name for name in MODULES if (out / name).exists()]
        if reason:
            print(f"fastlm: {reason}; native modules: {', '.join(modules) or 'none'}", file=sys.stderr)
        torch = importlib.metadata.version("torch") if modules else None
        report = {"modules": modules, "reason": reason, "python": sys.version.split()[0], "torch": torch}
        (out / "_build.json").write_text(json.dumps(report) + "\n")

    def cmake(self, out):
        """Build all that can be built; returns the reason of a failure, or None."""
        # not build_temp, which is a new one at every editable install and would compile everything again
        tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        try:
            subprocess.check_call([tool("cmake"), "-S", ROOT, "-B", tree, "-G", "Ninja", *cmake_options(out)])
            subprocess.check_call([tool("cmake"), "--build", tree, "-j", jobs, "--", "-k", "0"])
        except subprocess.CalledProcessError as error:
            if MODE == "1":
                sys.exit(f"FASTLM_BUILD=1 but the native build failed (exit status {error.returncode})")
            return f"the native build failed (exit status {error.returncode}; pip install -v shows why)"
        return None


if MODE not in ("auto", "0", "1"):
    sys.exit(f"FASTLM_BUILD must be auto, 0 or 1, got {MODE!r}")
WHY_NOT = why_not()
if MODE == "1" and (WHY_NOT or host_why_not()):
    sys.exit(f"FASTLM_BUILD=1 but {WHY_NOT or host_why_not()}")
# any extension makes a wheel of this platform; none, one for all
setup(ext_modules=[] if WHY_NOT else [Extension("fastlm._C", [])], cmdclass={"build": Build, "build_ext": CMakeBuild})
