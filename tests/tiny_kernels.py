"""Every CUDA kernel of the package on a tiny problem: what `make gpu` runs under compute-sanitizer.

python tests/tiny_kernels.py [--device cpu] [operator ...]
"""

import argparse
import contextlib
import os

import torch
from gpu_table import CASES, draw, dtypes, outcome, weights

from fastlm import _lib

# What an LSTM's kernels are chosen by: how h goes from block to block, and a single multiprocessor. There are steps
# enough for the weights to be kept on the chip.
WAYS = [{"FASTLM_CUDA_EXCHANGE": way} for way in ("data", "flags", "grid", "multicast", "cluster")]
WAYS += [{"FASTLM_CUDA_MULTIPROCESSORS": "1"}]
STEPS, WIDTH = 10, 70


@contextlib.contextmanager
def environment(changes):
    os.environ.update(changes)
    try:
        yield
    finally:
        for name in changes:
            del os.environ[name]


def run(case, device, impl):
    """Forward and backward in each dtype, an LSTM in each way and, in float32, with and without TF32."""
    for dtype in dtypes(case, device):
        inputs, grads = draw(case, STEPS, WIDTH, dtype, device), weights(case, STEPS, WIDTH, device)
        for way in WAYS if case.op == "lstm" else ({},):
            for tf32 in (False, True) if way and dtype == torch.float32 else (False,):
                torch.backends.cudnn.allow_tf32 = tf32
                with environment(way):
                    found = outcome(case, inputs, grads, impl)
                assert all(x.isfinite().all() for x in found.values() if x.is_floating_point()), case
    print(f"{case}: impl={impl} on {device}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operators", nargs="*", help="default: all that have a CUDA kernel")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    for case in CASES:
        if options.operators and case.op not in options.operators:
            continue
        if options.device == "cpu":
            run(case, "cpu", "auto")
        elif _lib.native(case.op, "cuda"):
            run(case, "cuda", "cuda")


if __name__ == "__main__":
    main()
