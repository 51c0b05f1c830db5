"""What a benchmark is made of: cases, contenders, and the check that comes before any timing."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastlm import _lib, ops, testing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Tensors = tuple[Tensor, ...]


class WrongResult(Exception):
    """A contender's result is further from the float64 one than plain PyTorch's allows."""


class NotInstalled(Exception):
    """A competitor that is not here; the message says what is missing."""


@dataclass(frozen=True)
class Target:
    """What a case has to reach on a device.

    Attributes:
        against: the competitor. ratio: its time over ours, at least. memory: our extra memory over its, at most.
        ms: our time, at most. share: of the measured ceiling, at least. mb: our extra memory, at most.
    """

    against: str = ""
    ratio: float | None = None
    memory: float | None = None
    ms: float | None = None
    share: float | None = None
    mb: float | None = None


@dataclass
class Contender:
    """One way to do the work of a case.

    Attributes:
        name: as it stands in the table; those of this package start with "fastlm".
        run: does the work on one set of inputs and returns its results. Timed.
        check: the same code, where `run` draws its own random mask with a given one instead; else `run` is checked.
        exact, plain: what its check is compared with, where that is not what the case compares with.
        share: the part of the work that `run` does, where all of it would take too long; times are divided by it.
        note: what a reader must know about its figure.
        threads: how many threads it runs with; by default as many as PyTorch has.
        slow: its calls take seconds, so that the check is its only warming up.
    """

    name: str
    run: Callable[..., Any]
    check: Callable[..., Tensors] | None = None
    exact: Callable[..., Tensors] | None = None
    plain: Callable[..., Tensors] | None = None
    share: float = 1.0
    note: str = ""
    threads: int | None = None
    slow: bool = False


@dataclass
class Work:
    """The inputs and the contenders of a case on a device.

    Attributes:
        inputs: draws one set of inputs; more sets are drawn where they are rotated.
        contenders: the first one is ours, the one that the ratios are about.
        exact: results in float64. plain: results of plain PyTorch in the dtype of the inputs. names: of the results.
        flops, bytes: the least that the work needs: products, and trips of its inputs and outputs through memory.
        missing: competitors that are not installed, with the reason.
        products: the dtype whose rate of products is the ceiling, where it is not that of the inputs.
        profiled: whether the results say where its time goes.
        ahead: whether a GPU is timed with the host ahead; else, as for a whole step, the host's part counts too.
        steps: of a recurrence, for the report to say the microseconds of one on a GPU.
    """

    inputs: Callable[[], Sequence[Any]]
    contenders: list[Contender]
    exact: Callable[..., Tensors]
    plain: Callable[..., Tensors]
    names: Sequence[str] = ()
    flops: float = 0.0
    bytes: float = 0.0
    missing: dict[str, str] = field(default_factory=dict)
    products: str = ""
    profiled: bool = False
    ahead: bool = True
    steps: int = 0

    def add(self, name: str, make: Callable[[], Contender]) -> None:
        """Add a competitor, or note why it is not there."""
        try:
            self.contenders.append(make())
        except NotInstalled as e:
            self.missing[name] = str(e)


@dataclass(frozen=True)
class Case:
    """One line of work that is timed.

    Attributes:
        op: the operator, "training" or "host". title: the line in the table, unique within the operator.
        make: builds it on a device. dtype: of the inputs.
        size: of the smallest run that has it: "tiny" (nothing but a test of the suite), "quick" or "full".
        targets: by device.
        sweep: series, axis and value, of which the plots are made. devices: where it runs.
        slow: it takes minutes to prepare.
    """

    op: str
    title: str
    make: Callable[[str], Work]
    dtype: str = "fp32"
    size: str = "full"
    targets: dict[str, tuple[Target, ...]] = field(default_factory=dict)
    sweep: tuple[str, str, int] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    slow: bool = False

    def rank(self, device: str) -> int:
        """How early it comes where time is short: the lines with a target, the other ones, what only makes a plot."""
        return 3 if self.slow else 0 if self.targets.get(device) else 2 if self.sweep else 1

    def __str__(self) -> str:  # of letters, digits and dashes, for pytest's -k
        return "-".join("".join(c if c.isalnum() else " " for c in f"{self.op} {self.title}").lower().split())


def verify(
    case: Case, work: Work, contender: Contender, result: Tensors, references: dict[Any, Any], inputs: Sequence[Any]
) -> tuple[float, float]:
    """Compare a result with float64, by the rule of the tests: at most twice the error of plain PyTorch, plus 1e-6.

    Of a lone number, whose error may be nearly zero by luck, the rounding of the dtype is allowed too.

    Returns:
        The largest error of a result, and plain PyTorch's error of the same one.

    Raises:
        WrongResult: which result is how far off.
    """
    makers = (contender.exact or work.exact, contender.plain or work.plain)
    for make in makers:
        if make not in references:
            references[make] = make(*inputs)
    exact, plain = (references[make] for make in makers)
    names = work.names if len(work.names) == len(exact) else [f"result {i}" for i in range(len(exact))]
    worst = (0.0, 0.0)
    if not len(result) == len(plain) == len(exact) == len(names):
        raise WrongResult(f"{contender.name}: {len(result)} results, expected {len(exact)}")
    for name, ours, theirs, true in zip(names, result, plain, exact, strict=True):
        lone = ours.numel() == true.numel() == 1
        try:
            if not (lone and testing.error(ours, true) <= torch.finfo(DTYPES[case.dtype]).eps):
                testing.assert_accurate(name, ours, theirs, true)
        except AssertionError as e:
            raise WrongResult(f"{contender.name}: {str(e).splitlines()[0]}") from None
        worst = max(worst, (testing.error(ours, true), testing.error(theirs, true)))
    return worst


def with_gradients(forward: Callable[..., Any], wanted: Sequence[int]) -> Callable[..., Tensors]:
    """Forward and backward of a function.

    Args:
        forward: takes the inputs but for the last, which is the gradient of its first result, None for a loss.
        wanted: the positions of the inputs to differentiate by.

    Returns:
        A function of all inputs, of which those are leaves; it gives the first result and the gradients.
    """

    def run(*inputs):
        *values, grad = inputs
        leaves = [x.detach().requires_grad_() if i in wanted else x for i, x in enumerate(values)]
        first = forward(*leaves)
        first = first[0] if isinstance(first, tuple) else first
        return first.detach(), *torch.autograd.grad(first, [leaves[i] for i in wanted], grad)

    return run


def without_gradients(forward: Callable[..., Any]) -> Callable[..., Tensors]:
    """Forward alone, under `no_grad`; gives the first result."""

    def run(*inputs):
        with torch.no_grad():
            first = forward(*inputs)
        return (first[0] if isinstance(first, tuple) else first,)

    return run


def in_double(function: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """The same function on float64 copies of its floating-point inputs."""

    def exact(*inputs):
        return function(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs))

    return exact


def ours(op: str, device: str, dtype: torch.dtype, make: Callable[[str], Contender]) -> list[Contender]:
    """A contender for what "auto" takes, called "fastlm", then one for each other implementation that is there.

    Of Triton's interpreter, which serves a CPU for tests alone, a time would say nothing.
    """
    first = make("auto")
    chosen = ops.which(op, torch.empty(0, dtype=dtype, device=device))
    first.note = ", ".join(filter(None, [f"impl {chosen}", first.note]))
    first.name = "fastlm"
    others = []
    passed_over = {"auto", "reference", chosen} | ({"triton"} if device == "cpu" else set())
    for impl in testing.impls(op, device):
        if impl not in passed_over and dtype in _lib.ops[op].dtypes:
            contender = make(impl)
            contender.name = f"fastlm {impl}"
            others.append(contender)
    return [first, *others]


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of a function, for shapes that stay as they are."""
    return torch.compile(run, dynamic=False)


def optional(module: str, name: str, device: str, *, only_on: str | None = None) -> Any:
    """A name of a package that may be missing.

    Raises:
        NotInstalled: it is missing, or does not run on this device.
    """
    if only_on is not None and device != only_on:
        raise NotInstalled(f"runs on {only_on} alone")
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise NotInstalled(f"{package} is not installed")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError, OSError) as e:
        raise NotInstalled(f"{package} does not import: {str(e).splitlines()[0]}") from e
