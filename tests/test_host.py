import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastlm import _lib
from fastlm.data import encoder
from fastlm.data.vocabulary import EOS

host = encoder.native()
needs_host = pytest.mark.skipif(host is None, reason="fastlm._host is not built, or switched off")
SPACES = [chr(i) for i in range(sys.maxunicode + 1) if chr(i).isspace()]


def obvious(text: bytes, level: str) -> list[str]:
    """What the encoder must do, said in one line a step, all in memory."""
    lines = text.decode("utf-8-sig").split("\n")
    if lines[-1] == "":
        lines.pop()
    return [token for line in lines for token in [*(line.split() if level == "word" else line.strip()), EOS]]


def encode(text: bytes, level: str, threads: int | None):
    """(words, ids) by the native encoder with that many threads, or by the Python one."""
    if threads is None:
        return encoder._encode_in_python(text, level)
    return {"word": host.encode_words, "char": host.encode_characters}[level](text, threads)


def check(text: bytes, level: str, threads: int | None):
    words, ids = encode(text, level, threads)
    expected = obvious(text, level)
    assert words == list(dict.fromkeys(expected))
    assert [words[i] for i in ids] == expected
    assert ids.dtype == np.int32


VARIANTS = [None] if host is None else [None, 1, 2, 3, 7, 64]
FIXED = [
    b"",
    b"\n",
    b"\n\n\n",
    b"one",
    b"one two\n",
    b"one\r\ntwo three\r\n\r\n",
    b"  indented \t and trailing \n \nlast line",
    b"\xef\xbb\xbf",
    b"\xef\xbb\xbfmarked\n",
    "a\ufeffb \ufeff\n".encode(),
    b"nul\0byte nul\0\0byte nul \0 \0\0\n",
    b"<eos> before any line end <eos>\n",
    b"12345678 123456789 1234567 1234567812345678 12345678123456789 12345678123456780\n" * 3,
    b"x" * 5000 + b" " + b"x" * 4999 + b"y " + b"x" * 5000,
    "".join(f"a{space}b" for space in SPACES).encode(),
    "".join(f"{space}{space}\n" for space in SPACES).encode(),
    "\u200b\u180e\u2060 are not white space; \u3042\u3000\U0001f600\u2028\u00e9\u00a0x\n".encode(),
]


@pytest.mark.parametrize("threads", VARIANTS)
@pytest.mark.parametrize("level", ["word", "char"])
def test_words_and_ids_of_unfriendly_texts(level, threads):
    for text in FIXED:
        check(text, level, threads)


@settings(max_examples=150, deadline=None)
@given(
    st.text(st.one_of(st.sampled_from(["a", "b", "\n", " ", "\r", "\ufeff", *SPACES]), st.characters(codec="utf-8"))),
    st.sampled_from(VARIANTS),
    st.sampled_from(["word", "char"]),
)
@example("\ufeff\ufeff", None, "word")
def test_words_and_ids_of_any_text(text, threads, level):
    check(text.encode(), level, threads)


@needs_host
@pytest.mark.parametrize("level", ["word", "char"])
def test_the_number_of_threads_does_not_change_the_result(level):
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefgh\u00e9\u3042", k=draw.randint(1, 20))) for _ in range(9000)]
    text = "".join(draw.choice(vocabulary) + draw.choice(" \n ") for _ in range(40_000)).encode()
    words, ids = encode(text, level, 1)
    for threads in (None, 2, 5, 16):
        other_words, other_ids = encode(text, level, threads)
        assert other_words == words
        np.testing.assert_array_equal(other_ids, ids)


@needs_host
@pytest.mark.parametrize("before", [*range(70), 127, 128])
def test_words_and_characters_across_blocks(before):
    """The native encoder reads 64 bytes at a time; whatever it looks for may begin in one block and end in the next."""
    for middle in ("\u3042\u3000b", "a\u2003 \u00a0\U0001f600", "word\n\n w\x00rd", "\x1f\x1e\x1b", "a" * 130):
        for after in ("", "\n", " longer than sixteen bytes, and " + "y" * 90 + "\n"):
            text = ("x" * before + middle + after).encode()
            for threads in (1, 3):
                check(text, "word", threads)


@needs_host
def test_many_words_that_differ_in_few_bytes():
    words = [f"{i:x}".rjust(width, "0") for width in (8, 9, 15, 16, 17, 24, 40) for i in range(0, 30_000, 7)]
    words += [f"{i:x}".ljust(width, "0") for width in (9, 16, 17, 40) for i in range(1, 30_000, 7)]
    words = list(dict.fromkeys(words))
    text = " ".join(words + words[::-1]).encode()
    for threads in (1, 2, 5):
        found, ids = encode(text, "word", threads)
        assert found == [*words, EOS]
        np.testing.assert_array_equal(ids, [*range(len(words)), *reversed(range(len(words))), len(words)])


@needs_host
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_that_of_the_ids(fresh_python):
    code = (
        "import re, threading, numpy\n"
        "from fastlm.data import encoder\n"
        "read = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) << 10\n"
        "text = b'as short as words can be \\n' * 1_500_000\n"
        "before, peak, done = read(), 0, threading.Event()\n"
        "thread = threading.Thread(target=lambda: (encoder.native().encode_words(text, 2)[1], done.set()))\n"
        "thread.start()\n"
        "while not done.wait(0.001): peak = max(peak, read() - before)\n"
        "ids = 4 * 7 * 1_500_000\n"
        "assert 0.5 * ids < peak < 1.4 * ids, peak / ids\n"
    )
    fresh_python(code)


INVALID = [
    b"\x80",
    b"\xc0\xaf",
    b"\xc1\xbf",
    b"\xe0\x80\x80",
    b"\xed\xa0\x80",
    b"\xf0\x8f\xbf\xbf",
    b"\xf4\x90\x80\x80",
    b"\xf5\x80\x80\x80",
    b"\xff\xfe",
    b"\xe3\x81",
    b"\xf0\x9f\x98",
    b"\xc3",
    b"\xe3\x81x",
    b"\xc3\n",
]


@pytest.mark.parametrize("threads", VARIANTS)
@pytest.mark.parametrize("level", ["word", "char"])
@pytest.mark.parametrize("bad", INVALID)
def test_invalid_utf8_is_found_at_its_first_byte(bad, level, threads):
    for before in (b"", b"\xef\xbb\xbf", b"words, more words\nand \xe3\x81\x82", b"words " * 30):
        for after in (b"", b" x\n", b"\n and more bad \xff\xff"):
            text = before + bad + after
            with pytest.raises(UnicodeDecodeError) as python:
                text.decode()
            with pytest.raises(ValueError) as error:
                encode(text, level, threads)
            assert error.value.args == ("invalid UTF-8", python.value.start)


@needs_host
def test_threads_start_at_one_and_buffers_are_read_in_place():
    assert encode(b"a b\n", "word", 0)[0] == ["a", "b", EOS]
    data = bytearray(b"a b a\n")
    assert host.encode_words(memoryview(data), 2)[1].tolist() == [0, 1, 0, 2]
    assert data == b"a b a\n"
    for wrong in (memoryview(data)[::2], np.zeros(4, np.int32), np.zeros((2, 2), np.uint8)):
        with pytest.raises(TypeError, match="data must be a contiguous buffer of bytes"):
            host.encode_words(wrong, 1)
    with pytest.raises(TypeError):
        host.encode_words("text", 1)


def test_the_environment_switches_the_native_encoder_off(monkeypatch):
    monkeypatch.setenv("FASTLM_DISABLE_NATIVE", "1")
    assert encoder.native() is None
    words, ids = encoder.encode_text(b"a b a", "word")
    assert (words, ids.tolist()) == (["a", "b", EOS], [0, 1, 0, 2])


@needs_host
def test_cpu_features():
    features = host.cpu_features()
    assert features.pop("isa") in _lib.INSTRUCTION_SETS
    assert all(type(value) is bool for value in features.values())


@needs_host
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux's /proc/cpuinfo")
def test_cpu_features_agree_with_the_kernel():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    features = host.cpu_features()
    del features["isa"]
    features.pop("neon", None)  # Linux calls it asimd
    assert features == {name: name in names for name in features}


@needs_host
@pytest.mark.skipif("FASTLM_CPU" in os.environ, reason="FASTLM_CPU forces another instruction set")
def test_the_instruction_set_is_the_one_the_kernels_choose(native):
    assert host.cpu_features()["isa"] == _lib.instruction_set()
