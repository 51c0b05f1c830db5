"""Whether the LSTM may make float32 products of factors of 11 bits: where that is read, and how long it holds."""

import sys

import pytest
import torch
from test_lstm import KERNELS, SEED, arguments

from fastlm import _lib
from fastlm.ops import lstm


@pytest.mark.parametrize("recorded", [False, True])
def test_the_setting_of_the_forward_holds_for_its_backward(monkeypatch, recorded):
    """TF32 is read once a call: a backward after the setting has changed is still that of its forward."""
    module, seen = sys.modules[lstm.__module__], []
    choose = _lib.kernel

    def kernel(name, impl):
        return lambda *args: seen.append((name, args[-1])) or choose(name, impl)(*args)

    args = arguments((4, 3, 5, 6), torch.float32)
    monkeypatch.setattr(_lib, "kernel", kernel)
    for setting in (True, False):
        monkeypatch.setattr(module, "_tf32", lambda impl, setting=setting: setting)
        with torch.set_grad_enabled(recorded):
            y = lstm(*args, impl=(KERNELS or ["aten"])[0])[0]
        monkeypatch.setattr(module, "_tf32", lambda impl, setting=setting: not setting)
        if recorded:
            y.sum().backward()
        names = ("lstm_fwd", "lstm_bwd")[: 1 + recorded] if KERNELS else ()
        assert seen == [(name, setting) for name in names]
        seen.clear()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.skipif(not KERNELS, reason="no kernels here")
def test_all_products_are_of_the_kind(monkeypatch, p, bias):
    """That of the input and the gradients' too, as cuDNN has it; where there is no TF32 the values are the same."""
    module, shapes = sys.modules[lstm.__module__], []
    args = arguments((4, 3, 5, 6), torch.float32, bias=bias)

    def outcome():
        results = lstm(*args, weight_dropout=p, seed=SEED, impl=KERNELS[0])
        return *results, *torch.autograd.grad(sum(y.sum() for y in results), args)

    expected = outcome()
    make = module.matmul_tf32
    monkeypatch.setattr(module, "_tf32", lambda impl: True)
    monkeypatch.setattr(module, "matmul_tf32", lambda a, b: shapes.append((*a.shape, b.shape[1])) or make(a, b))
    for ours, wanted in zip(outcome(), expected, strict=True):
        torch.testing.assert_close(ours, wanted)
    assert sorted(shapes) == sorted([(12, 5, 24), (24, 12, 6), (24, 12, 5), (12, 24, 5)])
    with torch.no_grad():
        y = lstm(*args, weight_dropout=p, seed=SEED, impl=KERNELS[0])[0]
    torch.testing.assert_close(y, expected[0].detach())


def test_the_product_is_well_registered():
    a, b = torch.randn(5, 3), torch.randn(4, 3).t()
    torch.library.opcheck(torch.ops.fastlm.matmul_tf32.default, (a, b))


def test_tf32_is_pytorchs_setting_for_recurrent_layers():
    tf32, cudnn = sys.modules[lstm.__module__]._tf32, torch.backends.cudnn
    before = cudnn.rnn.fp32_precision, cudnn.conv.fp32_precision
    try:
        for allowed in (True, False):
            cudnn.allow_tf32 = allowed
            assert tf32("cuda") == allowed and not tf32("triton") and not tf32("cpu")
        cudnn.rnn.fp32_precision, cudnn.conv.fp32_precision = "tf32", "ieee"
        assert tf32("cuda")  # where reading allow_tf32 raises
        cudnn.rnn.fp32_precision, cudnn.conv.fp32_precision = "ieee", "tf32"
        assert not tf32("cuda")
        compiled = torch.compile(lambda x: x + tf32("cuda"), fullgraph=True, backend="aot_eager")
        assert compiled(torch.zeros(1)).item() == 0
    finally:
        cudnn.rnn.fp32_precision, cudnn.conv.fp32_precision = before
