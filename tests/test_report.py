import builtins
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from tiny_run import SMALL, write_text

from fastlm.data import Vocabulary, load_corpus
from fastlm.errors import FastlmError
from fastlm.nn import NeuralCache
from fastlm.training.caching import cache_run
from fastlm.training.metrics import MetricsFile, read_metrics
from fastlm.training.passage import trace_passage
from fastlm.training.plots import draw_curves
from fastlm.training.recipe import make_recipe
from fastlm.training.report import write_report
from fastlm.training.run import RunConfig, create_run, run_cache, run_model, write_json
from fastlm.training.trainer import Trainer

METRICS = [
    {"event": "train", "step": 10, "ppl": 300.0},
    {"event": "train", "step": 20, "ppl": 200.0},
    {
        "event": "epoch",
        "step": 20,
        "ppl": 250.0,
        "valid_ppl": 220.0,
        "valid_nll": 5.39,
        "valid_bpc": 7.8,
        "averaging": False,
    },
    {
        "event": "epoch",
        "step": 40,
        "ppl": 150.0,
        "valid_ppl": 180.0,
        "valid_nll": 5.19,
        "valid_bpc": 7.5,
        "averaging": True,
    },
]


class Page(HTMLParser):
    """Checks that tags close in order; gathers the text, the tags and the titles."""

    VOID = {"meta", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.titles = [], set(), [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.titles += [v for k, v in attributes if k == "title"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def new_run(folder, metrics=METRICS, level="word"):
    vocabulary = Vocabulary(["<eos>", "a"], [1, 1])
    create_run(folder, RunConfig(make_recipe({**SMALL, "level": level}), "stdlib", "0", 2), vocabulary)
    for record in metrics:
        MetricsFile(folder / "metrics.jsonl").write(record)
    return folder


def test_a_run_in_training_has_a_report(tmp_path):
    run = new_run(tmp_path / "<run> & co")
    write_report(run)
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    text = (run / "report.html").read_text()
    page = Page(text)
    assert "180.00" in "".join(page.words)
    assert "run" not in page.tags and "<run> & co" in "".join(page.words)


def test_the_page_stands_alone(tmp_path):
    run = new_run(tmp_path / "a")
    write_report(run)
    text = (run / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', text) and "<script" not in text and "http" not in text
    assert "prefers-color-scheme: dark" in text


def test_a_run_without_metrics_has_one_too(tmp_path):
    write_report(new_run(tmp_path / "a", []))
    Page((tmp_path / "a" / "report.html").read_text())


def test_without_matplotlib_there_is_a_note_and_a_report(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    run = new_run(tmp_path / "a")
    with monkeypatch.context() as m:
        m.setattr(builtins, "__import__", no_matplotlib)
        assert draw_curves(METRICS) is None
        write_report(run)
    assert capsys.readouterr().err.count("\n") == 1
    assert not (run / "loss.png").exists()
    Page((run / "report.html").read_text())


def test_no_run(tmp_path):
    with pytest.raises(FastlmError, match="no run in"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("unit", "name", "trained", "valid", "scale"),
    [
        ("ppl", "perplexity", [300.0, 200.0], [220.0, 180.0], "log"),
        ("bpc", "bits per character", [None, 7.6], [7.8, 7.5], "linear"),  # the first line is of an older version
    ],
)
def test_the_curves_have_the_unit_of_the_level(monkeypatch, unit, name, trained, valid, scale):
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, *a, **k: (drawn.append((axes, *a)), plot(axes, *a, **k))[1])
    assert draw_curves([METRICS[0], {**METRICS[1], "bpc": 7.6}, *METRICS[2:]], unit)
    axes = drawn[0][0]
    assert [list(values) for _, _, values, _ in drawn] == [trained, valid]
    assert (axes.get_ylabel(), axes.get_yscale()) == (name, scale)


@pytest.mark.parametrize("level", ["char", "byte"])
def test_a_report_of_characters_or_bytes(tmp_path, level):
    run = new_run(tmp_path / "a", level=level)
    write_report(run)
    text = (run / "report.html").read_text()
    assert "<h2>Bits per character</h2>" in text and "<th>bits per character</th>" in text and "7.5000" in text
    assert "<h2>Perplexity" not in text
    assert (run / "loss.png").read_bytes() == draw_curves(METRICS, "bpc") != draw_curves(METRICS)


def test_metrics_that_end_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    MetricsFile(path).write({"step": 1})
    with open(path, "a") as f:
        f.write('{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    text = write_text(folder / "text")
    for split in ("train", "valid", "test"):
        words = (text / f"{split}.txt").read_text()
        (text / f"{split}.txt").write_text(words.replace("hill", '<b>"&x'))
    corpus = load_corpus(text, cache_dir=folder / "cache")
    Trainer(folder / "run", make_recipe({**SMALL, "epochs": 1}), corpus).fit()
    return folder / "run", corpus


def test_the_passage_shows_what_the_cache_saw(run):
    folder, corpus = run
    model, cache = run_model(folder), NeuralCache(0.5, 0.3, 20)
    words = trace_passage(model, corpus.vocabulary, corpus.test, cache, 30, 12)
    ids = corpus.test
    assert [w["word"] for w in words] == [corpus.vocabulary.words[i] for i in ids[30:42]]
    with torch.no_grad():
        out = model(ids[:-1, None])
        log_p = torch.log_softmax(model.logits(out.hidden)[:, 0], -1)
    for n, word in enumerate(words):
        t = 29 + n
        a = torch.softmax(0.5 * (out.raw[t - 20 : t, 0] @ out.raw[t, 0]), 0)
        of_cache = a[ids[t - 19 : t + 1] == ids[t + 1]].sum().item()
        of_model = log_p[t, ids[t + 1]].exp().item()
        assert word["cache"] == pytest.approx(of_cache, rel=1e-3, abs=1e-6)
        assert word["model"] == pytest.approx(of_model, rel=1e-3)
        assert word["mixed"] == pytest.approx(0.7 * of_model + 0.3 * of_cache, rel=1e-3)
        weights = [x["weight"] for x in word["looked"]]
        assert len(weights) == 5 and weights == sorted(weights, reverse=True)
        for x in word["looked"]:
            assert x["word"] == corpus.vocabulary.words[ids[t + 1 - x["back"]]]
            assert x["weight"] == pytest.approx(a[20 - x["back"]].item(), rel=1e-3)


def test_the_first_words_of_a_text_have_nothing_to_look_back_to(run):
    folder, corpus = run
    first, second = trace_passage(run_model(folder), corpus.vocabulary, corpus.test, NeuralCache(1.0, 0.3, 5), 1, 2)
    assert first["looked"] == [] and first["cache"] == 0
    assert first["mixed"] == pytest.approx(first["model"])
    assert len(second["looked"]) == 1


def test_the_report_of_a_tuned_run(run):
    folder, corpus = run
    result = cache_run(
        folder, run_model(folder), corpus, run_cache(folder), tune=True, thetas=[0.1, 1.0], windows=[5, 50]
    )
    assert result == json.loads((folder / "cache.json").read_text())
    assert result["tuned"] and {"valid", "test"} <= result.keys()
    page = Page((folder / "report.html").read_text())
    text = "".join(page.words)
    assert "b" not in page.tags  # a word of the text, not a tag
    assert '<b>"&x' in text and any('<b>"&x' in title for title in page.titles)
    assert len(page.titles) == len(result["passage"])
    assert f"{result['test']['cached']['ppl']:.2f}" in text and f"window {result['window']}" in text


def test_a_report_of_figures_that_are_no_numbers(tmp_path):
    vocabulary = Vocabulary(["<eos>", "a"], [1, 1], level="word")
    create_run(tmp_path, RunConfig(make_recipe(SMALL), "stdlib", "0", 2), vocabulary)
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({**METRICS[0], "ppl": math.nan})
    file.write({**METRICS[2], "valid_ppl": math.inf, "valid_nll": 800.0})
    assert read_metrics(file.path)[1]["valid_ppl"] is None
    write_report(tmp_path)
    assert "infinite" in (tmp_path / "report.html").read_text()
    write_json(tmp_path / "cache.json", {"valid": [1.0, math.nan]})
    assert json.loads((tmp_path / "cache.json").read_text()) == {"valid": [1.0, None]}


def test_the_passage_of_a_text_shorter_than_the_window_is_its_end(run):
    folder, corpus = run
    result = cache_run(folder, run_model(folder), corpus, NeuralCache(0.5, 0.3, 10 * len(corpus.test)))
    words = [corpus.vocabulary.words[i] for i in corpus.test]
    assert [w["word"] for w in result["passage"]] == words[-len(result["passage"]) :]
    assert "the end of a text that is too short" in "".join(Page((folder / "report.html").read_text()).words)
