"""Text to ids: counting the words and numbering them, against a Python dict and Hugging Face tokenizers.

The text is drawn from a Zipf distribution over invented words. Competitors that would take long run on the first part
of it; their times are divided by its share. tokenizers only encodes: it gets the vocabulary and the lines for nothing.
"""

import mmap
import tempfile
from array import array
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case, Contender, NotInstalled, Target, Work, optional

from fastlm.data.encoder import encode_text

EOS, DICT, TOKENIZERS = "<eos>", "Python dict loop", "tokenizers, WordLevel"
LETTERS, WORDS, LINE = "etaoinshrdlucmfwypvbgkjqxzetaoinshrd", 50_000, 24


@cache
def text_file(size: int) -> tuple[tempfile.TemporaryDirectory, Path]:
    """A file of about `size` bytes, the same at every call; it goes with its folder."""
    draw = np.random.default_rng(0)
    # two bits a letter: words of one to eight letters, the frequent ones short
    spelled = ["".join(LETTERS[2 * s + (i >> s & 3)] for s in range(0, i.bit_length() or 1, 2)) for i in range(WORDS)]
    words = np.array(spelled, dtype=object)
    rank = np.arange(1, WORDS + 1)
    until = np.cumsum(1 / rank) / np.sum(1 / rank)
    folder = tempfile.TemporaryDirectory(prefix="fastlm-bench-")
    path = Path(folder.name) / "text.txt"
    with path.open("w") as file:
        while file.tell() < size:
            count = min(1 << 20, max(LINE, (size - file.tell()) // 5))
            drawn = words[np.searchsorted(until, draw.random(count - count % LINE))]
            file.write("".join(" ".join(line) + "\n" for line in drawn.reshape(-1, LINE)))
    return folder, path


def dict_loop(text: str) -> torch.Tensor:
    """The usual program: line by line, word by word, a new number for a new word."""
    numbers: dict[str, int] = {}
    ids = array("i")
    for line in text.splitlines():
        for word in line.split() + [EOS]:
            if word not in numbers:
                numbers[word] = len(numbers)
            ids.append(numbers[word])
    return torch.frombuffer(ids, dtype=torch.int32)


def tokenizer(words: list[str]):
    level = optional("tokenizers.models", "WordLevel", "cpu")
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import WhitespaceSplit

    made = Tokenizer(level({word: i for i, word in enumerate(words)}, unk_token=EOS))
    made.pre_tokenizer = WhitespaceSplit()
    return made


def work(device, *, size, part):
    """size, part: bytes of the text and of what the slow competitors get of it."""
    folder, path = text_file(size)
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sum(data[:: mmap.PAGESIZE])  # resident from here on: it is the input
    stop = data.find(b"\n", min(part, len(data)) - 1) + 1
    text, share = data[:stop].decode(), stop / len(data)
    words, ids = encode_text(data, "word")
    note = f"measured on the first {stop / 1e6:.3g} MB and scaled" if share < 1 else ""

    def exact_part(*_):
        return (dict_loop(text),)

    def exact(*_):
        return (dict_loop(data[:].decode()),)

    def run(data):
        return (torch.from_numpy(encode_text(data, "word")[1]),)

    result = Work(
        lambda: [data],
        [
            Contender("fastlm", run),
            Contender(DICT, lambda _: (dict_loop(text),), None, exact_part, exact_part, share, note, slow=True),
        ],
        exact=exact,
        plain=exact,
        names=["ids"],
        bytes=len(data) + ids.nbytes,
    )
    result.add(TOKENIZERS, partial(by_tokenizers, words, text, exact_part, share, note))
    return result


def by_tokenizers(words, text, exact, share, note):
    made = tokenizer(words)
    if not hasattr(made, "encode_batch_fast"):
        raise NotInstalled("tokenizers older than 0.20")
    lines = [line + " " + EOS for line in text.splitlines()]

    def run(_):
        return made.encode_batch_fast(lines)

    def check(_):
        return (torch.tensor([i for line in run(_) for i in line.ids], dtype=torch.int32),)

    note = ", ".join(filter(None, [note, "encodes only, from lines in memory"]))
    return Contender(TOKENIZERS, run, check, exact, exact, share, note, slow=True)


def case(text, part, title, **options):
    return Case("host", title, partial(work, size=text, part=part), devices=("cpu",), **options)


GOAL = {"cpu": (Target(DICT, ratio=10), Target(TOKENIZERS, ratio=25))}
CASES = [
    case(100 << 20, 10 << 20, "words to ids, 100 MB of text", size="quick", targets=GOAL),
    case(2000, 1000, "words to ids, 2 kB of text", size="tiny"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_host(case, measured):
    measured(case)
