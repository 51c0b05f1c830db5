"""One process at a time trains in a run folder: it holds RUN/.lock, which the system lets go of when it ends."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from fastlm.errors import FastlmError

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows
    flock = None

_held: weakref.WeakValueDictionary[Path, RunLock] = weakref.WeakValueDictionary()


class RunLock:
    """Held until nothing refers to it any more or the process has ended, however it did; see `lock_run`."""

    def __init__(self, path: Path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise FastlmError(f"cannot write in {path.parent}: {e.strerror}") from e
        self._close = weakref.finalize(self, os.close, self._file)
        try:
            flock(self._file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._file, 20).decode(errors="replace").strip()
            self._close()
            raise FastlmError(
                f"process {holder or 'unknown'} trains in {path.parent}: end it, or wait for it"
            ) from None
        except OSError:  # some network file systems have no locks: a run there goes without
            return
        os.ftruncate(self._file, 0)
        os.write(self._file, f"{os.getpid()}\n".encode())


def lock_run(run_dir: Path) -> RunLock | None:
    """The lock of a run folder, which is made; that which this process has of it already; None where there are none.

    Raises:
        FastlmError: another process has it, whose id it says, or the folder cannot be written in.
    """
    if flock is None:
        return None
    path = run_dir.resolve() / ".lock"
    if (lock := _held.get(path)) is None:
        lock = _held[path] = RunLock(path)
    return lock
