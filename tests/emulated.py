"""Runs the kernels of csrc/*.cu on the CPU: builds tests/emulator/<op>.cpp, hands tensors over, reports faults.

    unit = emulated.load("dropconnect")
    out = unit.run("dropconnect_fwd", 0, read("weight", w), write("out", w), ...)["out"]

One call of `run` is a number of schedules: orders and speeds of blocks, moments at which asynchronous copies land. A
race, an access out of bounds, a hang or a result that differs between schedules raises `Fault`. `mutations` takes away
each barrier, wait, fence, relaxed load and second buffer in turn. FASTLM_EMULATOR=thorough asks for more schedules and
larger shapes.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests" / "emulator"
BUILD = ROOT / "build" / "emulator"
THOROUGH = os.environ.get("FASTLM_EMULATOR") == "thorough"
SCHEDULES = 64 if THOROUGH else 16
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/dtype.h counts them

INCLUDE = [EMULATOR / "cuda", EMULATOR, ROOT / "csrc"]
FLAGS = ["-std=c++20", "-g1", "-march=native", "-fPIC", "-DFASTLM_EMULATED"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"]
FLAGS += [f"-I{folder}" for folder in INCLUDE]
ENGINE = ["-O2", "-Wextra", "-fvisibility=hidden"]
# The compiler then calls a function at every load and store; the program is linked without its runtime. With -O2 the
# kernels take twice as long to compile, and run as fast. A vector stays one access, so that its alignment shows.
WATCHED = ["-Og", "-fno-tree-sra", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]


class Fault(AssertionError):
    """What the emulator found, with block, thread and source line."""


def _missing():
    if sys.platform != "linux" or shutil.which("g++") is None:
        return "no g++ on Linux"
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True).stdout.strip()
    return None if int(version.split(".")[0]) >= 12 else f"g++ {version} is older than 12"


def _sources(path, found):
    """A source and all that it includes of this tree."""
    if path not in found:
        found.add(path)
        for name in re.findall(r'^#include [<"]([\w./]+)[>"]', path.read_text(), re.MULTILINE):
            places = (folder / name for folder in [path.parent, *INCLUDE])
            for place in places:
                if place.is_file():
                    _sources(place.resolve(), found)
                    break
    return found


@functools.cache
def _toolchain():
    described = subprocess.run(["g++", "-march=native", "-Q", "--help=target"], capture_output=True, text=True).stdout
    return hashlib.sha256(described.encode()).hexdigest() + " ".join([*FLAGS, *ENGINE, *WATCHED])


def _cached(name, sources, make):
    """The file in the cache that is made of these sources."""
    digest = hashlib.sha256(_toolchain().encode())
    for source in sorted(sources):
        digest.update(source.read_bytes())
    stem, suffix = name.split(".")
    target = BUILD / f"{stem}-{digest.hexdigest()[:16]}.{suffix}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = BUILD / f"{target.stem}.{os.getpid()}.{suffix}"
        make(unfinished)
        unfinished.replace(target)
    return target


def _call(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _engine(source):
    found = _sources(source, set())
    return _cached(f"{source.stem}.o", found, lambda to: _call(["g++", *FLAGS, *ENGINE, "-c", source, "-o", to]))


def _unwatched(dump):
    """Accesses that the compiler reports to nobody: objects that a call returns into memory or takes from it.

    A kernel gives such an object a local variable, or the function is forced inline.
    """
    watched_call = re.compile(r"(?:(?P<to>[^=]+) = )?(?P<name>[\w.:]+) \((?P<arguments>.*)\);(?: \[.*\])?$")
    escaped = []
    for line in dump.splitlines():
        places = re.findall(r"\[(/[^]:]+:\d+):\d+\] ", line)
        call = watched_call.match(re.sub(r"\[/[^]]+:\d+:\d+\] ", "", line).strip())
        if call is None or not places or "__builtin___tsan" in call["name"]:
            continue
        arguments = call["arguments"].split(", ")
        objects = [call["to"] or "", *arguments]
        in_memory = any((o.startswith(("*", "MEM")) and "&" not in o.replace("&)", "")) or "->" in o for o in objects)
        moves = re.fullmatch(r"(__builtin_)?mem(cpy|set|move|cmp)", call["name"])
        if in_memory or (moves and not all(o.startswith("&") for o in arguments[: 1 + (moves[2] != "set")])):
            escaped.append(f"{places[0]}: {call[0]}")
    return escaped


def compile_unit(source, to):
    """Compile a source with each of its accesses watched."""
    dump = to.with_suffix(".dump")
    _call(["g++", *FLAGS, *WATCHED, f"-fdump-tree-optimized-lineno={dump}", "-c", source, "-o", to])
    escaped = _unwatched(dump.read_text())
    dump.unlink()
    assert not escaped, "accesses that escape the race check:\n" + "\n".join(escaped)


@functools.cache
def load(name):
    """The unit tests/emulator/<name>.cpp, built where its sources have changed."""
    reason = _missing()
    if reason is not None:
        pytest.skip(f"the emulator needs more: {reason}")
    source = EMULATOR / f"{name}.cpp"
    with ThreadPoolExecutor() as pool:
        unit = pool.submit(_cached, f"{name}.o", _sources(source, set()), lambda to: compile_unit(source, to))
        engine = pool.map(_engine, sorted((EMULATOR / "engine").glob("*.cpp")))
    objects = [*engine, unit.result()]
    link = ["g++", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", *objects, "-ldl"]
    return Unit(_cached(f"{name}.so", objects, lambda to: _call([*link, "-o", to])))


class Array:
    """A tensor that a kernel gets as watched memory, `align` bytes aligned and no better."""

    def __init__(self, name, tensor, mode, align):
        self.name, self.mode, self.align = name, mode, align
        self.tensor = tensor.detach().contiguous()


def read(name, tensor, align=16):
    """An input: that a kernel writes to it is a fault. None is a null pointer."""
    return None if tensor is None else Array(name, tensor, 0, align)


def write(name, like, align=16):
    """A result like the given tensor, NaN at first: that a kernel reads what it has not written is a fault."""
    return Array(name, torch.empty_like(like, memory_format=torch.contiguous_format), 1, align)


def update(name, tensor, align=16):
    """What a kernel reads and writes, as flags; each schedule begins with the tensor as given."""
    return Array(name, tensor, 2, align)


class Unit:
    """A built unit. `removed` is the call that runs leave out, "what path:line:column"; `sites` are those passed."""

    def __init__(self, path):
        self.path, self.library = path, ctypes.CDLL(str(path))
        self.removed, self.sites = "", set()
        for function in ("emulator_failure", "emulator_sites"):
            getattr(self.library, function).restype = ctypes.c_char_p
        self.library.emulator_array.restype = ctypes.c_void_p

    def run(self, function, *arguments, schedules=SCHEDULES):
        """Call an entry of the unit under each schedule; returns what it wrote, by name.

        Args:
            function: name of an extern "C" function, whose integers are at least 32 bits wide and floats doubles.
            arguments: arrays from `read`, `write` and `update`, None for a null pointer, ints and floats.
            schedules: how many.

        Raises:
            Fault: what went wrong, and in which schedule.
        """
        results = None
        for seed in range(schedules):
            self.library.emulator_begin(ctypes.c_uint64(seed), self.removed.encode())
            values, arrays = [], []
            for argument in arguments:
                value, size = self._pass(argument)
                values.append(value)
                if size is not None and argument.mode != 0:
                    arrays.append((argument, value.value, size))
            getattr(self.library, function)(*values)
            self.sites.update(self.library.emulator_sites().decode().splitlines())
            failure = self.library.emulator_failure().decode()
            if failure:
                raise Fault(f"{self._with_lines(failure)} (schedule {seed})")
            these = {array.name: ctypes.string_at(at, size) for array, at, size in arrays}
            results = results or these
            different = [name for name in these if these[name] != results[name]]
            if different:
                raise Fault(f"results that depend on the schedule: {', '.join(different)} (schedules 0 and {seed})")
        return {array.name: _tensor(results[array.name], array.tensor) for array, _, _ in arrays}

    def _pass(self, argument):
        if isinstance(argument, Array):
            tensor, size = argument.tensor, argument.tensor.numel() * argument.tensor.element_size()
            granule = min(2, tensor.element_size())
            name, data = argument.name.encode(), ctypes.c_void_p(tensor.data_ptr())
            sizes = [ctypes.c_size_t(n) for n in (size, argument.align, granule)]
            return ctypes.c_void_p(self.library.emulator_array(name, data, *sizes, argument.mode)), size
        if argument is None:
            return ctypes.c_void_p(None), None
        return (ctypes.c_double if isinstance(argument, float) else ctypes.c_int64)(argument), None

    def _with_lines(self, failure):
        """The report with the kernel's source line for each @address of the code."""

        def line(match):
            command = ["addr2line", "-i", "-e", str(self.path), match[1]]
            done = subprocess.run(command, capture_output=True, text=True).stdout
            lines = [frame.split(" ")[0].rsplit("/", 1)[-1] for frame in done.splitlines()]
            return next((frame for frame in lines if not frame.startswith(("emulator.h", "ptx.h"))), lines[0])

        return re.sub(r"@([0-9a-f]+)\b", line, failure) if shutil.which("addr2line") else failure


def _tensor(raw, like):
    if not raw:
        return torch.empty_like(like)
    return torch.frombuffer(bytearray(raw), dtype=like.dtype).reshape(like.shape)


def label(site):
    """What a test knows a call site ("what path:line:column") by: "what file: the text of its line"."""
    what, place = site.split(" ", 1)
    path, line, _ = place.rsplit(":", 2)
    return f"{what} {Path(path).name}: {Path(path).read_text().splitlines()[int(line) - 1].strip()}"


def mutations(unit, check):
    """Take away each call site that `check` passes; returns what was reported for each, None where nothing was.

    Args:
        unit: the unit whose kernels `check` runs. check: runs them and asserts that the results are right.

    Returns:
        From "what path:line:column" to the report, which is a Fault or a failed assertion of `check`.
    """
    unit.removed, unit.sites = "", set()
    check()
    reports = {}
    try:
        for site in sorted(unit.sites):
            unit.removed = site
            try:
                check()
                reports[site] = None
            except AssertionError as error:
                reports[site] = str(error)
    finally:
        unit.removed = ""
    return reports


def assert_all_reported(unit, check, harmless=()):
    """Assert that the removal of every site is reported, but for those that `harmless` names.

    Args:
        unit, check: as for `mutations`.
        harmless: from a part of a site's `label` to the reason why nothing can be seen without it. A reason for a
            site that is reported, or for none, is an error.
    """
    reports, unused = mutations(unit, check), dict(harmless)
    missed = []
    for site, report in reports.items():
        reasons = [part for part in dict(harmless) if part in label(site)]
        if report is None and not reasons:
            missed.append(f"{site}, {label(site)}")
        for part in reasons:
            assert report is None, f"{site} is said to be harmless, but: {report}"
            unused.pop(part, None)
    assert not missed, "removed without a report:\n" + "\n".join(missed)
    assert not unused, f"no such site: {unused}"
    return reports
