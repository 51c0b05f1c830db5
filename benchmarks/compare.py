"""Whether a run is slower than an older one on the same machine, beyond the noise of both.

A contender of ours is slower when the time that only a fifth of its calls beat is longer than the one that four fifths
of the old calls beat, and the medians differ by more than 5 %. Both are taken after the drift of the machine, which is
what the competitors, whose code has not changed, say of it.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from fastlm.errors import FastlmError

LEAST = 1.05  # two runs of one program differ by less, as a rule
SAME = ("machine", "device", "threads", "torch", "instruction_set")


def read_old(path: str | Path) -> dict[str, Any]:
    """The results of an older run.

    Raises:
        FastlmError: the file is not one of results.
    """
    try:
        found = json.loads(Path(path).read_text())
        if found["schema"] == 1 and isinstance(found["cases"], list):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise FastlmError(f"{path} is not a file of benchmark results of this version")


def check_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise FastlmError unless both ran on the same machine in the same way."""
    for key in SAME:
        if old.get(key) != new[key]:
            raise FastlmError(f"--compare: that run is of another {key}: {old.get(key)} there, {new[key]} here")


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What became slower and faster.

    Returns:
        `drift`: how much longer the competitors take than they did; `slower`, `faster`: lines that name the case and
        the contender; `compared`: how many contenders of ours both runs have.
    """
    pairs = list(_pairs(old, new))
    rivals = [after["ms"] / before["ms"] for name, before, after in pairs if not _ours(name)]
    drift = statistics.median(rivals) if len(rivals) >= 3 else 1.0
    slower, faster, compared = [], [], 0
    for name, before, after in pairs:
        if not _ours(name):
            continue
        compared += 1
        now = {key: after[key] / drift for key in ("ms", "p20", "p80")}
        line = f"{name}: {before['ms']:.4g} -> {after['ms']:.4g} ms"
        if now["p20"] > before["p80"] and now["ms"] > LEAST * before["ms"]:
            slower.append(line)
        elif now["p80"] < before["p20"] and LEAST * now["ms"] < before["ms"]:
            faster.append(line)
    if not compared:
        raise FastlmError("--compare: that run has none of these lines")
    return {"drift": drift, "compared": compared, "slower": slower, "faster": faster}


def lines(verdict: dict[str, Any]) -> list[str]:
    """The verdict for people."""
    found = [f"slower: {line}" for line in verdict["slower"]] + [f"faster: {line}" for line in verdict["faster"]]
    return [
        f"compared {verdict['compared']} lines; competitors take {verdict['drift']:.3f} of their old time, which is "
        "taken out",
        *(found or ["nothing is slower or faster beyond the noise"]),
    ]


def _ours(name: str) -> bool:
    return name.rpartition(" | ")[2].startswith("fastlm")


def _pairs(old, new):
    """Name, old and new figures of every contender that both have."""
    before = {(c["op"], c["title"], x["name"]): x for c in old["cases"] for x in c["contenders"]}
    for case in new["cases"]:
        for contender in case["contenders"]:
            key = case["op"], case["title"], contender["name"]
            if key in before:
                yield f"{key[0]}: {key[1]} | {key[2]}", before[key], contender
