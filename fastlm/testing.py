"""What the tests of an operator share; of use to anyone who adds one."""

import torch

from fastlm import _lib

DTYPES = _lib.DTYPES
SEEDS = (0, 1, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63 - 1)


def impls(op: str, device: str = "cpu") -> list[str]:
    """The implementations of an operator that can serve the device here, the reference and `"auto"` included."""
    kernels = [device] if _lib.native(op, device) else []
    triton = ["triton"] if _lib.has_triton(op, device) else []
    return ["auto", "reference", *_lib.ops[op].extra, *triton, *kernels]


def quick(impl: str, numel: int) -> bool:
    """Whether a call on so many elements is one for the tests: Triton's interpreter takes 0.2 ms for each."""
    return impl != "triton" or not _lib.interpreting or numel <= 3000


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the 2-norm against a float64 result; the norm of `actual` where `exact` is zero."""
    norm = exact.double().norm().item()
    return (actual.double() - exact.double()).norm().item() / (norm or 1.0)


def assert_accurate(name: str, actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Assert that `actual` is at most twice as far from the float64 result as plain PyTorch in the same dtype.

    Args:
        name: what is compared, for the message. actual: the result under test. plain: plain PyTorch's result in the
            same dtype. exact: the float64 result.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    ours, theirs = error(actual, exact), error(plain, exact)
    assert ours <= 2 * theirs + 1e-6, f"{name}: error {ours:.3g}, plain PyTorch's {theirs:.3g}"


def assert_close(
    name: str, actual: torch.Tensor, exact: torch.Tensor, tolerance: float = 1e-6, *, scale: float = 0.0
) -> None:
    """Assert equal shapes and a small error in the 2-norm.

    Args:
        name: what is compared, for the message. actual: the result under test. exact: the float64 result.
        tolerance: what the error may be, relative to the norm of `exact`.
        scale: the size of what the elements are computed from. Where they cancel, the error is relative to the norm
            of a tensor of such elements instead: a lone element near zero has no digits to compare.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    distance = (actual.double() - exact.double()).norm().item()
    norm = max(exact.double().norm().item(), scale * exact.numel() ** 0.5) or 1.0
    assert distance <= tolerance * norm, f"{name}: error {distance / norm:.3g} > {tolerance:.3g}"


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values with no unit stride: what a kernel must not mistake for contiguous memory."""
    wide = x.new_empty(*x.shape, 2)
    wide[..., 0] = x.detach()
    return wide[..., 0].requires_grad_(x.requires_grad)
