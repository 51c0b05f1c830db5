"""Each sanitizer reports the bugs that planted.cpp holds for it, on every instruction set, and nothing else."""

import faulthandler
import os
import tempfile
from pathlib import Path

import pytest
import torch

from fastlm import _lib
from fastlm.data import encoder

MODULE = Path(_lib.__file__).with_name("_C.so")
SANITIZER = "thread" if b"__tsan_" in MODULE.read_bytes() else "address"
BUGS = {  # in the order of planted.cpp: what reports it, and with which words
    "nothing": (None, ""),
    "vector_read": ("address", "located 0 bytes to the right of 256-byte region"),
    "partial_read": ("address", "located 0 bytes to the right of 256-byte region"),
    "vector_write": ("address", "located 0 bytes to the right of 256-byte region"),
    "stream_write": ("address", "located 0 bytes to the right of 256-byte region"),
    "stack": ("address", "stack-buffer-overflow"),
    "overflow": ("address", "signed integer overflow"),
    "shift": ("address", "shift exponent 64 is too large"),
    "race": ("thread", "data race"),
    "vector_race": ("thread", "data race"),
    "relaxed_flag": ("thread", "data race"),
}
MINE = [name for name, (sanitizer, _) in BUGS.items() if sanitizer in (None, SANITIZER)]


def in_a_child(function) -> tuple[int, str]:
    """The exit status of a forked process that calls `function`, and what it wrote to stderr."""
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            os.dup2(file.fileno(), 2)
            function()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        file.seek(0)
        return status, file.read().decode()


@pytest.mark.parametrize("set_", range(_lib.INSTRUCTION_SETS.index(_lib.instruction_set()) + 1))
@pytest.mark.parametrize("bug", MINE)
def test_a_planted_bug_is_reported(bug, set_):
    x = torch.ones(64)

    def run():  # a race is seen at most of its occurrences, not at all of them
        for _ in range(100):
            torch.ops.fastlm.planted(x, list(BUGS).index(bug), set_)

    status, report = in_a_child(run)
    if bug == "nothing":
        assert (status, report) == (0, "")
    else:
        assert status != 0 and BUGS[bug][1] in report, f"exit status {status}, {report or 'no report'}"


def test_every_module_is_instrumented():
    calls = {"thread": [b"__tsan_write4"], "address": [b"__asan_report_store4", b"__ubsan_handle_add_overflow"]}
    for path in (MODULE, Path(encoder.native().__file__)):
        assert all(call in path.read_bytes() for call in calls[SANITIZER]), path
