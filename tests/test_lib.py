"""FASTLM_IMPL: what it takes, and that it never makes "auto" fail; kernels that "auto" does not take yet."""

import json
from pathlib import Path

import pytest
import torch

from fastlm import _lib, info, ops, testing

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"

CALL = """
import torch
from fastlm import ops
f = torch.rand(3, 2, 4, dtype=getattr(torch, {dtype!r}))
try:
    print(tuple(ops.forget_mult(f, f).shape))
except RuntimeError as error:
    print(error)
"""


def test_an_unknown_name_is_an_error_at_the_first_call(fresh_python):
    out = fresh_python(CALL.format(dtype="float32"), FASTLM_IMPL="refrence")
    assert out == "FASTLM_IMPL must be one of auto, reference, cpu, cuda, triton, aten, got 'refrence'\n"


@pytest.mark.parametrize("name", ["", "cpu"])
def test_what_it_cannot_serve_goes_as_usual(fresh_python, name):
    assert fresh_python(CALL.format(dtype="float64"), FASTLM_IMPL=name) == "(3, 2, 4)\n"


def test_every_name_serves_every_operator(monkeypatch):
    for name in _lib.IMPLS:
        monkeypatch.setattr(_lib, "DEFAULT_IMPL", name)
        for op, (_, _, extra, *_) in _lib.ops.items():
            for dtype in (torch.float32, torch.float64, torch.int64):
                for device in ("cpu", "meta"):
                    chosen = _lib.resolve(op, "auto", torch.empty(2, dtype=dtype, device=device))
                    assert chosen == name or name not in ("reference", *extra)


def test_auto_passes_over_what_was_not_measured(monkeypatch):
    """The LSTM's CUDA kernels go by name, or by the debugging setting, until a results file has their times."""
    monkeypatch.setattr(_lib, "native_kernels", {("lstm_fwd", "cuda"), ("lstm_bwd", "cuda")})
    assert _lib.native("lstm", "cuda") and "cuda" in testing.impls("lstm", "cuda")
    assert _lib._automatic("lstm", "cuda", True) == "aten"
    assert info.passed_over() == {"cuda": ["lstm"]} and "cuda lstm" in info.text(info.passed_over())
    with monkeypatch.context() as patch:
        patch.setattr(_lib, "DEFAULT_IMPL", "cuda")
        assert _lib._automatic("lstm", "cuda", True) == "cuda"
    monkeypatch.setitem(_lib.ops, "lstm", _lib.ops["lstm"]._replace(unmeasured=()))
    assert _lib._automatic("lstm", "cuda", True) == "cuda"
    monkeypatch.setattr(_lib, "native_kernels", set())
    assert info.passed_over() == {} and info.text({}) == "none"


@pytest.mark.parametrize("function", [ops.cache_attention, ops.forget_mult, ops.qrnn_pool])
def test_auto_passes_over_only_for_what_can_serve(function, monkeypatch):
    """Triton stands in for a CUDA kernel that was not measured; without it that kernel comes before the fallback."""
    op = function.__name__
    monkeypatch.setattr(_lib, "DEFAULT_IMPL", "auto")
    monkeypatch.setattr(_lib, "native_kernels", {(name, "cuda") for name in _lib.ops[op].kernels})
    measured = _lib.ops[op]._replace(unmeasured=())
    for missing, auto in ((None, "triton"), ("Triton is not installed", "cuda")):
        monkeypatch.setattr(_lib, "triton_missing", missing)
        assert _lib._automatic(op, "cuda", True) == auto
        assert info.passed_over() == ({"cuda": [op]} if auto == "triton" else {})
        assert _lib._automatic(op, "cuda", False) == "reference"
        with monkeypatch.context() as patch:
            patch.setitem(_lib.ops, op, measured)
            assert _lib._automatic(op, "cuda", True) == "cuda" and info.passed_over() == {}
    monkeypatch.setattr(_lib, "native_kernels", set())
    assert _lib._automatic(op, "cuda", True) == "fallback"


def test_what_was_not_measured_has_no_results():
    """A results file of a GPU that times a kernel ends its being passed over."""
    timed = set()
    for path in RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        for case in found["cases"] if found["device"] == "cuda" else ():
            names = {contender["name"] for contender in case["contenders"]}
            timed |= {case["op"]} if "fastlm cuda" in names else set()
    assert not timed & {name for name, op in _lib.ops.items() if "cuda" in op.unmeasured}
