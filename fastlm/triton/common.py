"""What the Triton kernels share: the launch, the mask generator, tanh and sigmoid.

Triton 3.6 to 3.9 are all served from here and by three habits of the kernels. `enable_fp_fusion` is said at every
launch, because its default changed from on to off. A size is annotated `tl.int64`: offsets are then 64-bit, and no
version makes a constant of it; one that changes from batch to batch (T, and what has T in it) is named in
`do_not_specialize` too, so that no T is worth a compilation. Only tl.* functions that all of them have are used.
"""

import torch
import triton
import triton.language as tl


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def hardware(x: torch.Tensor) -> tuple[str, int | str]:
    """Backend and architecture of the GPU that a tensor is on; Triton's interpreter passes for Hopper."""
    if triton.knobs.runtime.interpret:
        return "cuda", 90
    with torch.cuda.device(x.device if x.is_cuda else -1):
        found = triton.runtime.driver.active.get_current_target()
    return found.backend, found.arch


def launch(kernel, programs: int, *args, num_warps: int, fp_fusion: bool, num_stages: int = 1, **constants) -> None:
    """Run a kernel on a one-dimensional grid, on the device of its first tensor and that device's current stream."""
    if programs == 0:
        return
    options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fp_fusion)
    device = next(x.device for x in args if isinstance(x, torch.Tensor))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[(programs,)](*args, **constants, **options)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](*args, **constants, **options)


def threshold(p: float) -> int:
    """The smallest 32-bit lane that keeps its element, as in fastlm/ops/philox.py; 2^32 for p = 1, where none does."""
    return int(p * 2.0**32)


def scale(p: float) -> float:
    """1 / (1 - p), and 0 where everything is dropped."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


@triton.jit
def philox_block(seed, block, stream: tl.constexpr):
    """The four lanes of the int64 blocks of four elements; `seed` is the 64-bit word itself."""
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, tl.zeros_like(low) + stream, tl.zeros_like(low))


@triton.jit
def philox_lane(seed, element, stream: tl.constexpr):
    """The lane of each of any int64 elements."""
    r0, r1, r2, r3 = philox_block(seed, element >> 2, stream)
    odd = (element & 1) == 1
    return tl.where((element & 2) == 0, tl.where(odd, r1, r0), tl.where(odd, r3, r2))


@triton.jit
def philox_keep(seed, first, least, stream: tl.constexpr, COUNT: tl.constexpr, RUN: tl.constexpr):
    """The mask of the elements first .. first + COUNT - 1; `first` is a multiple of RUN, which is 1, 2 or 4.

    A block of the generator serves RUN elements, so its cost goes with 1 / RUN. A column of several `first` gives a
    row of the mask for each.
    """
    element = first + tl.arange(0, COUNT // RUN) * RUN
    if RUN == 1:
        lane = philox_lane(seed, element, stream)
    else:
        r0, r1, r2, r3 = philox_block(seed, element >> 2, stream)
        if RUN == 4:
            lane = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
        else:
            front = (element & 2) == 0
            lane = tl.interleave(tl.where(front, r0, r2), tl.where(front, r1, r3))
    return lane.to(tl.int64) >= least


def run_length(size: int) -> int:
    """The RUN of `philox_keep` for rows of `size` elements: the largest of 4, 2 and 1 that divides it."""
    return 4 if size % 4 == 0 else 2 if size % 2 == 0 else 1


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in float32."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """tanh in float32, with a relative error of 3e-7: an odd polynomial near 0, where the quotient would cancel."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = 1.0 + s * (-0.333333173 + s * (0.133325804 + s * (-0.0538518654 + s * (0.0210702536 + s * -0.00627260751))))
    return tl.where(size < 0.55, x * near, tl.where(x < 0, -far, far))
