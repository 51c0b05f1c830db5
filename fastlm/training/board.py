"""TensorBoard's files of a run: the figures of metrics.jsonl, in RUN/tensorboard, where tensorboard is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastlm.training.parallel import Ranks
from fastlm.training.progress import say

TAGS = {  # by the event of a line of metrics.jsonl, then by its key
    "train": {
        "loss": "train/loss",
        "ppl": "train/ppl",
        "bpc": "train/bpc",
        "lr": "lr",
        "tokens_per_second": "tokens_per_second",
    },
    "epoch": {
        **{"ppl": "epoch/train_ppl", "bpc": "epoch/train_bpc"},
        **{"valid_nll": "valid/loss", "valid_ppl": "valid/ppl", "valid_bpc": "valid/bpc"},
    },
}


class Board:
    """Writes scalars for TensorBoard; without the package, and on all ranks but the first, it does nothing.

    Args:
        folder: for its files. step: steps made so far; what older files there have of later ones is not shown any more.
        ranks: the processes that train together.
    """

    def __init__(self, folder: Path, step: int, ranks: Ranks):
        self._writer = None
        if ranks.first and importlib.util.find_spec("tensorboard") is not None:
            with self._no_reason_not_to_train():
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Adds the figures of a line of metrics.jsonl."""
        if self._writer is not None:
            with self._no_reason_not_to_train():
                for key, tag in TAGS[record["event"]].items():
                    self._writer.add_scalar(tag, record[key], record["step"])

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            with self._no_reason_not_to_train():
                self._writer.close()

    @contextmanager
    def _no_reason_not_to_train(self) -> Iterator[None]:
        # A broken installation may raise anything, a folder that cannot be written does so from the writer's thread.
        try:
            yield
        except Exception as e:
            first_line = str(e).partition("\n")[0]
            say(f"nothing is written for TensorBoard: {type(e).__name__}: {first_line}")
            self._writer = None
