"""The figures of a run as plain data: what a runner measured, and what follows from it."""

import statistics
from typing import Any

from ceilings import floor_ms
from measure import Entry, Runner, statistic


def record(runner: Runner) -> dict[str, Any]:
    """A case and its contenders, for the JSON file."""
    case, work = runner.case, runner.work
    return {
        "op": case.op,
        "title": case.title,
        "dtype": case.dtype,
        "products": work.products or case.dtype,
        "flops": work.flops,
        "bytes": work.bytes,
        "steps": work.steps,
        "input_sets": len(runner.sets),
        "sweep": None if case.sweep is None else dict(zip(("series", "axis", "value"), case.sweep, strict=True)),
        "targets": [vars(target) for target in case.targets.get(runner.device, ())],
        "contenders": [contender(entry) for entry in runner.entries],
        "left_out": {**work.missing, **runner.left_out},
    }


def contender(entry: Entry) -> dict[str, Any]:
    """Milliseconds, bytes and errors of one contender."""
    median, p20, p80 = statistic(entry.ms)
    return {
        "name": entry.contender.name,
        "note": entry.contender.note,
        "ms": median,
        "p20": p20,
        "p80": p80,
        "host_ms": statistics.median(entry.host) if entry.host else None,
        "rounds": len(entry.ms),
        "threads": entry.contender.threads,
        "share_of_work": entry.contender.share,
        "extra_bytes": statistics.median_low(entry.extra) if entry.extra else None,
        "kept_bytes": entry.kept,
        "error": entry.error[0],
        "plain_error": entry.error[1],
    }


def ceiling(case: dict[str, Any], ceilings: dict[str, float]) -> dict[str, Any] | None:
    """How near our time is to the least that the ceilings allow.

    Returns:
        `share` of the ceiling that `limit` names, "copy" or "GEMM", and the `rate` with its `unit`; None for a case
        that counts neither products nor bytes.
    """
    ms = case["contenders"][0]["ms"]
    floor, limit = floor_ms(ceilings, case.get("products", case["dtype"]), case["flops"], case["bytes"])
    amount, unit = (case["bytes"], "GB/s") if limit == "copy" else (case["flops"], "GFLOP/s")
    return {"share": floor / ms, "limit": limit, "rate": amount / ms / 1e6, "unit": unit} if floor else None


def judge(case: dict[str, Any], target: dict[str, Any], share: float | None) -> tuple[str, bool | None]:
    """A target as text, and whether every part of it is met; None where it cannot be said."""
    ours = case["contenders"][0]
    rival = next((c for c in case["contenders"] if c["name"] == target["against"]), None)
    parts: list[tuple[str, bool | None]] = []
    if target["ratio"] is not None:
        parts.append((f">= {target['ratio']:g}x", rival and rival["ms"] >= target["ratio"] * ours["ms"]))
    if target["memory"] is not None:
        known = rival and ours["extra_bytes"] is not None and rival["extra_bytes"] is not None
        ok = known and ours["extra_bytes"] <= target["memory"] * rival["extra_bytes"]
        parts.append((f"<= {target['memory']:g} of its memory", ok if known else None))
    if target["ms"] is not None:
        parts.append((f"<= {target['ms']:,g} ms", ours["ms"] <= target["ms"]))
    if target["share"] is not None:
        parts.append((f">= {target['share']:.0%} of ceiling", None if share is None else share >= target["share"]))
    if target.get("mb") is not None:
        known = ours["extra_bytes"] is not None
        parts.append((f"<= {target['mb']:,g} MB", ours["extra_bytes"] <= 1e6 * target["mb"] if known else None))
    answers = [answer for _, answer in parts]
    return ", ".join(text for text, _ in parts), (None if None in answers else all(answers))
