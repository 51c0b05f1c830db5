"""Encoded corpora on disk. A copy may be missing, damaged or impossible to write: nothing depends on it."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np

from fastlm.data.vocabulary import Vocabulary

Encoded = tuple[Vocabulary, dict[str, np.ndarray]]  # the ids of each split [N], int32, of bytes uint8


def folder(given: str | Path | None) -> Path:
    """`given`, else the environment's FASTLM_CACHE, else `~/.cache/fastlm`."""
    return Path(os.path.expanduser(given or os.environ.get("FASTLM_CACHE") or "~/.cache/fastlm"))


def read(path: Path) -> Encoded | None:
    """The copy, or None where there is none that can be used."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return Vocabulary.from_dict(json.loads(arrays.pop("vocabulary").tobytes())), arrays
    # Damage shows as a bad header, checksum, number, dtype or JSON; whatever it is, the copy is made anew.
    except Exception:
        return None


def write(path: Path, encoded: Encoded) -> None:
    """Write a copy under a temporary name, then rename it; without a word where the disk does not take it."""
    vocabulary, ids = encoded
    text = np.frombuffer(json.dumps(vocabulary.to_dict()).encode(), np.uint8)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        try:
            with open(handle, "wb") as file:
                np.savez(file, vocabulary=text, **ids)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
