"""What the JSON files of a run look like: checked when one is read, since a file can be cut short or edited."""

from __future__ import annotations

from typing import Any

Form = type | dict[str, Any] | list[Any]  # keys that end in "?" may be missing; every entry of a list has one form

FIGURE = float | None  # null stands for what is not finite
_SCORE = {"nll": FIGURE, "tokens": int, "ppl": FIGURE, "bpc": FIGURE}
_SCORES = {"plain": _SCORE, "cached": _SCORE}
_LOOKED = {"back": int, "word": str, "weight": float}
_WORD = {"word": str, "model": FIGURE, "cache": FIGURE, "mixed": FIGURE, "looked": [_LOOKED]}
FORMS: dict[str, Form] = {
    "results.json": {
        **{"parameters": int, "epochs": int, "steps": int, "seconds": float, "tokens_per_second": float},
        **{"valid": _SCORE, "test": _SCORE, "ceiling_flops?": float, "share_of_ceiling?": float},
        **{"wall_seconds?": float, "recipe?": {}, "starts?": [{"step": int, "ranks": int, "machine": str}]},
    },
    "cache.json": {
        **{"theta": float, "lambda": float, "window": int},
        **{"valid?": _SCORES, "test?": _SCORES, "passage?": [_WORD]},
    },
    "vocabulary.json": {"level": str, "words": [str], "counts": [int]},
}
EVENTS: dict[str, Form] = {  # the lines of metrics.jsonl, as far as the report reads them
    "train": {"step": int, "ppl": FIGURE, "bpc?": FIGURE},
    "epoch": {"step": int, "averaging": bool, "valid_nll": FIGURE, "valid_ppl": FIGURE, "valid_bpc": FIGURE},
}
EPOCH: Form = {**EVENTS["epoch"], "epoch": int, "lr": float, "ppl": FIGURE, "seconds": float, "wall_seconds": float}


def check_form(value: Any, form: Form, name: str) -> None:
    """Raises ValueError, naming the place, unless `value` has the form; it may have more keys."""
    if isinstance(form, dict):
        _check_type(value, dict, name)
        for key, part in form.items():
            optional, key = key.endswith("?"), key.removesuffix("?")
            if key in value:
                check_form(value[key], part, f"{name}.{key}")
            elif not optional:
                raise ValueError(f"{name} has no {key!r}")
    elif isinstance(form, list):
        _check_type(value, list, name)
        for i, entry in enumerate(value):
            check_form(entry, form[0], f"{name}[{i}]")
    elif form != FIGURE or value is not None:
        _check_type(value, float if form == FIGURE else form, name)


def check_event(value: Any, name: str) -> None:
    """Raises ValueError unless `value` is a line of metrics.jsonl."""
    check_form(value, {"event": str}, name)
    if value["event"] not in EVENTS:
        raise ValueError(f"{name}.event must be one of {', '.join(EVENTS)}, got {value['event']!r}")
    check_form(value, EVENTS[value["event"]], name)


def _check_type(value: Any, wanted: type, name: str) -> None:
    # A bool is an int to Python; an int is as good as a float.
    if type(value) is not wanted and not (wanted is float and type(value) is int):
        raise ValueError(f"{name} must be of type {wanted.__name__}, got {type(value).__name__}")
