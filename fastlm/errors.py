"""The errors a user can cause and mend; the command line prints them in one line and exits with status 2."""

import os
import sys
from collections.abc import Callable


class FastlmError(Exception):
    """A problem with what the user gave: a file, a recipe, a checkpoint, a command line."""


class DataError(FastlmError):
    """A corpus that cannot be read or is too small."""


class RecipeError(FastlmError):
    """A recipe with an unknown key or a value out of range."""


class CheckpointError(FastlmError):
    """A checkpoint that is missing, damaged or belongs to another model."""


def run_for_reader(command: Callable[[], int]) -> int:
    """Calls a command that prints; its exit status, or 141 when the reader of what it prints has gone."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # here, where a reader that has gone can still be dealt with
    except BrokenPipeError:
        # What is left in the buffers goes nowhere, or Python would complain about it on its way out.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        return 141
