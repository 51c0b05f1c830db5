"""How much memory a call needs beyond its inputs and outputs, the scratch of native code included.

On a GPU PyTorch's allocator keeps the peak. On Linux the kernel does: writing 5 to /proc/self/clear_refs sets the peak
of the resident set (VmHWM) back to what is resident now, so the peak after a call counts every page that it touched,
whoever allocated it. The heap is trimmed before, else pages that an earlier call left there would be used again unseen.
The kernel counts in batches of pages per core, so figures below a megabyte are noise.
"""

import ctypes
import gc
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def trim(device: str) -> None:
    """Give memory that is free but kept back to the system, so that every contender starts from the same state."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    elif _STATUS.exists():
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
        if malloc_trim is not None:
            malloc_trim(0)


def held(device: str) -> int | None:
    """Bytes in use now: allocated on a GPU, resident on a CPU; None where that cannot be known."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def peak(device: str, run: Callable[[], Any], inputs: Iterable[torch.Tensor] = ()) -> tuple[Any, int | None]:
    """Run a call on a trimmed heap.

    Args:
        device: "cpu" or "cuda". run: the call; it returns tensors, in any nest of tuples and lists.
        inputs: tensors whose memory a result may share, which is not counted as an output.

    Returns:
        What the call returned, and the peak of its memory beyond that and beyond what was there before, in bytes; None
        where the system does not tell.
    """
    trim(device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated()
    else:
        try:
            _CLEAR.write_text("5")
        except OSError:  # no Linux, or a container that forbids it
            return run(), None
        before = _status("VmRSS")
        result = run()
        most = _status("VmHWM")
    own = _storages(result)
    for pointer in _storages(list(inputs)):
        own.pop(pointer, None)
    return result, max(0, most - before - sum(own.values()))


def _storages(value: Any) -> dict[int, int]:
    """Address and bytes of every storage in a nest of tensors."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    if isinstance(value, list | tuple):
        return {pointer: size for part in value for pointer, size in _storages(part).items()}
    return {}


def _status(key: str) -> int | None:
    if not _STATUS.exists():
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
