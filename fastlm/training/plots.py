"""The pictures of training: the curves of a run, of a reproduction, and the bars of an ablation."""

from __future__ import annotations

from io import BytesIO
from textwrap import fill
from typing import Any

from fastlm.training.evaluate import UNITS
from fastlm.training.progress import duration

COLOURS = ("#3b6fb6", "#d98032", "#5b9a5b")
MISSING = "they need matplotlib (pip install matplotlib)"


def draw_curves(metrics: list[dict[str, Any]], unit: str = "ppl") -> bytes | None:
    """Training and validation over the steps as a PNG, in "ppl" or "bpc"; None without matplotlib."""
    figure = _figure(8, 4)
    if figure is None:
        return None
    axes = figure.add_subplot()
    for event, key, label, style in [("train", unit, "training", "-"), ("epoch", f"valid_{unit}", "validation", "o-")]:
        points = [(r["step"], r.get(key)) for r in metrics if r["event"] == event]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    averaged = [r["step"] for r in metrics if r.get("averaging")]
    if averaged:
        axes.axvline(averaged[0], color="grey", linestyle=":", label="first averaged validation")
    axes.set(xlabel="step", ylabel=UNITS[unit])
    if unit == "ppl":  # bits are a logarithm already
        axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return _png(figure)


def draw_reproduction(found: dict[str, Any]) -> bytes | None:
    """The validation of every epoch of a reproduction, beside what was published; None without matplotlib."""
    figure = _figure(8, 4.5)
    if figure is None:
        return None
    axes, unit, begin = figure.add_subplot(), found["unit"], 0
    for (stage, record), colour in zip(found["stages"].items(), COLOURS, strict=False):
        final, published = record["valid"][unit], (record["published"] or {}).get("valid")
        label = f"{stage}: {final:.4g}" + (f", published {published:g} (dotted)" if published else "")
        curve = record.get("curve")
        if curve:
            points = [(begin + i, epoch[f"valid_{unit}"]) for i, epoch in enumerate(curve, 1)]
            begin += len(curve)
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=3)
        else:
            axes.plot([begin], [final], "D", color=colour, label=label, markersize=6)
        if published:
            axes.axhline(published, color=colour, linestyle=":", linewidth=1.2)
    averaged = [i for i, epoch in enumerate(found["stages"]["base"]["curve"], 1) if epoch["averaging"]]
    if averaged:
        axes.axvline(averaged[0], color="grey", linestyle=":", label="first averaged validation")
    axes.set(xlabel="epoch", ylabel=f"validation {UNITS[unit]}", title=fill(_title(found), 100, break_on_hyphens=False))
    axes.title.set_fontsize(10)
    if unit == "ppl":
        from matplotlib.ticker import LogLocator

        axes.set_yscale("log", base=2)
        low, high = axes.get_ylim()
        # A range without a power of 2 has ticks too.
        axes.yaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.25, 1.5, 1.75) if high < 8 * low else (1, 1.5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return _png(figure)


def draw_ablation(found: dict[str, Any]) -> bytes | None:
    """How far each row of an ablation is from the full model, and was when published; None without matplotlib."""
    rows = found["rows"][1:]
    figure = _figure(11, 1.8 + 0.55 * max(len(rows), 2))
    if figure is None:
        return None
    full, unit, published = found["rows"][0], UNITS[found["unit"]], found["published_model"]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, split in zip(panels, ("valid", "test"), strict=True):
        for key, offset, colour, name in [("delta", -0.2, 0, "measured"), ("published", 0.2, 1, "published")]:
            bars = [(y + offset, row[key][split]) for y, row in enumerate(rows) if row[key]]
            if bars:
                places, values = zip(*bars, strict=True)
                drawn = axes.barh(places, values, height=0.38, color=COLOURS[colour], label=name)
                axes.bar_label(drawn, fmt="{:+.2f}", padding=3, fontsize=9)
        theirs = f", published {published[split]:g}" if published else ""
        axes.set_title(f"{split}: full model {full[split][found['unit']]:.4g}{theirs}", fontsize=11)
        axes.set_xlabel(f"{unit} above that of the full model")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.margins(x=0.18)  # room for the figures beside the bars
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=11)
    panels[0].invert_yaxis()
    if published and rows:
        handles, labels = panels[0].get_legend_handles_labels()
        labels = [f"published ({published['recipe']})" if label == "published" else label for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    title = f"Each trick off in turn: {_title(found)}, {_budget(found['budget'])} a row"
    figure.suptitle(fill(title, 110, break_on_hyphens=False), fontsize=12)
    return _png(figure)


def _budget(budget: dict[str, Any]) -> str:
    return duration(budget["max_seconds"]) if budget["max_seconds"] else f"{budget['epochs']} epochs"


def _title(found: dict[str, Any]) -> str:
    changed = ", ".join(f"{key}={value}" for key, value in found["overrides"].items())
    records = found["stages"].values() if "stages" in found else found["rows"]
    machines = dict.fromkeys(start["machine"] for record in records for start in record.get("starts", []))
    where = f" on {', '.join(machines)}" if machines else ""
    return f"{found['recipe']}{f' with {changed}' if changed else ''}{where}"


def _figure(*size: float):
    """A figure of that many inches, None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=size, dpi=120, layout="constrained")


def _png(figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
