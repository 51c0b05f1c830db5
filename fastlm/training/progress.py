"""How far a loop is: a bar where the errors go to a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

PLAIN_INTERVAL = 20.0  # seconds between two lines of a loop that says nothing itself


def say(text: str) -> None:
    """Prints a line to stderr, above a bar if there is one."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """`3h05m`, `2m07s` or `9s`."""
    minutes, s = divmod(int(max(seconds, 0)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, in columns as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


class Progress:
    """Follows a loop over `total` tokens; use as a context manager.

    Args:
        label: what is going on. total: its number of tokens. done: how many of them were done before.
    """

    def __init__(self, label: str, total: int, done: int = 0):
        self.label, self.total, self.done = label, total, done
        self._first, self._start = done, time.perf_counter()
        self._last = self._start
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=label, unit="tok", unit_scale=True, leave=False, dynamic_ncols=True
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, tokens: int) -> None:
        """Counts tokens; without a terminal says how far it is, every now and then."""
        self.done += tokens
        if self._bar is not None:
            self._bar.update(tokens)
        elif time.perf_counter() - self._last > PLAIN_INTERVAL:
            rate = (self.done - self._first) / (time.perf_counter() - self._start)
            left = duration((self.total - self.done) / rate)
            self.note(f"{rate:,.0f} tokens/s | ETA {left}")

    def note(self, text: str) -> None:
        """Says how it goes: beside the bar, or on a line of its own."""
        self._last = time.perf_counter()
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            say(f"{self.label} | {self.done / self.total:.0%} | {text}")
