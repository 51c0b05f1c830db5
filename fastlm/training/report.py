"""What a run looks like: loss.png and report.html, made from the other files of the run folder."""

from __future__ import annotations

import base64
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from fastlm.errors import FastlmError
from fastlm.training.evaluate import UNITS
from fastlm.training.forms import check_event
from fastlm.training.metrics import read_metrics
from fastlm.training.plots import MISSING, draw_curves
from fastlm.training.progress import duration, say
from fastlm.training.recipe import Recipe
from fastlm.training.run import read_json, read_run, write_file

STYLE = """
:root { color-scheme: light dark; --text: #1d2129; --faint: #667085; --page: #fcfcfd; --line: #d9dde3;
  --cache: 217 119 6; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ec; --faint: #98a2b3; --page: #14171c; --line: #343a44;
  --cache: 245 158 11; } img { filter: invert(0.9) hue-rotate(180deg); } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; font: 16px/1.55 system-ui, sans-serif;
  color: var(--text); background: var(--page); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: right;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
td:first-child, th:first-child, .words td, .words th { text-align: left; }
.passage { line-height: 2; overflow-wrap: anywhere; } .passage span { padding: .1em .2em; border-radius: .2em;
  background: rgb(var(--cache) / var(--p)); }
.faint { color: var(--faint); } summary { cursor: pointer; } .wide { overflow-x: auto; }
"""


def write_report(run_dir: str | Path) -> None:
    """Writes loss.png, where matplotlib is there, and report.html.

    Raises:
        FastlmError: there is no run in the folder, or a file of it cannot be read.
    """
    run_dir = Path(run_dir)
    recipe = read_run(run_dir).recipe
    metrics = read_events(run_dir / "metrics.jsonl")
    results, cache = read_json(run_dir / "results.json"), read_json(run_dir / "cache.json")
    png = draw_curves(metrics, recipe.unit)
    if png is None:
        say(f"no loss curves: {MISSING}")
    else:
        write_file(run_dir / "loss.png", png)
    write_file(run_dir / "report.html", render(run_dir.resolve().name, recipe, metrics, results, cache, png))


def read_events(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl.

    Raises:
        FastlmError: it cannot be read.
    """
    try:
        metrics = read_metrics(path)
        for number, record in enumerate(metrics, 1):
            check_event(record, f"line {number}")
    except (OSError, ValueError) as e:
        raise FastlmError(f"{path} cannot be read: {e}") from e
    return metrics


def render(
    name: str,
    recipe: Recipe,
    metrics: list[dict[str, Any]],
    results: dict[str, Any] | None,
    cache: dict[str, Any] | None,
    png: bytes | None,
) -> str:
    """The page: one file, no scripts, nothing loaded from elsewhere."""
    title = f"{escape(name)}: {recipe.cell.upper()} language model"
    body = [f"<h1>{title}</h1>", _figures(metrics, results, cache, UNITS[recipe.unit])]
    if png is not None:
        data = base64.b64encode(png).decode()
        unit = UNITS[recipe.unit].capitalize()
        body.append(f'<h2>{unit}</h2><img alt="{unit} over steps" src="data:image/png;base64,{data}">')
    if cache is not None and cache.get("passage"):
        body.append(_passage(cache))
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in asdict(recipe).items())
    body.append(f"<h2>Recipe</h2><details><summary>every key</summary><table>{rows}</table></details>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    head += f"<style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{"".join(body)}</body></html>\n'


def _figures(metrics, results, cache, unit) -> str:
    rows = []
    if results is not None:
        rows += [(split, results[split]) for split in ("valid", "test")]
    else:
        epochs = [r for r in metrics if r["event"] == "epoch"]
        best = min(epochs, key=lambda r: r["valid_nll"], default=None)
        rows += [("valid, best so far", {k: best[f"valid_{k}"] for k in ("ppl", "nll", "bpc")})] if best else []
    if cache is not None:
        rows += [(f"{split}, one stream", cache[split]["plain"]) for split in ("valid", "test") if split in cache]
        rows += [(f"{split} with the cache", cache[split]["cached"]) for split in ("valid", "test") if split in cache]
    cells = "".join(
        f"<tr><td>{label}</td><td>{_ppl(s['ppl'])}</td><td>{s['nll']:.4f}</td><td>{s['bpc']:.4f}</td></tr>"
        for label, s in rows
    )
    parts = []
    if cells:
        bits = "bits" if unit == UNITS["ppl"] else unit
        parts.append(f"<table><tr><th></th><th>perplexity</th><th>nats</th><th>{bits}</th></tr>{cells}</table>")
    if results is not None:
        parts.append(
            f"<p>{results['parameters']:,} parameters, {results['epochs']} full epochs, {results['steps']:,} steps, "
            f"{duration(results['seconds'])} of training at {results['tokens_per_second']:,.0f} tokens/s.</p>"
        )
    if cache is not None:
        parts.append(
            f"<p>Cache: theta {cache['theta']:.4g}, lambda {cache['lambda']:.4g}, window {cache['window']:,}.</p>"
        )
    return "".join(parts)


def _ppl(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.2f}"  # JSON has no infinity


def _passage(cache: dict[str, Any]) -> str:
    words = "".join(
        f'<span style="--p:{w["cache"]:.3f}" title="{_summary(w)}">{_show(w["word"])}</span> ' for w in cache["passage"]
    )
    rows = "".join(
        f"<tr><td>{_show(w['word'])}</td><td>{w['model']:.4f}</td><td>{w['cache']:.4f}</td><td>{w['mixed']:.4f}</td>"
        f"<td>{_looked(w)}</td></tr>"
        for w in cache["passage"]
    )
    return (
        "<h2>What the cache sees</h2>"
        '<p class="faint">A passage of the test text: the first for which the cache is full, or the end of a text that '
        "is too short to fill it. The deeper the shade of a word, the higher the probability that the cache alone gave "
        "it, from the words before it. Hold the pointer over a word, or open the list below, for the words that it "
        "looked back to, and how far back they are.</p>"
        f'<p class="passage">{words}</p>'
        '<details><summary>word by word</summary><div class="wide"><table class="words">'
        "<tr><th>word</th><th>model</th><th>cache</th><th>mixed</th><th>looked back to (weight, words ago)</th></tr>"
        f"{rows}</table></div></details>"
    )


def _summary(word: dict[str, Any]) -> str:
    return f"cache {word['cache']:.3f}, model {word['model']:.3f}; looked back to {_looked(word)}"


def _looked(word: dict[str, Any]) -> str:
    return ", ".join(f"{_show(x['word'])} ({x['weight']:.2f}, {x['back']})" for x in word["looked"]) or "nothing"


def _show(word: str) -> str:
    """A token as one sees it: white space and line ends have signs."""
    signs = {"<eos>": "\u23ce", "<0x0A>": "\u23ce", " ": "\u2423"}
    return escape(signs.get(word, word), quote=True)
