"""Data-parallel training: the ranks that `torchrun` starts train one model, each on its own columns of the batch.

All ranks start from the same weights and draw the same window lengths and masks, those of the whole batch. Before
clipping, gradients are averaged over the ranks; as every rank has equally many tokens, the average is the gradient of
the whole batch: the ranks make the steps that one process would make with all columns, to rounding. From there on all
ranks compute the same numbers, so their weights stay equal bit for bit. Decisions are made together: a signal to any
rank stops all of them after the same step, and time is what the clock of rank 0 says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastlm.errors import FastlmError, RecipeError

# The other ranks wait while rank 0 scores a text; that one has died is noticed without the timeout.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """This process among the `size` that train together; the default is one process alone.

    Every method but `columns` is called by all ranks at the same point.

    Raises:
        FastlmError: from all methods, when another rank has gone.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that validates, writes and prints."""
        return self.rank == 0

    def columns(self, batch_size: int) -> slice:
        """The columns of the batch that are this rank's.

        Raises:
            RecipeError: they cannot be shared out evenly.
        """
        if batch_size % self.size:
            raise RecipeError(f"batch_size must be a multiple of the {self.size} ranks, got {batch_size}")
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Puts the mean over the ranks into each tensor, by one all-reduce per dtype."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            some = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.flatten() for t in some])
            with self._together():
                dist.all_reduce(flat)
            parts = flat.div_(self.size).split([t.numel() for t in some])
            torch._foreach_copy_(some, [part.view(t.shape) for t, part in zip(some, parts, strict=True)])

    def agree(self, stop: bool, seconds: float) -> tuple[bool, float]:
        """Whether any rank wants to stop, and the seconds of rank 0; needs no word from the device."""
        if self.size == 1:
            return stop, seconds
        values = torch.tensor([stop, seconds if self.first else 0.0], dtype=torch.float64)
        with self._together():
            dist.all_reduce(values)
        stops, seconds = values.tolist()
        return stops > 0, seconds

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, tensors on the CPU, in the order of the ranks; returns once all have come here."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self._together():
            dist.all_gather_object(values, value)
        return values

    def check_same(self, **values: Any) -> None:
        """Raises RecipeError, naming what differs, unless every rank gave the same values."""
        for name, value in values.items():
            for rank, other in enumerate(self.gather(value)):
                if other != value:
                    raise RecipeError(f"rank {self.rank} and rank {rank} were not given the same {name}")

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as e:
            raise FastlmError(f"rank {self.rank} lost the other ranks: {str(e).splitlines()[0]}") from e


def check_alone(command: str) -> None:
    """Raises FastlmError when `torchrun` has started more than this process: all of them would write the same files."""
    if _world_size() > 1:
        raise FastlmError(f"{command} runs in one process: start it without torchrun")


def restarted() -> bool:
    """Whether `torchrun --max-restarts` has started this process in the place of one that ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


@contextmanager
def join(device: str) -> Iterator[tuple[Ranks, str]]:
    """Joins the processes that `torchrun` started, through gloo and for CUDA also NCCL; a process alone stays alone.

    Every rank needs the folder of the run, to read from it. Inside the block only rank 0 prints. Ranks on several
    machines, which count restarts each by itself, find each other again after one only with
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of `torchrun`.

    Args:
        device: "cpu" or a CUDA device; under `torchrun` each process of a machine takes its own GPU.

    Yields:
        The ranks, and the device of this one.

    Raises:
        FastlmError: the others cannot be reached, or the machine has fewer GPUs than processes.
    """
    if _world_size() == 1:
        yield Ranks(), device
        return
    backend = "gloo"
    if torch.device(device).type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise FastlmError(f"process {local} of this machine has no GPU of its own: there are {there}")
        torch.cuda.set_device(local)
        # What the host has to know goes over gloo, so that it never waits for the device.
        backend, device = "cpu:gloo,cuda:nccl", f"cuda:{local}"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
            # torchrun keeps its store when it starts all anew, with the addresses of ranks that have gone in it.
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (ValueError, RuntimeError) as e:
        raise FastlmError(f"cannot join the other ranks: {str(e).splitlines()[0]}") from e
    try:
        with ExitStack() as stack:
            if dist.get_rank():
                void = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(void))
                stack.enter_context(redirect_stderr(void))
            yield Ranks(dist.get_rank(), dist.get_world_size()), device
    finally:
        # Destroying the group joins gloo's threads with the GIL held: they need it first, to drop their last tensors.
        time.sleep(0.1)
        dist.destroy_process_group()


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))
