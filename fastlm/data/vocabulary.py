"""Words and their ids.

Three levels of text. All of them cut lines at a line feed only; a carriage return is white space like any other.

| level | a token is | `<eos>` | decoding gives |
|---|---|---|---|
| `word` | a word of `line.split()` | after every line | words joined by one space |
| `char` | a character of `line.strip()`, spaces included | after every line | the text of the stripped lines |
| `byte` | a byte; its id is its value, always 256 ids | byte 10 serves as one | the text itself |

At the character level a line loses the white space at its ends, so that the word-level text of the Penn Treebank
gives the published character-level data set. A file that already has one token a word (`t h e _ c a t`) is read
at the word level.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from fastlm.errors import DataError

EOS, UNK = "<eos>", "<unk>"
LEVELS = ("word", "char", "byte")


def check_level(level: str) -> None:
    """Raise ValueError unless `level` is one of `LEVELS`."""
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")


class Vocabulary:
    """A fixed list of tokens; the id of a token is its place. Not changed after it is made.

    Attributes:
        words: the tokens. At the byte level printable ASCII stands for itself, any other byte as `<0x0A>`.
        counts: how often each occurs in the training text; 0 for a token that only others have.
        level: `"word"`, `"char"` or `"byte"`.
        eos_id: the id of `<eos>` (10, the line feed, at the byte level), or None.
        unk_id: the id of `<unk>`, or None.
    """

    def __init__(self, words: Iterable[str], counts: Iterable[int] | None = None, *, level: str = "word"):
        """Raises ValueError for an unknown level, a word that occurs twice, or a wrong number of counts."""
        check_level(level)
        self.words = list(words)
        self.counts = [0] * len(self.words) if counts is None else [int(count) for count in counts]
        self.level = level
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            raise ValueError(f"words: {len(self.words) - len(self._ids)} of {len(self.words)} occur twice")
        if len(self.counts) != len(self.words):
            raise ValueError(f"counts must have one entry a word, got {len(self.counts)} for {len(self.words)} words")
        self.eos_id = ord("\n") if level == "byte" else self._ids.get(EOS)
        self.unk_id = self._ids.get(UNK)

    @classmethod
    def of_bytes(cls, counts: Iterable[int] | None = None) -> "Vocabulary":
        """The 256 bytes."""
        words = [chr(i) if 0x20 < i < 0x7F else f"<0x{i:02X}>" for i in range(256)]
        return cls(words, counts, level="byte")

    @classmethod
    def build(
        cls,
        words: Sequence[str],
        counts: Sequence[int],
        *,
        level: str = "word",
        min_count: int = 1,
        max_size: int | None = None,
        unknown: bool = False,
    ) -> "Vocabulary":
        """The vocabulary of a training text, most frequent first; of equals the first to occur comes first.

        Args:
            words: the different tokens in order of first occurrence. counts: how often each occurs.
            level: `"word"` or `"char"`.
            min_count: rarer tokens are left out. max_size: the most tokens to keep, `<eos>` and `<unk>` included,
                which are kept whatever their count.
            unknown: whether other texts have tokens that this one lacks.

        `<unk>` is added where the text lacks it and something needs it: a token left out (their counts become its
        count), or `unknown`. A row that nothing maps to would be a parameter that nothing trains.
        """
        count_of = {word: int(count) for word, count in zip(words, counts, strict=True)}
        ordinary = [word for word in count_of if word not in (EOS, UNK)]
        kept = sorted((word for word in ordinary if count_of[word] >= min_count), key=lambda word: -count_of[word])
        needs_unk = UNK in count_of or unknown or len(kept) < len(ordinary)
        if max_size is not None and len(kept) + 1 + needs_unk > max_size:
            needs_unk = True
            kept = kept[: max(0, max_size - 2)]
        if needs_unk:
            left_out = sum(count_of[word] for word in ordinary) - sum(count_of[word] for word in kept)
            count_of[UNK] = count_of.get(UNK, 0) + left_out
        chosen = {EOS, UNK, *kept}
        final = sorted((word for word in count_of if word in chosen), key=lambda word: -count_of[word])
        return cls(final, [count_of[word] for word in final], level=level)

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} of level {self.level!r})"

    def id(self, word: str) -> int:
        """The id of a token, that of `<unk>` for one it does not have; DataError where there is no `<unk>`."""
        found = self._ids.get(word, self.unk_id)
        if found is None:
            raise DataError(f"{word!r} is not in the vocabulary, which has no {UNK}")
        return found

    def encode(self, text: str) -> list[int]:
        """The ids of a text. `<eos>` stands for a line feed: none is added behind the last line.

        Raises:
            DataError: a token that is not in the vocabulary, and no `<unk>`.
        """
        if self.level == "byte":
            return list(text.encode())
        *lines, rest = text.split("\n")
        ids = []
        for line in lines:
            ids += [self.id(token) for token in split_line(line, self.level)]
            ids.append(self.id(EOS))
        # White space at the end of an unfinished line is text that goes on.
        return ids + [self.id(token) for token in (rest.split() if self.level == "word" else rest.lstrip())]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: `<eos>` becomes a line feed, a broken UTF-8 sequence of bytes the character U+FFFD."""
        if self.level == "byte":
            return bytes(int(i) for i in ids).decode(errors="replace")
        words = ["\n" if i == self.eos_id else self.words[i] for i in map(int, ids)]
        if self.level == "char":
            return "".join(words)
        return " ".join(words).replace(" \n", "\n").replace("\n ", "\n")

    def mapping(self, words: Sequence[str]) -> np.ndarray:
        """The id of each of `words`, int32, -1 for one that is not there where there is no `<unk>`."""
        unknown = -1 if self.unk_id is None else self.unk_id
        return np.array([self._ids.get(word, unknown) for word in words], dtype=np.int32)

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return {"level": self.level, "words": self.words, "counts": self.counts}

    @classmethod
    def from_dict(cls, data: dict) -> "Vocabulary":
        """The inverse of `to_dict`."""
        return cls(data["words"], data["counts"], level=data["level"])


def split_line(line: str, level: str) -> list[str]:
    """The tokens of a line at the word or character level, without `<eos>`."""
    return line.split() if level == "word" else list(line.strip())
