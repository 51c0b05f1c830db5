"""The figures of a run for people: one table, as plain text, in Markdown, and in the README.

`python benchmarks/report.py RESULTS.json` prints the Markdown; with --readme it goes into the README of the tree.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from results import ceiling, judge

HEAD = ["work", "fastlm ms", "competitor", "its ms", "ratio", "target", "met", "ceiling", "MB", "its MB"]
START, END = "<!-- benchmarks: start -->", "<!-- benchmarks: end -->"
README = Path(__file__).resolve().parents[1] / "README.md"


def rows(case: dict[str, Any], ceilings: dict[str, float]) -> list[list[str]]:
    """A row for each competitor of a case; ours and what holds for it alone stand in the first."""
    ours, *others = case["contenders"]
    top = ceiling(case, ceilings)
    share = top and top["share"]
    shown = f"{share:.0%} of {top['limit']}, {top['rate']:.3g} {top['unit']}" if top else "-"
    first = [f"{case['op']}: {case['title']}", spread(ours)]
    alone = [t for t in case["targets"] if not t["against"] or all(t["against"] != c["name"] for c in others)]
    found = []
    for number, rival in enumerate(others or [None]):
        mine = [t for t in case["targets"] if rival and t["against"] == rival["name"]] + (alone if not number else [])
        judged = [judge(case, target, share) for target in mine]
        answers = [answer for _, answer in judged]
        met = "-" if not judged else "?" if None in answers else "yes" if all(answers) else "NO"
        rest = ["-", "-", "-"] if rival is None else [label(rival), spread(rival), f"{rival['ms'] / ours['ms']:.2f}x"]
        rest += ["; ".join(text for text, _ in judged) or "-", met, "-" if number else shown]
        rest += ["" if number else megabytes(ours), megabytes(rival) if rival else "-"]
        found.append([*(first if not number else ["", ""]), *rest])
    return found


def label(contender: dict[str, Any]) -> str:
    return contender["name"] + (" *" if contender["share_of_work"] < 1 else "")


def spread(contender: dict[str, Any]) -> str:
    """Median, and the 20th and 80th percentile."""
    digits = max(0, 2 - len(str(int(contender["ms"]))) + 1)
    middle, low, high = (f"{contender[key]:,.{digits}f}" for key in ("ms", "p20", "p80"))
    return f"{middle} ({low}-{high})"


def megabytes(contender: dict[str, Any]) -> str:
    extra = contender["extra_bytes"]
    # of a part of the work it would be the memory of that part
    return "-" if extra is None or contender["share_of_work"] < 1 else f"{extra / 1e6:,.1f}"


def table(found: dict[str, Any], *, targets_only: bool = False) -> list[list[str]]:
    """The rows of all cases, without the sweeps, which are for the plots."""
    cases = [c for c in found["cases"] if not c["sweep"] and (c["targets"] or not targets_only)]
    return [row for case in cases for row in rows(case, found["ceilings"])]


def as_text(found: dict[str, Any]) -> str:
    """The table in aligned columns, what it was measured on, and what was not timed."""
    lines = [HEAD, *table(found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    left = {0, 2, 5, 7}
    text = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([*(line.rstrip() for line in text), "", *facts(found)])


def as_markdown(found: dict[str, Any], *, targets_only: bool = False) -> str:
    """The table in Markdown, with the same facts under it; of the lines with a target alone, the first facts."""
    lines = [HEAD, ["---"] * len(HEAD), *table(found, targets_only=targets_only)]
    body = [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
    first, second, *others = facts(found)
    return "\n".join([*body, "", first, "", second, *(() if targets_only else ["", *(f"- {fact}" for fact in others)])])


def facts(found: dict[str, Any]) -> list[str]:
    """What a reader must know to trust the table: where, the ceilings, then notes, what was not timed and why."""
    tops = found["ceilings"]
    where = found["gpu"] or f"{found['processor']}, {found['cores']} cores, {found['threads']} threads"
    lines = [
        f"Measured on {where}, PyTorch {found['torch']}, instruction set {found['instruction_set']}, fastlm "
        f"{found['fastlm']} at {found['commit'] or 'no known commit'}, {found['date'][:10]}; a {found['size']} run. "
        "Times are medians, in brackets the 20th and 80th percentile; MB is the peak of memory beyond inputs and "
        "outputs; * was measured on a part of the work and scaled.",
        f"Ceilings of the same run: copy {tops['copy']:.1f} GB/s, GEMM {tops['fp32']:,.0f} GFLOP/s in fp32 and "
        f"{tops['bf16']:,.0f} in bf16. The share of a ceiling is that of the least bytes or products the work needs.",
    ]
    notes, missing = set(), set()
    for case in found["cases"]:
        title = f"{case['op']}: {case['title']}"
        notes |= {f"{c['name']} ({title}): {c['note']}." for c in case["contenders"] if c["note"]}
        missing |= {f"Not timed: {name} ({case['op']}): {why}." for name, why in case["left_out"].items()}
    notes = {note for note in notes if not note.startswith("fastlm")}
    failed = [f"FAILED: {name}: {why}" for name, why in found["failures"].items()]
    late = [f"Not measured, for want of time: {name}." for name in found.get("not_measured", ())]
    return [*lines, *on_gpu(found), *sorted(notes), *sorted(missing), *failed, *late, *profiles(found)]


def on_gpu(found: dict[str, Any]) -> list[str]:
    """How times on a GPU are to be read, what "auto" took, a recurrence's pace, and where the host sets the pace."""
    if found["device"] != "cuda":
        return []
    taken: dict[str, list[str]] = {}
    slow = []
    for case in found["cases"]:
        ours, title = case["contenders"][0], f"{case['op']}: {case['title']}"
        impl = ours["note"].removeprefix("impl ").partition(",")[0]
        if ours["note"].startswith("impl ") and impl not in taken.setdefault(case["op"], []):
            taken[case["op"]].append(impl)
        slow += [
            f"The host takes longer than the GPU: {title}: {x['name']} {x['host_ms']:.3g} ms."
            for x in case["contenders"]
            if not case["sweep"] and x["name"].startswith("fastlm") and x["host_ms"] > x["ms"]
        ]
    return [
        "A time is that of the GPU with the work queued ahead, but for whole training steps, which include the host; "
        "products in fp32 are without TF32 unless a name says so.",
        *(f"auto took for {op}: {' and '.join(impls)}." for op, impls in taken.items()),
        *paces(found),
        *slow,
    ]


def paces(found: dict[str, Any]) -> list[str]:
    """Microseconds of a step, all of a case's products and layers included, of each contender of a recurrence."""
    lines = []
    for case in found["cases"]:
        if steps := case.get("steps"):
            each = (f"{x['name']} {1e3 * x['ms'] / steps:.2f}" for x in case["contenders"])
            lines.append(f"{case['op']}: {case['title']}, us a step: {', '.join(each)}.")
    return lines


def profiles(found: dict[str, Any]) -> list[str]:
    """Where the time of a step goes."""
    lines = []
    for case in found["cases"]:
        for profile in case.get("profile", ()):
            parts = (f"{row['what']} {row['share']:.0%}" for row in profile["operators"] if row["share"] > 0.01)
            lines.append(f"Where the time goes, {profile['name']} ({case['title']}): {', '.join(parts)}.")
    return lines


def fill_readme(found: dict[str, Any], path: Path = README) -> None:
    """Put the lines with a target between the two marks in the README, and the plot under them."""
    text = path.read_text()
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{path} must hold {START} and {END} once")
    picture = f"![ratios to each competitor](benchmarks/results/{found['machine']}-ratios.png)"
    body = "\n\n".join([START, as_markdown(found, targets_only=True), picture, END])
    path.write_text(text[: text.index(START)] + body + text[text.index(END) + len(END) :])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", action="store_true", help="write the lines with a target into the README")
    options = parser.parse_args(arguments)
    found = json.loads(options.results.read_text())
    if options.readme:
        fill_readme(found)
    else:
        print(as_markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
