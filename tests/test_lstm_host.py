"""The host part of the LSTM on CUDA, on the CPU: the alternating path's values, the way a call goes, its products.

`tests/host_side` plays the CUDA runtime and the persistent kernels; the rest is csrc/lstm.cu as it is, with PyTorch's
own products. What runs the kernels themselves is `test_lstm_steps_emulated.py` and `test_lstm_emulated.py`.
"""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_lstm import KERNEL

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(importlib.util.find_spec("torch").submodule_search_locations[0])

BEGIN = """
import ctypes, os, torch
torch.ops.load_library({library!r})
played = ctypes.CDLL({library!r})

def product(a, b, dtype, *, out):
    return torch.mm(a.to(dtype), b.to(dtype), out=out)

aten = torch.library.Library("aten", "IMPL")
aten.impl("mm.dtype_out", product, "CPU")  # PyTorch has it on GPUs alone

def play(multiprocessors=132, capability=90, cooperative=1, room=132, room_back=132, error=720):
    played.play(multiprocessors, capability, cooperative, room, room_back, error)

def seen():
    found = (ctypes.c_int * 5)()
    played.played(found)
    return dict(zip(("steps", "forwards", "backwards", "blocks", "sizes"), found))

def passes(T, B, H, dtype=torch.float32, tf32=False, **options):
    play(**options)
    tensors = [torch.randn(size).to(dtype) for size in ((T, B, 4 * H), (4 * H, H), (B, H), (B, H))]
    y, *_, cells = torch.ops.fastlm.lstm_fwd(*tensors, None, 0.0, False, True, tf32)
    forward = seen()
    torch.ops.fastlm.lstm_bwd(y, None, None, tensors[0], cells, tensors[3], tensors[1], None, 0.0, False, tf32)
    return forward, seen()

play()
import fastlm.ops
"""

WAYS = """
# None of the blocks' launches goes through: both passes are alternating, right after they were asked for.
forward, both = passes(9, 20, 1150)
assert forward == dict(steps=9, forwards=1, backwards=0, blocks=forward["blocks"], sizes=1179), forward
assert both == dict(steps=18, forwards=1, backwards=1, blocks=both["blocks"], sizes=1179), both
assert 90 <= forward["blocks"] <= 132 and 90 <= both["blocks"] <= 132
# Where it goes through there is no step; 16 bits and TF32 hold a layer that float32 does not.
for dtype, tf32, persistent in ((torch.float32, True, 1), (torch.bfloat16, False, 1), (torch.float32, False, 0)):
    forward, both = passes(8, 8, 2048, dtype, tf32, error=0)
    assert both["forwards"] == both["backwards"] == persistent and both["steps"] == 16 * (1 - persistent), both
# Products win over so many turns of a plan, unless a test names the way of h.
assert passes(8, 256, 1150, torch.bfloat16, error=0)[1]["steps"] == 16
os.environ["FASTLM_CUDA_EXCHANGE"] = "data"
assert passes(8, 256, 1150, torch.bfloat16, error=0)[1]["steps"] == 0
del os.environ["FASTLM_CUDA_EXCHANGE"]
# Too few steps, no promise of the driver, no multiprocessor to speak of.
for T, options in ((7, {}), (8, dict(cooperative=0)), (8, dict(multiprocessors=1))):
    forward, both = passes(T, 3, 400, **options, error=0)
    assert both == dict(steps=2 * T, forwards=0, backwards=0, blocks=0, sizes=0), both
# Less room than multiprocessors: fewer blocks with more units each, and none where the driver has no room at all.
most = passes(8, 20, 400, error=0)[1]
less = passes(8, 20, 400, room=50, room_back=30, error=0)
assert less[0]["blocks"] <= 50 and less[1]["blocks"] <= 30 < most["blocks"] and less[1]["steps"] == 0
assert passes(8, 20, 400, room=0, room_back=0, error=0)[1] == dict(steps=16, forwards=0, backwards=0, blocks=0, sizes=0)
# A smaller device by the environment, a way of h that only another device has.
os.environ["FASTLM_CUDA_MULTIPROCESSORS"] = "14"
forward, both = passes(8, 20, 400, torch.bfloat16, error=0)
assert 0 < forward["blocks"] <= 14 and 0 < both["blocks"] <= 14, (forward, both)
del os.environ["FASTLM_CUDA_MULTIPROCESSORS"]
for way, persistent in (("flags", 1), ("grid", 1), ("cluster", 0), ("no such", 1)):
    os.environ["FASTLM_CUDA_EXCHANGE"] = way
    assert passes(8, 20, 400, torch.bfloat16, error=0)[0]["forwards"] == persistent, way
del os.environ["FASTLM_CUDA_EXCHANGE"]
# Any other failure is one, and so is a GPU that is too old.
old = "compute capability 8.0 or above, this one has 7.5"
for options, message in ((dict(error=1), "CUDA error"), (dict(capability=75), old)):
    try:
        passes(8, 3, 5, **options)
        raise SystemExit("no error")
    except RuntimeError as error:
        assert message in str(error), error
# An empty sequence asks nobody.
assert passes(0, 3, 5)[1]["steps"] == passes(8, 0, 5)[1]["steps"] == passes(8, 3, 0)[1]["steps"] == 0
"""


PRODUCTS = """
import torch
torch.ops.load_library({library!r})
import fastlm.ops
product = torch.ops.fastlm.matmul_tf32

wide = torch.randn(7, 12)
for a in (torch.randn(5, 3), torch.randn(3, 5).t(), wide[:5, 2:5], wide[:3, :5].t(), torch.randn(5, 6)[:, ::2]):
    for b in (torch.randn(3, 4), torch.randn(4, 3).t(), wide[:3, 1:5], torch.randn(3, 1).expand(3, 4)):
        torch.testing.assert_close(product(a, b), a @ b + 1)  # the played library adds one
a, b = torch.randn(1, 3), torch.randn(3, 1)
torch.testing.assert_close(product(a, b), a @ b + 1)
for M, K, N in ((0, 3, 4), (5, 0, 4), (5, 3, 0)):
    a, b = torch.randn(M, K), torch.randn(K, N)
    assert torch.equal(product(a, b), a @ b)
"""


def test_products_of_a_library(tmp_path, fresh_python):
    """Rows in a piece or columns, parts of a matrix, and what is neither: cuBLAS gets each as it takes it."""
    fresh_python(PRODUCTS.format(library=build("matmul", tmp_path)), FASTLM_DISABLE_NATIVE="1")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build("lstm", tmp_path_factory.mktemp("host"))


def build(name, folder):
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("needs g++ on Linux")
    path = folder / f"{name}.so"
    include = [f"-I{ROOT / 'tests' / folder}" for folder in ("host_side", "emulator/cuda", "emulator")]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wl,-Bsymbolic", "-DUSE_CUDA", "-w"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(TORCH / "include")]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
    command = ["g++", *flags, *include, str(ROOT / "tests" / "host_side" / f"{name}.cpp"), "-o", str(path), *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(path)


def test_values_of_the_alternating_path(library, fresh_python):
    code = KERNEL.replace("assert _lib.instruction_set() == WANTED\n", "")
    assert code != KERNEL
    fresh_python(BEGIN.format(library=library) + code, FASTLM_DISABLE_NATIVE="1")


def test_which_way_a_call_goes(library, fresh_python):
    fresh_python(BEGIN.format(library=library) + WAYS, FASTLM_DISABLE_NATIVE="1")


LAUNCH = ("launches", "questions", "blocks", "threads", "shared", "cooperative", "cluster", "attributes", "allowed")
LAUNCH += ("non_portable", "right_kernel", "right_stream", "T")


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Launches a plan's kernel, or asks for its room, and returns the answer and what the runtime got."""
    played = ctypes.CDLL(build("lstm_launch", tmp_path_factory.mktemp("launch")))

    def call(*plan, resident=False, no_kernel=False, fails=0, error=0, each=0):
        found = (ctypes.c_int * len(LAUNCH))()
        answer = played.ask(resident, no_kernel, *plan, fails, error, each, found)
        return answer, SimpleNamespace(**dict(zip(LAUNCH, found, strict=True)))

    return call


PLANS = [  # slices, groups, replicas, blocks of a cluster, bytes of shared memory
    *((1, 1, 1, 1, 1), (1, 96, 1, 1, 200_000), (4, 29, 1, 1, 227 * 1024), (1, 7, 5, 1, 50_000)),
    *((1, 96, 1, 2, 1000), (4, 10, 3, 4, 1000), (8, 16, 1, 8, 150_000), (1, 16, 2, 16, 100_000)),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_what_a_launch_asks_for(ask, plan):
    slices, groups, replicas, cluster, shared = plan
    for each in (3, 0):
        for resident in (False, True):
            answer, seen = ask(*plan, resident=resident, each=each)
            assert answer == (each * (132 if cluster == 1 else cluster) if resident else 0)
            assert (seen.launches, seen.questions) == ((0, 1) if resident else (1, 0))
            assert (seen.threads, seen.shared) == (256, shared) and seen.allowed >= shared
            assert seen.non_portable == (cluster > 8)
            if resident and cluster == 1:  # the question has no configuration
                continue
            assert seen.blocks == slices * groups * replicas and seen.cooperative == 1
            assert (seen.cluster, seen.attributes) == ((cluster, 2) if cluster > 1 else (0, 1))
            assert resident or (seen.right_kernel, seen.right_stream, seen.T) == (1, 1, 70)


SHARED, NON_PORTABLE, LAUNCHING, OCCUPANCY = range(1, 5)


@pytest.mark.parametrize("error", [1, 720])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_errors_of_a_launch_are_handed_on(ask, plan, error):
    """A kernel that may not have its memory or its clusters is not launched, and has no room."""
    cluster = plan[3]
    for fails in (SHARED, LAUNCHING, *((NON_PORTABLE,) if cluster > 8 else ())):
        answer, seen = ask(*plan, fails=fails, error=error)
        assert (answer, seen.launches) == (error, fails == LAUNCHING)
    for fails in (SHARED, OCCUPANCY, *((NON_PORTABLE,) if cluster > 8 else ())):
        answer, seen = ask(*plan, resident=True, fails=fails, error=error, each=3)
        assert (answer, seen.questions) == (0, fails == OCCUPANCY)


def test_no_kernel_is_an_error(ask):
    for resident in (False, True):
        answer, seen = ask(*PLANS[0], resident=resident, no_kernel=True, each=3)
        assert (answer, seen.launches, seen.questions) == (0 if resident else 1, 0, 0)
