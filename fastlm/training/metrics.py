"""Figures of a training run: sums over an interval, and the file metrics.jsonl they are written to."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.training.evaluate import bits, perplexity


class Sums:
    """Loss, tokens and seconds of a stretch of training; the loss stays on the device until it is asked for.

    Args:
        device: where losses are summed, in float64. loss: summed nll in nats. tokens, seconds: so far.
    """

    def __init__(self, device: torch.device, loss: float = 0.0, tokens: int = 0, seconds: float = 0.0):
        self.loss = torch.full((), loss, dtype=torch.float64, device=device)
        self.tokens, self.seconds = tokens, seconds

    def add(self, nll: Tensor, tokens: int, seconds: float) -> None:
        """Adds a step with mean loss `nll` (0-d) over `tokens` tokens."""
        self.loss += nll.double() * tokens
        self.tokens += tokens
        self.seconds += seconds

    def values(self) -> list[float]:
        """What the constructor takes after the device."""
        return [self.loss.item(), self.tokens, self.seconds]

    def figures(self) -> dict[str, float]:
        """Mean loss (nats), perplexity, bits per token, tokens per second."""
        loss = self.loss.item() / max(self.tokens, 1)
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return {"loss": loss, "ppl": perplexity(loss), "bpc": bits(loss), "tokens_per_second": rate}


class MetricsFile:
    """metrics.jsonl: one JSON object per line, in the order of the steps; null stands for inf and nan."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line."""
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(finite(record), allow_nan=False) + "\n")
        except OSError as e:
            e.filename = e.filename or str(self.path)  # that the disk is full comes without a name
            raise

    def size(self) -> int:
        """Its length in bytes, 0 when it is not there yet."""
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, size: int) -> None:
        """Drops what was written after it had `size` bytes."""
        if self.size() > size:
            os.truncate(self.path, size)


def finite(value: Any) -> Any:
    """`value` with None in the place of inf and nan, which JSON does not know; looks into containers."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut short is left out, a missing file has none."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
