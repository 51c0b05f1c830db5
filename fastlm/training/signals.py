"""Ctrl-C and SIGTERM as a request that a loop reads when it suits it."""

from __future__ import annotations

import signal
import threading


class StopRequest:
    """True in a condition once SIGINT or SIGTERM has come; a second signal takes its usual course.

    Use as a context manager around the loop. Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self._asked

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: object) -> None:
        self._asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
