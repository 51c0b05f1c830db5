"""A corpus: three texts as ids, and their vocabulary.

The ids are kept on disk in a file named after the SHA-256 of the texts and the settings: a changed text is a new
file, and any file may be deleted at any time.
"""

import contextlib
import hashlib
import json
import mmap
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fastlm.data import cache, stdlib
from fastlm.data.encoder import encode_text
from fastlm.data.vocabulary import EOS, UNK, Vocabulary, check_level
from fastlm.errors import DataError

SPLITS = ("train", "valid", "test")
FILES = "train.txt, valid.txt and test.txt"
HELD_OUT = 5_000_000  # bytes of one file that validation has, and as many the test, as of enwik8
CACHE_FORMAT = 1  # goes into every digest: with another number, every corpus is encoded anew


@dataclass(frozen=True, eq=False)
class Corpus:
    """Three texts as ids.

    Attributes:
        name: of the folder or the file, or `"stdlib"`. level: `"word"`, `"char"` or `"byte"`.
        vocabulary: its counts are those of the training text.
        train, valid, test: int64 `[N]`.
        digest: SHA-256 of the contents and the settings, hexadecimal.
    """

    name: str
    level: str
    vocabulary: Vocabulary
    train: torch.Tensor = field(repr=False)
    valid: torch.Tensor = field(repr=False)
    test: torch.Tensor = field(repr=False)
    digest: str

    def unigram_nll(self, split: str = "test") -> float:
        """Mean nll in nats of a split under the word frequencies of the training text, one added to each count."""
        counts = torch.tensor(self.vocabulary.counts, dtype=torch.float64) + 1
        return float(-(counts / counts.sum()).log()[getattr(self, split)].mean())


def load_corpus(
    source: str | Path,
    *,
    level: str = "word",
    compat: str | None = None,
    min_count: int | None = None,
    max_size: int | None = None,
    cache_dir: str | Path | None = None,
) -> Corpus:
    """Read a corpus, from its encoded copy where there is one.

    Args:
        source: a folder with `train.txt`, `valid.txt` and `test.txt`, in UTF-8 (at the byte level: any bytes), or
            the name `"stdlib"`: the documentation of the Python that runs (`fastlm.data.stdlib`). At the byte level
            also one file, as `enwik8` or the `enwik8.zip` that holds it: as in awd-lstm-lm the last 5,000,000 bytes
            are the test, the 5,000,000 before them validation.
        level: `"word"`, `"char"` or `"byte"`; `fastlm.data.vocabulary` says what a token is.
        compat: None takes the vocabulary from the training text, most frequent first, and reads what only the
            other texts have as `<unk>`. `"awd-lstm-lm"` takes it from all three texts, in order of first
            occurrence, as that program does. The byte level has the same 256 ids either way.
        min_count: what the training text has less often is read as `<unk>`; None means 1, and 2 for the words of
            `"stdlib"`. max_size: the most words to keep. Neither goes with `compat` or the byte level.
        cache_dir: where encoded copies are kept; None means the environment's FASTLM_CACHE, else
            `~/.cache/fastlm`. A damaged copy is made anew; one that cannot be written is done without.

    Raises:
        DataError: a split or the folder is missing, unreadable, empty or not UTF-8, the training text has fewer
            than two different words beside `<eos>` and `<unk>`, or one file is not of the byte level or too short.
        ValueError: an unknown level or compat, or a setting out of range.
    """
    check_level(level)
    if compat not in (None, "awd-lstm-lm"):
        raise ValueError(f"compat must be None or 'awd-lstm-lm', got {compat!r}")
    if (min_count, max_size) != (None, None) and (compat is not None or level == "byte"):
        raise ValueError("min_count and max_size go neither with compat nor with the byte level")
    if min_count is not None and min_count < 1:
        raise ValueError(f"min_count must be at least 1, got {min_count}")
    if max_size is not None and max_size < 3:
        raise ValueError(f"max_size must be at least 3, got {max_size}")
    embedded = source == stdlib.NAME  # Path("stdlib") and "./stdlib" are folders
    if min_count is None:
        min_count = stdlib.MIN_COUNT if embedded and level == "word" else 1
    folder = Path(source)
    alone = os.path.isfile(folder)  # Path.is_file raises where the folder above may not be looked into
    with contextlib.ExitStack() as stack:
        if embedded:
            contents = stdlib.digest()
        else:
            texts = _cut(folder, level, stack) if alone else _three_files(folder, stack)
            contents = [hashlib.sha256(text).hexdigest() for text in texts.values()]
        settings = [CACHE_FORMAT, level, compat, min_count, max_size, contents]
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        name = folder.resolve().name
        path = cache.folder(cache_dir) / f"{name}-{level}-{digest[:32]}.npz"
        encoded = cache.read(path)
        if encoded is None:
            if embedded:
                texts = stdlib.texts()
            paths = {split: folder if alone else folder / f"{split}.txt" for split in SPLITS}
            encoded = _encode(texts, paths, level, compat, min_count, max_size)
            cache.write(path, encoded)
    vocabulary, ids = encoded
    return Corpus(name, level, vocabulary, *(torch.from_numpy(ids[split]).long() for split in SPLITS), digest=digest)


def encode_file(path: str | Path, vocabulary: Vocabulary) -> torch.Tensor:
    """The ids of another text in a given vocabulary, int64 `[N]`.

    Raises:
        DataError: the file is missing, unreadable, empty or not UTF-8, or has a word (named, with its line) that is
            not in the vocabulary, which has no `<unk>`.
    """
    path = Path(path)
    with _mapped(path) as text:
        words, ids = _tokens(text, path, vocabulary.level)
    mapping = vocabulary.mapping(words)
    missing = np.flatnonzero(mapping < 0)
    if len(missing):
        word = words[missing[0]]  # words are in order of first occurrence
        before = ids[: np.argmax(ids == missing[0])]
        line = 1 if EOS not in words else 1 + int(np.count_nonzero(before == words.index(EOS)))
        raise DataError(f"{path}, line {line}: {word!r} is not in the vocabulary, which has no {UNK}")
    return torch.from_numpy(_renumber(ids, mapping)).long()


def _encode(texts, paths, level: str, compat: str | None, min_count: int, max_size: int | None) -> cache.Encoded:
    words, ids = {}, {}
    for split in SPLITS:
        words[split], ids[split] = _tokens(texts[split], paths[split], level)
    train = words["train"]
    counts = _count(ids["train"], len(train)).tolist()
    learnable = sum(count > 0 and word not in (EOS, UNK) for word, count in zip(train, counts, strict=True))
    if learnable < 2:
        raise DataError(f"{paths['train']}: nothing to learn from a vocabulary of {learnable} {level}s")
    if level == "byte":
        vocabulary = Vocabulary.of_bytes(counts)
    elif compat is not None:
        union = list(dict.fromkeys(word for split in SPLITS for word in words[split]))
        vocabulary = Vocabulary(union, counts + [0] * (len(union) - len(counts)), level=level)
    else:
        unknown = not set(train).issuperset(words["valid"] + words["test"])
        limits = {"min_count": min_count, "max_size": max_size, "unknown": unknown}
        vocabulary = Vocabulary.build(train, counts, level=level, **limits)
    return vocabulary, {split: _renumber(ids[split], vocabulary.mapping(words[split])) for split in SPLITS}


def _tokens(text, path: Path, level: str) -> tuple[list[str], np.ndarray]:
    if level == "byte":
        return Vocabulary.of_bytes().words, np.frombuffer(text, np.uint8).copy()
    try:
        return encode_text(text, level)
    except ValueError as error:
        message, offset = error.args
        raise DataError(f"{path}: {message} at byte {offset}") from None


def _pieces(ids: np.ndarray) -> Iterator[np.ndarray]:
    # A second copy of the ids of a large text is the most memory that loading takes.
    return (ids[start : start + (1 << 20)] for start in range(0, len(ids), 1 << 20))


def _count(ids: np.ndarray, size: int) -> np.ndarray:
    return sum((np.bincount(piece, minlength=size) for piece in _pieces(ids)), np.zeros(size, np.int64))


def _renumber(ids: np.ndarray, mapping: np.ndarray) -> np.ndarray:
    for piece in _pieces(ids):
        piece[:] = mapping[piece]
    return ids


def _three_files(folder: Path, stack: contextlib.ExitStack) -> dict[str, mmap.mmap]:
    try:
        present = os.listdir(folder)
    except OSError as error:
        what = f"a corpus is a folder with {FILES}, at the byte level also one file, or the name {stdlib.NAME!r}"
        raise DataError(f"{folder}: {error.strerror} ({what})") from None
    missing = [f"{split}.txt" for split in SPLITS if f"{split}.txt" not in present]
    if missing:
        raise DataError(f"{folder}: no {', '.join(missing)}")
    return {split: stack.enter_context(_mapped(folder / f"{split}.txt")) for split in SPLITS}


def _cut(path: Path, level: str, stack: contextlib.ExitStack) -> dict[str, memoryview]:
    if level != "byte":
        raise DataError(f"{path}: one file is a corpus at the byte level alone; else it is a folder with {FILES}")
    text = _unzipped(path) if zipfile.is_zipfile(path) else stack.enter_context(_mapped(path))
    whole, train = stack.enter_context(memoryview(text)), len(text) - 2 * HELD_OUT
    if train <= 0:
        what = f"the last {HELD_OUT:,} are for the test, the {HELD_OUT:,} before for validation, and none are left"
        raise DataError(f"{path}: a corpus of one file needs more than its {len(text):,} bytes: {what}")
    ends = {"train": (0, train), "valid": (train, train + HELD_OUT), "test": (train + HELD_OUT, len(text))}
    return {split: stack.enter_context(whole[start:stop]) for split, (start, stop) in ends.items()}


def _unzipped(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(names) != 1:
                raise DataError(f"{path}: the archive must hold one file, it has {len(names)}")
            return archive.read(names[0])
    # A RuntimeError is a password or a method of compression that is not there.
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: the archive cannot be read: {error}") from None


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The contents of a file, memory-mapped."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise DataError(f"{path}: the file is empty")
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    with text:
        yield text
