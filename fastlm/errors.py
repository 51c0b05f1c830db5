"""The errors a user can cause and mend; the command line prints them in one line and exits with status 2."""


class FastlmError(Exception):
    """A problem with what the user gave: a file, a recipe, a checkpoint, a command line."""


class DataError(FastlmError):
    """A corpus that cannot be read or is too small."""


class RecipeError(FastlmError):
    """A recipe with an unknown key or a value out of range."""


class CheckpointError(FastlmError):
    """A checkpoint that is missing, damaged or belongs to another model."""
