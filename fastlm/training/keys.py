"""Keys of a TOML table as fields of a dataclass: each has a type and limits, and a value that breaks them is an error.

The types are an integer, a number, a truth value, a string and a list of integers, as the annotation of the field says.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import field, fields
from typing import Any

from fastlm.errors import RecipeError

_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "tuple[int, ...]": tuple}
_TYPE_NAMES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a string"}


def key(default: Any, **limits: Any) -> Any:
    """A key; `limits` are `least`, `above`, `below`, `most` and `choices`."""
    return field(default=default, metadata=limits)


def probability(default: float) -> Any:
    """A key from 0 up to, but not including, 1."""
    return key(default, least=0, below=1)


def check_fields(instance: Any) -> None:
    """Checks every field of a dataclass of keys, for its `__post_init__`; an integer becomes a float, a list a tuple.

    Raises:
        RecipeError: a value of the wrong type or out of range.
    """
    for f in fields(instance):
        if f.type in _TYPES:
            object.__setattr__(instance, f.name, _check(f.name, f.type, f.metadata, getattr(instance, f.name)))


def check_known(names: Iterable[str], known: Iterable[str], what: str = "key") -> None:
    """Raises RecipeError, with the nearest valid name, unless all names are known."""
    known = list(known)
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; the nearest valid one is {nearest[0]!r}" if nearest else ""
            raise RecipeError(f"unknown {what} {name!r}{hint}")


def _check(name: str, type_name: str, limits: Mapping[str, Any], value: Any) -> Any:
    expected = _TYPES[type_name]
    if expected is tuple:
        if not isinstance(value, list | tuple) or any(type(v) is not int for v in value):
            raise RecipeError(f"{name} must be a list of integers, got {value!r}")
        for v in value:
            _check_limits(name, limits, v)
        return tuple(value)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise RecipeError(f"{name} must be {_TYPE_NAMES[type_name]}, got {value!r}")
    if expected is float and not math.isfinite(value):
        raise RecipeError(f"{name} must be finite, got {value!r}")
    _check_limits(name, limits, value)
    return value


def _check_limits(name: str, limits: Mapping[str, Any], value: Any) -> None:
    if "choices" in limits and value not in limits["choices"]:
        choices = ", ".join(repr(c) for c in limits["choices"])
        raise RecipeError(f"{name} must be one of {choices}, got {value!r}")
    for rule, holds, words in [
        ("least", lambda v, x: v >= x, "at least"),
        ("above", lambda v, x: v > x, "greater than"),
        ("most", lambda v, x: v <= x, "at most"),
        ("below", lambda v, x: v < x, "less than"),
    ]:
        if rule in limits and not holds(value, limits[rule]):
            raise RecipeError(f"{name} must be {words} {limits[rule]}, got {value!r}")
