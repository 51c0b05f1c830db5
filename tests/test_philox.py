"""The mask generator against the published vectors of Philox4x32-10 (Random123, kat_vectors)."""

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastlm.ops import philox

# counter, key, result
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, result", KNOWN_ANSWERS)
def test_reference_known_answers(counter, key, result):
    lanes = philox.philox4x32([torch.tensor([w]) for w in words(counter)], [torch.tensor([w]) for w in words(key)])
    assert [lane.item() for lane in lanes] == words(result)


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """csrc/philox.h compiled alone behind a C function."""
    folder = tmp_path_factory.mktemp("philox")
    (folder / "unit.cpp").write_text(
        '#include "philox.h"\n'
        'extern "C" void draw(const uint32_t* c, const uint32_t* k, uint32_t* out) {\n'
        "  const fastlm::Philox x = fastlm::philox4x32(c[0], c[1], c[2], c[3], k[0], k[1]);\n"
        "  for (int i = 0; i < 4; ++i) out[i] = x.lane[i];\n"
        "}\n"
    )
    include = Path(__file__).resolve().parents[1] / "csrc"
    library = folder / "unit.so"
    try:
        command = ["c++", "-std=c++20", "-O2", "-fPIC", "-shared", f"-I{include}", str(folder / "unit.cpp")]
        subprocess.run([*command, "-o", str(library)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no C++ compiler")
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("counter, key, result", KNOWN_ANSWERS)
def test_header_known_answers(header, counter, key, result):
    out = (ctypes.c_uint32 * 4)()
    header.draw((ctypes.c_uint32 * 4)(*words(counter)), (ctypes.c_uint32 * 2)(*words(key)), out)
    assert list(out) == words(result)


def test_counter_layout():
    """Element e reads lane e & 3 of the block whose counter is (low, high of e >> 2, stream, 0)."""
    seed = torch.tensor(0x0123456789ABCDEF)
    mask = philox.keep_mask((11,), 0.5, seed, philox.LOCKED)
    for e in range(11):
        counter = [torch.tensor([w]) for w in (e >> 2, 0, philox.LOCKED, 0)]
        key = [torch.tensor([0x89ABCDEF]), torch.tensor([0x01234567])]
        lane = philox.philox4x32(counter, key)[e & 3].item()
        assert mask[e].item() == (lane >= 2**31)


def test_streams_and_seeds_are_independent():
    seed = torch.tensor(7)
    masks = [philox.keep_mask((4096,), 0.5, seed, stream) for stream in range(4)]
    masks += [philox.keep_mask((4096,), 0.5, seed + 1, 0), philox.keep_mask((4096,), 0.5, seed + 2**32, 0)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).double().mean().item() - 0.5) < 0.04


def test_seeds_follow_the_default_generator():
    torch.manual_seed(3)
    first, second = philox.draw_seed("cpu"), philox.draw_seed("cpu")
    torch.manual_seed(3)
    assert torch.equal(philox.draw_seed("cpu"), first) and not torch.equal(first, second)


def test_shared_seeds_are_drawn_once_and_given_in_order():
    def drawn(count):
        return [philox.draw_seed("cpu").item() for _ in range(count)]

    torch.manual_seed(3)
    expected = drawn(4)
    torch.manual_seed(3)
    seeds = philox.SharedSeeds()
    with seeds:
        assert drawn(2) == expected[:2]
        with philox.SharedSeeds():  # of its own
            assert drawn(1) == expected[2:3]
    with seeds:
        assert drawn(3) == [*expected[:2], expected[3]]
        with ThreadPoolExecutor() as pool:
            assert pool.submit(drawn, 1).result()[0] not in expected
    assert drawn(1)[0] not in expected
