import math
import os
import re
import resource
import zipfile
from pathlib import Path

import pytest
import torch

from fastlm.data import EOS, UNK, Corpus, Vocabulary, cache, encode_file, encoder, load_corpus, stdlib
from fastlm.errors import DataError, FastlmError

TEXTS = {"train": "b a b\nc b\n", "valid": "a new b\n", "test": "c\n\nb other new"}
PTB = Path(os.environ.get("FASTLM_PTB") or Path(__file__).parents[2] / "shared/data/ptb")
needs_ptb = pytest.mark.skipif(
    not PTB.is_dir(), reason=f"needs the Penn Treebank in {PTB}; FASTLM_PTB names another folder"
)
ENCODERS = ["python"] if encoder.native() is None else ["python", "native"]


@pytest.fixture(params=ENCODERS)
def each_encoder(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setenv("FASTLM_DISABLE_NATIVE", "1")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTLM_CACHE", str(folder))
    return folder


@pytest.fixture
def write(tmp_path):
    """Write a corpus folder; a keyword replaces a split's text or bytes, None leaves it out."""

    def write(**changes) -> Path:
        folder = tmp_path / "corpus"
        folder.mkdir(exist_ok=True)
        for split, text in {**TEXTS, **changes}.items():
            if text is not None:
                (folder / f"{split}.txt").write_bytes(text.encode() if isinstance(text, str) else text)
        return folder

    return write


def same(a: Corpus, b: Corpus) -> bool:
    ids = all(torch.equal(getattr(a, split), getattr(b, split)) for split in TEXTS)
    return (
        ids and vars(a.vocabulary) == vars(b.vocabulary) and (a.name, a.level, a.digest) == (b.name, b.level, b.digest)
    )


def read(corpus: Corpus, split: str) -> str:
    return corpus.vocabulary.decode(getattr(corpus, split))


# ---- What a corpus is -----------------------------------------------------------------------------------


def test_the_vocabulary_is_that_of_the_training_text(write, each_encoder):
    corpus = load_corpus(write())
    assert (corpus.name, corpus.level) == ("corpus", "word")
    assert corpus.vocabulary.words == ["b", EOS, "a", "c", UNK]
    assert corpus.vocabulary.counts == [3, 2, 1, 1, 0]
    assert corpus.train.tolist() == [0, 2, 0, 1, 3, 0, 1] and corpus.train.dtype == torch.int64
    assert read(corpus, "valid") == f"a {UNK} b\n"
    assert read(corpus, "test") == f"c\n\nb {UNK} {UNK}\n"


def test_nothing_is_added_where_the_other_texts_have_no_new_word(write):
    assert UNK not in load_corpus(write(valid="a\n", test="b\n")).vocabulary


def test_the_vocabulary_of_awd_lstm_lm_is_that_of_all_texts(write, each_encoder):
    corpus = load_corpus(write(), compat="awd-lstm-lm")
    assert corpus.vocabulary.words == ["b", "a", EOS, "c", "new", "other"]
    assert corpus.vocabulary.counts == [3, 1, 2, 1, 0, 0]
    assert corpus.test.tolist() == [3, 2, 2, 0, 5, 4, 2]


def test_min_count_and_max_size(write, each_encoder):
    corpus = load_corpus(write(), min_count=2)
    assert corpus.vocabulary.words == ["b", EOS, UNK] and corpus.vocabulary.counts == [3, 2, 2]
    assert read(corpus, "train") == f"b {UNK} b\n{UNK} b\n"
    assert load_corpus(write(), max_size=4).vocabulary.words == ["b", EOS, "a", UNK]


def test_characters(write, each_encoder):
    corpus = load_corpus(write(train=" ab a\r\n\n\u3042b\u3000", valid="b a\n", test="ac\n"), level="char")
    assert read(corpus, "train") == "ab a\n\n\u3042b\n"
    assert read(corpus, "valid") == "b a\n"
    assert corpus.vocabulary.words[corpus.test[1]] == UNK and len(corpus.test) == 3


def test_bytes(write, each_encoder):
    text = b"\xef\xbb\xbfany \xff\x00bytes\r\n"
    corpus = load_corpus(write(train=text), level="byte")
    assert bytes(corpus.train.tolist()) == text
    assert len(corpus.vocabulary) == 256 and sum(corpus.vocabulary.counts) == len(text)
    assert torch.equal(load_corpus(write(train=text), level="byte", compat="awd-lstm-lm").train, corpus.train)


def test_a_byte_order_mark_and_carriage_returns_are_no_words(write, each_encoder):
    plain = load_corpus(write())
    windows = load_corpus(write(**{split: "\ufeff" + text.replace("\n", "\r\n") for split, text in TEXTS.items()}))
    assert same(plain, windows) is False and windows.digest != plain.digest
    assert windows.vocabulary.words == plain.vocabulary.words
    assert all(torch.equal(getattr(plain, split), getattr(windows, split)) for split in TEXTS)


def test_every_line_ends_in_eos_as_in_awd_lstm_lm(write, each_encoder):
    corpus = load_corpus(write(train="a b\n \n\nb"), compat="awd-lstm-lm")
    assert read(corpus, "train") == "a b\n\n\nb\n"


def test_unigram_nll(write):
    corpus = load_corpus(write(train="a b b\n", valid="b\n", test="a\n"))
    # Counts 2, 1, 1 with one added: 3/7 for b, 2/7 for a and <eos>.
    assert corpus.unigram_nll("valid") == pytest.approx(-(math.log(3 / 7) + math.log(2 / 7)) / 2)
    assert corpus.unigram_nll() == pytest.approx(-math.log(2 / 7))


@needs_ptb
def test_penn_treebank(each_encoder):
    corpus = load_corpus(PTB, compat="awd-lstm-lm")
    assert [len(getattr(corpus, split)) for split in TEXTS] == [929_589, 73_760, 82_430]
    assert len(corpus.vocabulary) == 10_000
    assert corpus.vocabulary.words[:3] == ["aer", "banknote", "berlitz"]
    by_frequency = load_corpus(PTB)
    assert by_frequency.vocabulary.words[:3] == ["the", UNK, EOS] and len(by_frequency.vocabulary) == 10_000
    assert by_frequency.vocabulary.decode(by_frequency.test) == corpus.vocabulary.decode(corpus.test)


@needs_ptb
def test_penn_treebank_by_characters():
    corpus = load_corpus(PTB, level="char")
    assert [len(getattr(corpus, split)) for split in TEXTS] == [5_017_482, 393_042, 442_423]
    # As the published set has it: 49 characters, the space among them, and the end of a line.
    assert len(corpus.vocabulary) == 50 and {" ", EOS, "<", "N", "#"} < set(corpus.vocabulary.words)


# ---- One file -------------------------------------------------------------------------------------------


@pytest.fixture
def enwik8(tmp_path):
    """A file of more than ten million bytes, of which no two pieces are alike, and its contents."""
    contents = (torch.arange(10_000_123) % 65_521 % 251).to(torch.uint8).numpy().tobytes()
    (tmp_path / "enwik8").write_bytes(contents)
    return tmp_path / "enwik8", contents


def test_one_file_is_split_as_enwik8_is(enwik8, cache_dir):
    path, contents = enwik8
    corpus = load_corpus(path, level="byte")
    assert (corpus.name, len(corpus.vocabulary), corpus.train.dtype) == ("enwik8", 256, torch.int64)
    pieces = {"train": contents[:-10_000_000], "valid": contents[-10_000_000:-5_000_000], "test": contents[-5_000_000:]}
    for split, piece in pieces.items():
        assert torch.equal(getattr(corpus, split), torch.frombuffer(bytearray(piece), dtype=torch.uint8).long())
    assert len(corpus.train) == 123 and corpus.vocabulary.counts[10] == 1
    (copy,) = cache_dir.iterdir()
    assert copy.stat().st_size < 1.01 * len(contents)  # a byte for a byte
    assert same(load_corpus(path, level="byte"), corpus)


def test_the_archive_is_the_file_in_it(enwik8):
    path, archive = enwik8[0], Path(f"{enwik8[0]}.zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(path, "enwik8")
    plain, inside = load_corpus(path, level="byte"), load_corpus(archive, level="byte")
    assert inside.digest == plain.digest and torch.equal(inside.valid, plain.valid)
    fails(archive, r"enwik8\.zip: one file is a corpus at the byte level alone", level="char")
    damaged = bytearray(archive.read_bytes())
    damaged[100] ^= 0xFF
    archive.write_bytes(damaged)
    fails(archive, r"enwik8\.zip: the archive cannot be read: ", level="byte")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", "a")
        file.writestr("b", "b")
    fails(archive, r"enwik8\.zip: the archive must hold one file, it has 2", level="byte")


@pytest.mark.parametrize("size", [1, 10_000_000])
def test_one_file_that_is_too_short_to_split(tmp_path, size):
    (tmp_path / "enwik8").write_bytes(b"a" * size)
    fails(tmp_path / "enwik8", rf"enwik8: a corpus of one file needs more than its {size:,} bytes", level="byte")


def test_one_file_with_nothing_in_it(tmp_path):
    (tmp_path / "enwik8").write_bytes(b"")
    fails(tmp_path / "enwik8", "enwik8: the file is empty", level="byte")
    (tmp_path / "enwik8").write_bytes(b"a" * 10_000_001)
    fails(tmp_path / "enwik8", "enwik8: nothing to learn from a vocabulary of 1 bytes", level="byte")


# ---- Another text in a given vocabulary -----------------------------------------------------------------


def test_encode_file(write, each_encoder):
    folder = write(train="a b\n\nc a <unk>\n")
    vocabulary = load_corpus(folder).vocabulary
    assert vocabulary.decode(encode_file(folder / "test.txt", vocabulary)) == f"c\n\nb {UNK} {UNK}\n"
    assert bytes(encode_file(folder / "test.txt", Vocabulary.of_bytes()).tolist()) == TEXTS["test"].encode()


def test_encode_file_names_the_unknown_word_and_its_line(write, each_encoder):
    path = write() / "test.txt"
    vocabulary = Vocabulary(["a", "b", "c", EOS])
    with pytest.raises(DataError, match=re.escape(f"{path}, line 3: 'other' is not in the vocabulary")):
        encode_file(path, vocabulary)


# ---- Files that are not as they should be ---------------------------------------------------------------


def fails(source, message, **settings):
    """Loading raises a DataError of one line that matches."""
    with pytest.raises(DataError, match=message) as error:
        load_corpus(source, **settings)
    assert isinstance(error.value, FastlmError) and "\n" not in str(error.value)


@pytest.mark.parametrize("level", ["word", "char", "byte"])
def test_an_empty_file(write, level):
    fails(write(valid=""), r"corpus/valid\.txt: the file is empty", level=level)


def test_a_missing_split(write):
    fails(write(test=None, valid=None), r"corpus: no valid\.txt, test\.txt$")


def test_a_missing_folder(tmp_path):
    fails(tmp_path / "nowhere", r"nowhere: No such file or directory \(a corpus is a folder with train\.txt")


@pytest.mark.parametrize("level", ["word", "char"])
def test_a_file_in_the_place_of_the_folder(write, level):
    fails(write() / "train.txt", r"corpus/train\.txt: one file is a corpus at the byte level alone", level=level)


def test_a_folder_in_the_place_of_a_file(write):
    folder = write(test=None)
    (folder / "test.txt").mkdir()
    fails(folder, r"corpus/test\.txt: Is a directory")


@pytest.mark.parametrize("level", ["word", "char"])
def test_invalid_utf8_is_named_with_its_place(write, each_encoder, level):
    fails(write(valid=b"good\nbad \xe3\x81\n"), r"corpus/valid\.txt: invalid UTF-8 at byte 9$", level=level)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding(write, each_encoder, encoding):
    fails(write(train="caf\u00e9 au lait\n".encode(encoding)), r"train\.txt: invalid UTF-8 at byte \d")


@pytest.mark.parametrize("text, count", [("\n\n", 0), ("a a\na\n", 1), ("a <unk> a\n", 1), ("\ufeff\n", 0)])
def test_a_vocabulary_of_one_word(write, each_encoder, text, count):
    for compat in (None, "awd-lstm-lm"):
        fails(write(train=text), rf"train\.txt: nothing to learn from a vocabulary of {count} words", compat=compat)


def test_a_vocabulary_of_one_character_or_byte(write):
    fails(write(train="aaa\n"), "a vocabulary of 1 chars", level="char")
    fails(write(train="aaa"), "a vocabulary of 1 bytes", level="byte")


def test_a_file_that_may_not_be_read(write):
    folder = write()
    (folder / "valid.txt").chmod(0)
    root = os.geteuid() == 0
    if root:  # root may read everything, so become nobody
        os.seteuid(65534)
    try:
        fails(folder, r"corpus(/valid\.txt)?: Permission denied")
    finally:
        if root:
            os.seteuid(0)


def test_settings():
    for settings, message in [
        ({"level": "line"}, "level must be one of word, char, byte, got 'line'"),
        ({"compat": "fastai"}, "compat must be None or 'awd-lstm-lm', got 'fastai'"),
        ({"min_count": 0}, "min_count must be at least 1, got 0"),
        ({"max_size": 2}, "max_size must be at least 3, got 2"),
        ({"max_size": 9, "level": "byte"}, "neither with compat nor with the byte level"),
        ({"min_count": 2, "compat": "awd-lstm-lm"}, "neither with compat nor with the byte level"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_corpus("anything", **settings)


# ---- Encoded copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["word", "char", "byte"])
def test_the_second_load_does_not_encode(write, level, cache_dir, monkeypatch):
    folder = write()
    first = load_corpus(folder, level=level)
    assert len(list(cache_dir.iterdir())) == 1
    monkeypatch.setattr("fastlm.data.corpus._encode", None)
    assert same(load_corpus(folder, level=level), first)


def test_a_copy_is_kept_for_every_content_and_setting(write, cache_dir, tmp_path):
    first = load_corpus(write())
    digests = {first.digest}
    digests.add(load_corpus(write(), level="char").digest)
    digests.add(load_corpus(write(), compat="awd-lstm-lm").digest)
    digests.add(load_corpus(write(), min_count=2).digest)
    digests.add(load_corpus(write(), max_size=4).digest)
    # Of the same length and in the same place: only the content tells.
    changed = load_corpus(write(train=TEXTS["train"].replace("c", "d")))
    assert "d" in changed.vocabulary and "c" in first.vocabulary
    digests.add(changed.digest)
    assert len(digests) == len(list(cache_dir.iterdir())) == 6
    moved = write().rename(tmp_path / "moved")
    assert load_corpus(moved).digest == first.digest


def test_a_damaged_copy_is_made_anew(write, cache_dir):
    folder = write(train="some words that repeat words " * 50)
    first = load_corpus(folder)
    (copy,) = cache_dir.iterdir()
    good = copy.read_bytes()
    damaged = [b"", b"not a copy", good[: len(good) // 2], good[:-1], good[:7]]
    damaged += [good[:i] + bytes([good[i] ^ 0x41]) + good[i + 1 :] for i in range(0, len(good), 97)]
    for content in damaged:
        copy.write_bytes(content)
        assert same(load_corpus(folder), first)
    copy.write_bytes(b"")
    load_corpus(folder)
    assert cache.read(copy) is not None


@pytest.mark.parametrize("obstacle", ["file", "below a file", "no space"])
def test_a_copy_that_cannot_be_written_is_done_without(write, cache_dir, tmp_path, obstacle):
    folder = write(train="several words\n" * 500)
    blocked = tmp_path / "blocked"
    if obstacle == "no space":
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            corpus = load_corpus(folder, cache_dir=blocked)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(blocked.iterdir()) == []
    else:
        blocked.write_text("in the way")
        corpus = load_corpus(folder, cache_dir=blocked if obstacle == "file" else blocked / "below")
        assert blocked.read_text() == "in the way"
    assert same(corpus, load_corpus(folder))


def test_where_copies_are_kept(write, tmp_path, monkeypatch):
    monkeypatch.delenv("FASTLM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_corpus(write())
    assert len(list((tmp_path / "home/.cache/fastlm").iterdir())) == 1
    load_corpus(write(), cache_dir="~/elsewhere")
    assert len(list((tmp_path / "home/elsewhere").iterdir())) == 1


# ---- The documentation of the standard library ----------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    return stdlib.texts()


@pytest.fixture
def library(texts, monkeypatch):
    """Load the corpus, reading the sources only once for all tests."""
    monkeypatch.setattr(stdlib, "texts", lambda: texts)
    return lambda **settings: load_corpus("stdlib", **settings)


def test_stdlib_is_half_a_million_tokens_in_three_splits(library):
    corpus = library()
    sizes = [len(corpus.train), len(corpus.valid), len(corpus.test)]
    assert 350_000 < sum(sizes) < 700_000
    assert 0.7 < sizes[0] / sum(sizes) < 0.88 and min(sizes) > 25_000
    assert 5_000 < len(corpus.vocabulary) < 12_000


def test_stdlib_is_english_with_few_unknown_words(library):
    corpus = library()
    unknown = [float((getattr(corpus, split) == corpus.vocabulary.unk_id).float().mean()) for split in TEXTS]
    assert unknown[0] < 0.02 and max(unknown) < 0.06
    assert {"the", "of", "to", ".", ","} <= set(corpus.vocabulary.words[:20])
    assert 300 < math.exp(corpus.unigram_nll()) < 450


def test_stdlib_characters_are_the_same_text(library, texts):
    assert read(library(level="char"), "test").encode() == texts["test"]


def test_stdlib_is_read_from_its_copy_the_second_time(library, monkeypatch):
    first = library()
    monkeypatch.setattr(stdlib, "texts", None)
    assert same(load_corpus("stdlib"), first)
    assert load_corpus("stdlib", compat=None, min_count=stdlib.MIN_COUNT).digest == first.digest


def test_a_folder_called_stdlib_is_a_folder(write, monkeypatch):
    folder = write()
    folder.rename(folder.with_name("stdlib"))
    monkeypatch.chdir(folder.parent)
    assert len(load_corpus(Path("stdlib")).train) == len(load_corpus("./stdlib").train) == 7


def test_documentation_is_read_in_order_without_importing():
    source = b'''
"module"
import nowhere
class A:
    """class

    >>> session
    """
    x: int = 1; "not documentation"
    if True:
        async def f(self):
            "method"
    else:
        def g(self): "other method"
    def no_documentation(self):
        def inner(): "inner"
try: pass
except ValueError:
    def late(): "late"
raise SystemExit
'''
    strings = [string for string in stdlib.documentation("a", source) if string]
    assert strings == ["module", "class\n\n>>> session", "method", "other method", "inner", "late"]
    assert stdlib.documentation("a", b"def broken(:") == []
    assert stdlib.documentation(stdlib.TOPICS, b"topics = {'a': 'help', 'b': 'more'}") == ["help", "more"]


def test_paragraphs_become_lines_of_tokens():
    text = "It doesn't call\n  os.path_join(x, 12)... \n\n>>> 1 + 1\n2\n\n  \n``Code`` -- caf\u00e9"
    assert list(stdlib.paragraphs(text)) == [
        "it doesn't call os . path _ join ( x , 12 ) ...",
        "`` code `` -- caf\u00e9",
    ]


def test_modules_keep_their_split():
    names = ("os", "decimal", "difflib", stdlib.TOPICS)
    assert [stdlib.split_of(name) for name in names] == ["train", "valid", "test", "train"]


def test_a_python_without_its_sources(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    fails("stdlib", "stdlib: this Python has no library sources under")
