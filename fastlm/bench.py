"""`fastlm bench`: runs the benchmarks of the source tree, which are no part of an installed package."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastlm.errors import FastlmError

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def bench(args: Namespace) -> tuple[int, dict[str, Any]]:
    """Measures every operator, a training step and the encoder, each beside its competitors.

    Raises:
        FastlmError: the source tree is not here.
    """
    if not (FOLDER / "suite.py").exists():
        raise FastlmError("the benchmarks are in the source tree of fastlm: run `make bench` there")
    sys.path.insert(0, str(FOLDER))
    try:
        import suite
    finally:
        sys.path.remove(str(FOLDER))  # its conftest.py is not for whoever comes next

    return suite.run(args)
