"""Builds the native modules with CMake when it can, and says in one line why when it cannot.

FASTLM_BUILD=auto (default): native if possible, else pure Python; 1: native or fail; 0: pure Python.
FASTLM_CUDA=0 leaves out the CUDA module. TORCH_CUDA_ARCH_LIST, CMAKE_ARGS and MAX_JOBS are honoured.
torch is located, never imported: its import costs seconds and fails in isolated builds.
"""

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("FASTLM_BUILD", "auto")


def package_dir(name):
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def tool(name):
    """A build tool from PATH or from its pip package beside this interpreter."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def why_not():
    """The first missing piece of a native build, or None."""
    if MODE == "0":
        return "FASTLM_BUILD=0"
    if sys.platform == "win32":
        return "no native build for Windows"
    if package_dir("torch") is None:
        return "no torch in the build environment (install torch, then use --no-build-isolation)"
    if package_dir("pybind11") is None:
        return "no pybind11 (pip install pybind11)"
    if tool("cmake") is None:
        return "no cmake (pip install cmake)"
    if tool("ninja") is None:
        return "no ninja (pip install ninja)"
    compiler = os.environ.get("CXX", "c++ g++ clang++")
    if not any(shutil.which(name) for name in compiler.split()):
        return "no C++ compiler (install g++ or clang++, or set CXX)"
    return None


def cmake_arguments(out):
    """What CMakeLists.txt is told."""
    cuda = os.environ.get("FASTLM_CUDA", "1") != "0" and (tool("nvcc") or os.environ.get("CUDACXX"))
    arguments = [
        f"-DTORCH_DIR={package_dir('torch')}",
        f"-DOUT={out}",
        f"-DFASTLM_CUDA={'ON' if cuda else 'OFF'}",
    ]
    arguments += [
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DPYBIND11_INCLUDE={package_dir('pybind11') / 'include'}",
    ]
    arguments += [f"-DPYTHON_INCLUDE={sysconfig.get_path('include')}"]
    arguments += [f"-DPYTHON_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}"]
    if shutil.which("ccache"):
        arguments += [f"-DCMAKE_{language}_COMPILER_LAUNCHER=ccache" for language in ("CXX", "CUDA")]
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        arches = os.environ["TORCH_CUDA_ARCH_LIST"].replace(".", "").replace(" ", ";").split(";")
        kinds = [a.removesuffix("+PTX") if a.endswith("+PTX") else f"{a}-real" for a in arches if a]
        arguments += [f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(kinds)}"]
    return arguments + shlex.split(os.environ.get("CMAKE_ARGS", ""))


class CMakeBuild(build_ext):
    def run(self):
        in_place = self.inplace or self.editable_mode
        out = (ROOT if in_place else Path(self.build_lib).resolve()) / "fastlm"
        out.mkdir(parents=True, exist_ok=True)
        reason = WHY_NOT
        if reason is None:
            build = Path(self.build_temp).resolve()
            build.mkdir(parents=True, exist_ok=True)
            configure = [
                tool("cmake"),
                "-S",
                str(ROOT),
                "-B",
                str(build),
                "-G",
                "Ninja",
                *cmake_arguments(out),
            ]
            try:
                subprocess.check_call(configure)
                subprocess.check_call([tool("cmake"), "--build", str(build), "--parallel", self.jobs()])
            except subprocess.CalledProcessError as error:
                if MODE == "1":
                    raise
                reason = f"the native build failed (exit status {error.returncode}; pip -v shows why)"
        if reason is not None:
            print(f"fastlm: pure Python only: {reason}", file=sys.stderr)
        report = {"native": reason is None, "reason": reason, "python": platform.python_version()}
        (out / "_build.json").write_text(json.dumps(report) + "\n")

    def jobs(self):
        return os.environ.get("MAX_JOBS") or str(os.cpu_count())


class Wheel(bdist_wheel):
    def get_tag(self):
        return super().get_tag() if WHY_NOT is None else ("py3", "none", "any")


WHY_NOT = why_not()
if WHY_NOT is not None and MODE == "1":
    sys.exit(f"FASTLM_BUILD=1 but {WHY_NOT}")
setup(ext_modules=[Extension("fastlm._C", [])], cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel})
