"""FASTLM_IMPL: what it takes, and that it never makes "auto" fail."""

import pytest
import torch

from fastlm import _lib

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
        for op, (_, _, extra, _) in _lib.ops.items():
            for dtype in (torch.float32, torch.float64, torch.int64):
                for device in ("cpu", "meta"):
                    chosen = _lib.resolve(op, "auto", torch.empty(2, dtype=dtype, device=device))
                    assert chosen == name or name not in ("reference", *extra)
