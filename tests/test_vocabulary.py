import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.data import EOS, UNK, Vocabulary
from fastlm.errors import DataError


def test_the_most_frequent_comes_first_and_ties_keep_their_order():
    vocabulary = Vocabulary.build(["c", EOS, "a", "b"], [2, 3, 2, 9])
    assert vocabulary.words == ["b", EOS, "c", "a"]
    assert vocabulary.counts == [9, 3, 2, 2]
    assert (vocabulary.id("b"), vocabulary.eos_id, vocabulary.unk_id) == (0, 1, None)


def test_unk_is_there_only_where_something_needs_it():
    words, counts = ["a", EOS, "b"], [5, 1, 1]
    assert UNK not in Vocabulary.build(words, counts)
    unseen = Vocabulary.build(words, counts, unknown=True)
    assert (unseen.words[-1], unseen.counts[-1]) == (UNK, 0)
    with_unk = Vocabulary.build([UNK, *words], [4, *counts], unknown=True)
    assert with_unk.counts[with_unk.unk_id] == 4


def test_min_count_gives_unk_the_counts_of_what_it_stands_for():
    vocabulary = Vocabulary.build(["a", "b", EOS, "c", "d"], [9, 1, 1, 2, 1], min_count=2)
    assert dict(zip(vocabulary.words, vocabulary.counts, strict=True)) == {"a": 9, "c": 2, UNK: 2, EOS: 1}
    assert vocabulary.words[0] == "a"


@pytest.mark.parametrize("with_unk", [False, True])
def test_max_size_counts_every_entry(with_unk):
    words, counts = ["a", "b", "c", "d", EOS], [5, 4, 3, 2, 1]
    if with_unk:
        words, counts = [*words, UNK], [*counts, 1]
    for size in range(3, 9):
        vocabulary = Vocabulary.build(words, counts, max_size=size)
        assert len(vocabulary) == min(size, len(words))
        assert {EOS, "a"} <= set(vocabulary.words)
        assert sum(vocabulary.counts) == sum(counts)
        assert (UNK in vocabulary) == (with_unk or size < 5)


def test_an_unknown_word_is_unk_or_an_error_that_names_it():
    assert Vocabulary(["a", UNK]).encode("a b") == [0, 1]
    with pytest.raises(DataError, match="'b' is not in the vocabulary"):
        Vocabulary(["a", EOS]).encode("a b")
    with pytest.raises(DataError, match="<eos>"):
        Vocabulary(["a"]).encode("a\na")


def test_encode_puts_eos_for_a_line_feed_only():
    vocabulary = Vocabulary(["a", "b", EOS])
    assert vocabulary.encode("a\r b\n\n a") == [0, 1, 2, 2, 0]
    assert vocabulary.encode("a\n") == [0, 2]
    assert vocabulary.encode("") == []
    assert vocabulary.decode([0, 1, 2, 2, 0]) == "a b\n\na"


def test_a_prompt_keeps_the_space_it_ends_with_at_the_character_level():
    vocabulary = Vocabulary(["a", " ", EOS], level="char")
    assert vocabulary.encode(" a a ") == [0, 1, 0, 1]
    assert vocabulary.encode(" a \n") == [0, 2]


@given(st.text())
def test_bytes_are_their_ids_and_come_back(text):
    vocabulary = Vocabulary.of_bytes()
    ids = vocabulary.encode(text)
    assert bytes(ids) == text.encode()
    assert vocabulary.decode(ids) == text


def test_the_byte_vocabulary():
    vocabulary = Vocabulary.of_bytes()
    assert len(set(vocabulary.words)) == len(vocabulary) == 256
    assert (vocabulary.words[97], vocabulary.words[10], vocabulary.eos_id) == ("a", "<0x0A>", 10)
    assert vocabulary.decode([0xE3, 0x81]) == "\ufffd"


@given(st.lists(st.lists(st.text("ab\u00e9\u3042 ", min_size=1), max_size=3).map("".join), max_size=4))
def test_characters_come_back(lines):
    vocabulary = Vocabulary(["a", "b", "\u00e9", "\u3042", " ", EOS], level="char")
    stripped = "".join(line.strip() + "\n" for line in lines)
    assert vocabulary.decode(vocabulary.encode("".join(line + "\n" for line in lines))) == stripped


@pytest.mark.parametrize(
    "vocabulary",
    [
        Vocabulary.build(["a", EOS], [1, 2], unknown=True),
        Vocabulary.of_bytes(range(256)),
        Vocabulary([EOS], [3], level="char"),
    ],
)
def test_json_round_trip(vocabulary):
    copy = Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert vars(copy) == vars(vocabulary)


def test_a_vocabulary_of_one_word_works():
    vocabulary = Vocabulary([EOS])
    assert vocabulary.encode("\n\n") == [0, 0]
    assert vocabulary.decode([0, 0]) == "\n\n"


def test_errors():
    with pytest.raises(ValueError, match="level must be one of word, char, byte, got 'line'"):
        Vocabulary(["a"], level="line")
    with pytest.raises(ValueError, match="occur twice"):
        Vocabulary(["a", "b", "a"])
    with pytest.raises(ValueError, match="counts must have one entry a word"):
        Vocabulary(["a"], [1, 2])
