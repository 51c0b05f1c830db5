"""The pictures of a run: ratios to each competitor, and time against size in the sweeps."""

from io import BytesIO
from typing import Any

COLOURS = ("#3b6fb6", "#d98032", "#5b9a5b", "#9467bd", "#8c6d5a", "#c45b88", "#5fb3b3")
AXES = {"H": "hidden size", "B": "batch", "T": "length"}


def draw(found: dict[str, Any]) -> dict[str, bytes]:
    """PNG files by the end of their name: "ratios", and "speed" where there are sweeps; none without matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return {}
    pictures = {}
    if any(len(c["contenders"]) > 1 for c in found["cases"] if not c["sweep"]):
        pictures["ratios"] = _ratios(found)
    if any(c["sweep"] for c in found["cases"]):
        pictures["speed"] = _speed(found)
    return pictures


def figure_of(*size: float):
    from matplotlib.figure import Figure

    return Figure(figsize=size, dpi=120, layout="constrained")


def png_of(figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _ratios(found: dict[str, Any]) -> bytes:
    """A bar for each competitor, in groups by case, orange where it is faster; a tick where the target is."""
    cases = [c for c in found["cases"] if not c["sweep"] and len(c["contenders"]) > 1]
    bars = sum(len(c["contenders"]) for c in cases)
    figure = figure_of(10, 1.2 + 0.24 * bars)
    axes = figure.add_subplot()
    y, ticks = 0.0, []
    for case in cases:
        ours, *others = case["contenders"]
        ticks.append((y + (len(others) - 1) / 2, f"{case['op']}\n{case['title']}"))
        for rival in others:
            ratio = rival["ms"] / ours["ms"]
            goals = [t["ratio"] for t in case["targets"] if t["against"] == rival["name"] and t["ratio"]]
            axes.barh(y, ratio - 1, left=1, height=0.85, color=COLOURS[ratio < 1])
            axes.annotate(
                f"{ratio:,.2f}x  {rival['name']}" if ratio < 1000 else f"{ratio:,.0f}x  {rival['name']}",
                (max(ratio, 1, *goals), y),  # beside bar and ticks
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
            for goal in goals:
                axes.plot([goal] * 2, [y - 0.43, y + 0.43], color="black", linewidth=1.6)
            y += 1
        y += 0.8
    _ratio_axis(axes, cases, ticks, found)
    return png_of(figure)


def _ratio_axis(axes, cases, ticks, found) -> None:
    ratios = [r["ms"] / c["contenders"][0]["ms"] for c in cases for r in c["contenders"][1:]]
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, *(0.8 * r for r in ratios)), max(ratios) * (max(ratios) / min(0.5, *ratios)) ** 0.45 * 1.5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks], fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("time of the competitor over that of fastlm; a black tick is the target")
    axes.set_title(f"fastlm {found['fastlm']} on {found['machine']}, PyTorch {found['torch']}", fontsize=10)


def _speed(found: dict[str, Any]) -> bytes:
    """A row of panels for each series, a panel for each axis, a line for each contender."""
    sweeps = [c for c in found["cases"] if c["sweep"]]
    series = list(dict.fromkeys(c["sweep"]["series"] for c in sweeps))
    figure = figure_of(11, 0.6 + 2.6 * len(series))
    grid = figure.subplots(len(series), len(AXES), squeeze=False)
    for line, name in zip(grid, series, strict=True):
        for axes, axis in zip(line, AXES, strict=True):
            cases = [c for c in sweeps if c["sweep"]["series"] == name and c["sweep"]["axis"] == axis]
            _panel(axes, name, axis, sorted(cases, key=lambda c: c["sweep"]["value"]))
    return png_of(figure)


def _panel(axes, series: str, axis: str, cases: list[dict[str, Any]]) -> None:
    for i, name in enumerate(dict.fromkeys(x["name"] for c in cases for x in c["contenders"])):
        points = [(c["sweep"]["value"], x) for c in cases for x in c["contenders"] if x["name"] == name]
        values = [value for value, _ in points]
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(values, [x["ms"] for _, x in points], "o-", label=name, color=colour, markersize=3.5)
        axes.fill_between(values, [x["p20"] for _, x in points], [x["p80"] for _, x in points], alpha=0.2, color=colour)
    axes.set(xlabel=AXES[axis], title=series, yscale="log")
    axes.title.set_fontsize(9)
    if cases and cases[-1]["sweep"]["value"] >= 8 * max(1, cases[0]["sweep"]["value"]):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("ms")
    axes.grid(alpha=0.3, which="both")
    if cases:
        axes.legend(fontsize=7)
