"""Times the contenders of a case in turns, in one process, after each has been found right.

A round gives every contender one turn, so that whatever slows the machine for a while slows all of them. A turn starts
from a trimmed heap and one call that is not timed (a contender follows itself, as in a training loop), then one timed
call. Contenders called slow have no untimed one. A case whose own result is wrong is not timed; a competitor that is
wrong or fails is left out and named, and so is another implementation of ours, which counts as a failure.

On a GPU a time is what passes between two events while the host is ahead: a sleeping kernel keeps the GPU busy until
the work is queued, as earlier work does within a model. What the queueing took stands beside it (`host_ms`).
"""

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import Case, Contender, Work, WrongResult, verify
from memory import held, peak, trim


@dataclass(frozen=True)
class Effort:
    """seconds: that the rounds of a case may take. rounds: least and most of them."""

    seconds: float
    rounds: tuple[int, int]


EFFORTS = {"tiny": Effort(0.05, (2, 3)), "quick": Effort(3.0, (3, 11)), "full": Effort(20.0, (5, 40))}
ON_GPU = Effort(1.5, (5, 40))  # a device that does nothing else repeats itself
GPU_LOST = 70  # the exit status of a process that can run no more on its GPU
CYCLES = 2_000_000  # a millisecond of the sleeping kernel, at 2 GHz
MOST_AHEAD = 20.0  # milliseconds


@dataclass
class Entry:
    """A contender and what was measured of it."""

    contender: Contender
    ms: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)  # milliseconds until the work was queued on a GPU
    extra: list[int] = field(default_factory=list)
    kept: int | None = None
    error: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0  # of a turn
    queued: float = 0.0  # milliseconds of the last call that was not timed, until it returned


def statistic(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, with linear interpolation."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return at(0.5), at(0.2), at(0.8)


def timed(device: str, run: Callable[[], Any], ahead: float = 0.0) -> tuple[Any, float, float]:
    """A call and its time.

    Args:
        device: "cpu" or "cuda". run: the call. ahead: milliseconds that the host gets to queue it on a GPU.

    Returns:
        The result, its milliseconds (on a GPU those between two events on the stream), and those that the call itself
        took, which on a GPU only queues the work.
    """
    if device == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(int(ahead * CYCLES))
        first.record()
    start = time.perf_counter_ns()
    result = run()
    host = (time.perf_counter_ns() - start) / 1e6
    if device == "cpu":
        return result, host, host
    last.record()
    torch.cuda.synchronize()
    return result, first.elapsed_time(last), host


def input_sets(device: str, work: Work) -> list[Sequence[Any]]:
    """One set of inputs; on a GPU as many as two level-2 caches hold, so that a call finds none of its own there."""
    sets = [work.inputs()]
    if device == "cuda":
        size = sum(x.nbytes for x in sets[0] if isinstance(x, torch.Tensor))
        wanted = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        for _ in range(min(15, wanted // max(size, 1))):
            sets.append(work.inputs())
    return sets


class Runner:
    """One case on one device.

    Args:
        case: what to measure. device: "cpu" or "cuda". effort: how long.
    """

    def __init__(self, case: Case, device: str, effort: Effort):
        self.case, self.device, self.effort = case, device, effort
        torch.manual_seed(0)
        self.work = case.make(device)
        self.sets = input_sets(device, self.work)
        self.entries = [Entry(contender) for contender in self.work.contenders]
        self.left_out: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self._calls = 0

    def check(self) -> None:
        """Compare every contender with the reference, and leave the wrong competitors out.

        Raises:
            WrongResult: the result of this package is wrong.
        """
        references: dict[Any, Any] = {}
        for entry in list(self.entries):
            contender = entry.contender
            mine = entry is self.entries[0]
            trim(self.device)
            before = held(self.device)
            start = time.perf_counter()
            try:
                with threads(contender.threads):
                    result = (contender.check or contender.run)(*self.sets[0])
                entry.seconds, known = time.perf_counter() - start, len(references)
                entry.error = verify(self.case, self.work, contender, result, references, self.sets[0])
                del result
                trim(self.device)
                if known == len(references) and before is not None:  # else the references are in the difference
                    entry.kept = max(0, held(self.device) - before)
            except WrongResult as e:
                if mine:
                    raise
                self._leave_out(entry, f"wrong: {e}")
            except Exception as e:  # a competitor may fail in any way, and that is its own affair
                if mine:
                    raise
                self._leave_out(entry, f"fails: {type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}")

    def _leave_out(self, entry: Entry, reason: str) -> None:
        name = entry.contender.name
        self.entries.remove(entry)
        self.left_out[name] = reason
        if name.startswith("fastlm"):
            self.failures[f"{self.case.op}: {self.case.title}: {name}"] = reason

    def _slow(self, entry: Entry) -> bool:
        """A GPU has no calls of seconds, and the first one after `trim` waits for memory."""
        return entry.contender.slow and self.device == "cpu"

    def warm(self) -> int:
        """Run each contender once more, unless it is slow; returns how many rounds there is time for."""
        for entry in self.entries:
            if not self._slow(entry):
                start = time.perf_counter()
                self._untimed(entry)
                entry.seconds = 2 * (time.perf_counter() - start)
        low, high = self.effort.rounds
        return max(low, min(high, int(self.effort.seconds / sum(e.seconds for e in self.entries))))

    def _inputs(self) -> Sequence[Any]:
        self._calls += 1
        return self.sets[self._calls % len(self.sets)]

    def _untimed(self, entry: Entry) -> None:
        inputs = self._inputs()

        def run():
            start = time.perf_counter()
            result = entry.contender.run(*inputs)
            entry.queued = 1e3 * (time.perf_counter() - start)
            return result

        with threads(entry.contender.threads):
            _, extra = peak(self.device, run, _tensors(inputs))
        self._note(entry, extra)

    def _note(self, entry: Entry, extra: int | None) -> None:
        if extra is not None:
            entry.extra.append(extra)

    def turn(self, entry: Entry) -> None:
        """A whole turn of a contender."""
        self.before(entry)
        self.time(entry)

    def before(self, entry: Entry) -> None:
        """What comes before the timed call of a turn."""
        if not self._slow(entry):
            self._untimed(entry)

    def time(self, entry: Entry) -> None:
        """The timed call of a turn; of a slow contender its memory too, since it has no other call."""
        inputs = self._inputs()
        ahead = min(MOST_AHEAD, 0.2 + entry.queued) if self.work.ahead else 0.0

        def run():
            result, ms, host = timed(self.device, lambda: entry.contender.run(*inputs), ahead)
            entry.ms.append(ms / entry.contender.share)
            if self.device == "cuda":
                entry.host.append(host / entry.contender.share)
            return result

        with threads(entry.contender.threads):
            if self._slow(entry):
                self._note(entry, peak(self.device, run, _tensors(inputs))[1])
            else:
                run()


def measure(runner: Runner, benchmark: Any) -> None:
    """Check, then time in rounds. pytest-benchmark times our calls too; the others run in its set-up of a round."""
    runner.check()
    with quiet():
        rounds = runner.warm()
        first, *others = runner.entries
        order = random.Random(0)

        def setup():
            order.shuffle(others)
            for entry in others:
                runner.turn(entry)
            runner.before(first)

        benchmark.pedantic(lambda: runner.time(first), setup=setup, rounds=rounds)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection but where a turn asks for it, and then only of what is new."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Another number of threads for a block."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def _tensors(inputs: Sequence[Any]) -> list[torch.Tensor]:
    return [x for x in inputs if isinstance(x, torch.Tensor)]
