"""csrc/dropconnect.cu on the CPU, under the emulator: the same elements as the reference drops, on every schedule."""

import emulated
import pytest
import torch
from emulated import read, write

from fastlm import testing
from fastlm.ops import dropconnect, philox

SHAPES = [(1,), (5,), (37, 41), (1025,)] + [(460, 37)] * emulated.THOROUGH
BLOCKS = [1, 3]  # fewer than the elements ask for: a thread then has several quads


@pytest.fixture(scope="module")
def unit():
    return emulated.load("dropconnect")


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_values(unit, dtype, shape, blocks):
    weight, seed = torch.randn(shape).to(dtype), torch.tensor(2**40 + 7)
    for p in (0.0, 0.3, 1.0):
        arrays = read("weight", weight), write("out", weight), weight.numel(), p, read("seed", seed)
        out = unit.run("dropconnect_fwd", emulated.DTYPES[dtype], *arrays, blocks)["out"]
        assert torch.equal(out, dropconnect(weight, p, seed, impl="reference"))


@pytest.mark.parametrize("seed", testing.SEEDS)
def test_mask_of_every_stream(unit, seed):
    seed, count = torch.tensor(seed), 1027
    for stream in range(4):
        keep = write("out", torch.empty(count, dtype=torch.bool))
        out = unit.run("dropconnect_mask", keep, count, 0.3, read("seed", seed), stream, 3)["out"]
        assert torch.equal(out, philox.keep_mask((count,), 0.3, seed, stream))


def test_nothing_can_be_taken_away(unit):
    test_values(unit, torch.float16, (37, 41), 3)
    assert emulated.mutations(unit, lambda: test_values(unit, torch.float16, (5,), 1)) == {}
