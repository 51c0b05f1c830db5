"""Text -> words and ids, by `fastlm._host` where it is built, else in Python, with the same result."""

import codecs
import os
from array import array
from collections.abc import Iterator
from mmap import mmap

import numpy as np

from fastlm.data.vocabulary import EOS, split_line

PART_BYTES = 1 << 20  # a thread takes no less


def native():
    """The module `fastlm._host`, or None where it is not built or FASTLM_DISABLE_NATIVE is set."""
    if os.environ.get("FASTLM_DISABLE_NATIVE", "0") not in ("", "0"):
        return None
    try:
        from fastlm import _host
    except ImportError:
        return None
    return _host


def encode_text(data: bytes | mmap, level: str) -> tuple[list[str], np.ndarray]:
    """The words of a UTF-8 text in order of first occurrence, and its ids, int32 `[N]`.

    `<eos>` stands behind every line, empty ones and a last one without line feed included. A byte order mark at
    the start is left out. `level` is `"word"` or `"char"`.

    Raises:
        ValueError: not UTF-8; its second argument is the offset of the first bad byte.
    """
    host = native()
    if host is None:
        return _encode_in_python(data, level)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, min(processors, len(data) // PART_BYTES))
    return (host.encode_words if level == "word" else host.encode_characters)(data, threads)


def _encode_in_python(data: bytes | mmap, level: str) -> tuple[list[str], np.ndarray]:
    index: dict[str, int] = {}
    ids = array("i")
    for line in _lines(data):
        ids.extend(index.setdefault(token, len(index)) for token in split_line(line, level))
        ids.append(index.setdefault(EOS, len(index)))
    return list(index), np.frombuffer(ids, dtype=np.int32) if ids else np.empty(0, np.int32)


def _lines(data: bytes | mmap) -> Iterator[str]:
    start = len(codecs.BOM_UTF8) if data[:3] == codecs.BOM_UTF8 else 0
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        try:
            yield data[start:stop].decode()
        except UnicodeDecodeError as error:
            raise ValueError("invalid UTF-8", start + error.start) from None
        start = stop + 1
