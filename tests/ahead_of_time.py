"""Compiles every Triton kernel for GPUs that are not here, and prints what each takes: one JSON object a line.

    python tests/ahead_of_time.py cuda:90 forget_mult qrnn_pool      # cuda:80, cuda:90 or hip:gfx942; all operators

The launchers are the real ones, on tensors of the CPU; each launch ends in a compilation for the target, with the
argument types, the specialisations and the options that a GPU would get. In a process of its own: Triton takes one
driver, and no interpreter.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastlm.triton import (
    cache_attention,
    cache_distribution,
    dropconnect,
    embedding_dropout,
    forget_mult,
    linear_cross_entropy,
    locked_dropout,
    lstm,
    qrnn_pool,
)

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "hip:gfx942": 64 * 1024}  # bytes that a program can have
LENGTHS = (70, 64, 1)  # all that Triton could specialise on; after the first nothing may compile
SEED = torch.zeros((), dtype=torch.int64)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoDriver:
    """What a compilation asks of a driver."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def resources(kernel) -> dict[str, int]:
    """Registers a thread, bytes spilled and bytes of shared memory, from the binary."""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True).stdout
        found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        spilled = found["STACK"] + found["LOCAL"]
        return {"registers": found["REG"], "spilled": spilled, "shared": kernel.metadata.shared}
    text = kernel.asm["amdgcn"]
    found = {
        name: int(number)
        for name, number in re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)
    }
    spilled = found["vgpr_spill_count"] + found["private_segment_fixed_size"]
    return {"registers": found["vgpr_count"], "spilled": spilled, "shared": kernel.metadata.shared}


def record(rows: list[dict]) -> None:
    """Put a compilation in the place of every launch, noting each kernel that comes out for the first time."""
    run, seen = JITFunction.run, set()

    def compiled(self, *args, grid, warmup, **options):
        assert "enable_fp_fusion" in options, f"{self.__name__}: enable_fp_fusion is not said"
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        seconds = round(time.perf_counter() - start, 2)
        if kernel not in seen:
            rows.append({"kernel": self.__name__, **resources(kernel), "seconds": seconds})
        seen.add(kernel)
        return kernel

    JITFunction.run = compiled


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def call_forget_mult(dtype: torch.dtype, T: int) -> None:
    x, state = floats(T, 20, 1150, dtype=dtype), floats(20, 1150)
    forget_mult.forget_mult_fwd(x, x, None, False)
    forget_mult.forget_mult_bwd(x, x, x, state, x, True)
    x = floats(T, 128, 2560, dtype=dtype)
    forget_mult.forget_mult_fwd(x, x, None, False)
    forget_mult.forget_mult_bwd(x, x, x, None, x, False)


def call_lstm(dtype: torch.dtype, T: int) -> None:
    for B, H in ((20, 1150), (3, 37)):
        projected, w_hh, state = floats(T, B, 4 * H, dtype=dtype), floats(4 * H, H, dtype=dtype), floats(B, H)
        for keep, h0 in ((True, state), (False, state.to(dtype))):
            y, *_, cells = lstm.lstm_fwd(projected, w_hh, h0, state, None, 0.0, False, keep, False)
        cells = floats(T, B, H)
        lstm.lstm_bwd(y, None, None, projected, cells, state, w_hh, None, 0.0, True, False)
        lstm.lstm_bwd(None, state, None, projected, cells, state, w_hh, None, 0.0, False, False)


def call_qrnn_pool(dtype: torch.dtype, T: int) -> None:
    for B, H, pooling, zoneout in [
        (20, 1150, "fo", 0.1),
        (60, 2500, "fo", 0.0),
        (1, 1550, "ifo", 0.0),
        (1, 399, "f", 0.1),
    ]:
        gates, h = floats(T, B, qrnn_pool.GATES[pooling] * H, dtype=dtype), floats(T, B, H, dtype=dtype)
        seed, kept = SEED if zoneout else None, floats(-(-T // 8), B, H)
        for reverse in (False, True):
            qrnn_pool.qrnn_pool_fwd(gates, kept[0], seed, pooling, zoneout, reverse, True)
            qrnn_pool.qrnn_pool_bwd(h, kept[0], gates, kept, seed, pooling, zoneout, reverse)
    qrnn_pool.qrnn_pool_fwd(gates, None, None, "f", 0.1, False, False)  # in evaluation


def call_dropconnect(dtype: torch.dtype, T: int) -> None:
    for shape in [(4600, 1150), (301, 7)]:
        dropconnect.dropconnect_fwd(floats(*shape, dtype=dtype), 0.5, SEED)
    for stream in range(4):
        dropconnect.dropconnect_mask(SEED, 33278, 0.1, stream)


def call_locked_dropout(dtype: torch.dtype, T: int) -> None:
    for B, H in [(20, 1150), (60, 2500), (3, 399)]:
        for offset in (0, B * H):
            locked_dropout.locked_dropout_fwd(floats(T, B, H, dtype=dtype), 0.4, SEED, offset)


def call_embedding_dropout(dtype: torch.dtype, T: int) -> None:
    for V, E in [(10000, 400), (267735, 1150), (33278, 301)]:
        ids = torch.zeros(T, 20, dtype=torch.int64)
        embedding_dropout.embedding_dropout_fwd(floats(V, E, dtype=dtype), ids, 0.1, SEED)
        embedding_dropout.embedding_dropout_bwd(floats(T, 20, E, dtype=dtype), ids, 10, 0.1, SEED, -1)


def call_cache_attention(dtype: torch.dtype, T: int) -> None:
    for D, theta, window in ((400, [0.5], [3785]), (1150, [0.5] * 8, [500 * j for j in range(1, 9)])):
        ids = torch.zeros(T, dtype=torch.long)
        hidden, past = floats(T, D, dtype=dtype), floats(T + 9, D, dtype=dtype)
        cache_attention.cache_attention(hidden, ids, None, None, None, theta, window)
        cache_attention.cache_attention(hidden, ids, past, torch.zeros(T + 9, dtype=torch.long), ids, theta, window)


def call_cache_distribution(dtype: torch.dtype, T: int) -> None:
    B, W = min(T, 2), 3785
    for D, V, kind in ((400, 33278, torch.int64), (1150, 267735, torch.int32)):
        ids, count = torch.zeros(B, W, dtype=kind), torch.zeros(B, dtype=kind)
        query, keys = floats(B, D, dtype=dtype), floats(B, W, D, dtype=dtype)
        cache_distribution.cache_distribution(query, keys, ids, count, V, 0.5)


def call_linear_cross_entropy(dtype: torch.dtype, T: int) -> None:
    labels, scale = torch.zeros(T + 1, dtype=torch.int64)[T % 2 :][:T], floats(1).expand(T)
    shapes = ((10_000, 400, 0.0), (33_278, 1150, 0.1), (267_735, 400, 0.0), (205, 400, 0.1), (50, 200, 0.0))
    for V, D, smoothing in shapes:
        bias = floats(V, dtype=dtype)
        logits = floats(T, -(-V // 16) * 16, dtype=dtype)[:, :V]
        linear_cross_entropy.linear_cross_entropy_gradient_(logits, bias, labels, scale, -100, smoothing)
        x, weight = floats(T, D, dtype=dtype), floats(V, D, dtype=dtype)
        linear_cross_entropy.linear_cross_entropy_loss(x, weight, bias, labels, -100, smoothing)


class Calls(NamedTuple):
    """The launches of an operator for a dtype and T, and what a kernel may take: registers, bytes of shared memory."""

    run: Callable[[torch.dtype, int], None]
    registers: int
    shared: int = 0


CALLS = {
    "cache_attention": Calls(call_cache_attention, registers=255, shared=100 * 1024),
    "cache_distribution": Calls(call_cache_distribution, registers=160, shared=2048),
    "dropconnect": Calls(call_dropconnect, registers=40, shared=1024),
    "embedding_dropout": Calls(call_embedding_dropout, registers=32),
    "forget_mult": Calls(call_forget_mult, registers=168),
    "linear_cross_entropy": Calls(call_linear_cross_entropy, registers=192, shared=200 * 1024),
    "lstm": Calls(call_lstm, registers=40),
    "locked_dropout": Calls(call_locked_dropout, registers=96, shared=2048),
    "qrnn_pool": Calls(call_qrnn_pool, registers=200, shared=2048),
}


def main(target: str, *names: str) -> None:
    driver.set_active(NoDriver(TARGETS[target]))
    rows: list[dict] = []
    record(rows)
    for name in names or CALLS:
        run, registers, shared = CALLS[name]
        for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if target == "cuda:90" else 2]:
            for T in LENGTHS:
                rows.clear()
                run(dtype, T)
                for row in rows:
                    about = {"op": name, "dtype": str(dtype).removeprefix("torch."), "T": T}
                    allowed = {"allowed registers": registers, "allowed shared": min(shared, SHARED[target])}
                    print(json.dumps({**about, **row, **allowed}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
