"""The LSTM on a GPU, in each implementation that is there."""

import pytest
import torch
from test_lstm import SEED, arguments, gradients

from fastlm import testing
from fastlm.ops import lstm

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(7, 3, 5, 9), (1, 1, 1, 1), (5, 33, 37, 1150)], ids=str)
@pytest.mark.parametrize("impl", testing.impls("lstm", "cuda"))
@pytest.mark.parametrize("reverse", [False, True])
def test_gpu_equals_cpu(reverse, impl, shape):
    args = arguments(shape, torch.float32)
    with torch.no_grad():
        for weight in args[3:5]:
            weight.mul_(2 * shape[3] ** -0.5)  # else the gates of many units are shut or open, and nothing shows
    device = [a.detach().cuda().requires_grad_() for a in args]
    expected = lstm(*args, weight_dropout=0.4, seed=SEED, reverse=reverse)
    actual = lstm(*device, weight_dropout=0.4, seed=SEED.cuda(), reverse=reverse, impl=impl)
    weights = [torch.randn_like(y).double() for y in expected]
    for a, e in zip(actual, expected, strict=True):
        testing.assert_close("value", a.cpu(), e.double(), 1e-3)
    grads = gradients([a.cpu() for a in actual], device, weights)
    for a, e in zip(grads, gradients(expected, args, weights), strict=True):
        testing.assert_close("gradient", a.cpu(), e.double(), 1e-3)
