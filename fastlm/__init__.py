"""Recurrent language models at the speed of the hardware.

Submodules are imported when they are first used, so that `import fastlm` costs nothing and works even where
PyTorch does not: `python -m fastlm.info` then says what is wrong.
"""

import importlib

from fastlm.errors import CheckpointError, DataError, FastlmError, RecipeError

__version__ = "0.1.0"

_SUBMODULES = ("data", "models", "nn", "ops", "optim", "training")
__all__ = ["CheckpointError", "DataError", "FastlmError", "RecipeError", "__version__", *_SUBMODULES]


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"fastlm.{name}")
    raise AttributeError(f"module 'fastlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
