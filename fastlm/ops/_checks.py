"""Argument checks shared by the public operators: each names the argument, what it got and what it wanted."""

from collections.abc import Sequence

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(name: str, x: torch.Tensor) -> None:
    """Raise TypeError unless `x` is a floating-point tensor of a supported dtype."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def same(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor, *, dtype: bool = True) -> None:
    """Raise TypeError unless `x` has the device, and the dtype if asked for, of `other`."""
    if x.device != other.device:
        raise TypeError(f"{name} must be on {other.device} like {other_name}, got {x.device}")
    if dtype and x.dtype != other.dtype:
        raise TypeError(f"{name} must be {other.dtype} like {other_name}, got {x.dtype}")


def dims(name: str, x: torch.Tensor, letters: str) -> tuple[int, ...]:
    """Return the sizes of `x`; raise ValueError unless it has one dimension per letter."""
    if x.dim() != len(letters):
        raise ValueError(f"{name} must have shape [{', '.join(letters)}], got {list(x.shape)}")
    return tuple(x.shape)


def shape(name: str, x: torch.Tensor, **sizes: int) -> None:
    """Raise ValueError unless `x` has exactly the named sizes, as in `shape("h0", h0, B=B, H=H)`."""
    if tuple(x.shape) != tuple(sizes.values()):
        wanted = f"[{', '.join(sizes)}] = {list(sizes.values())}"
        raise ValueError(f"{name} must have shape {wanted}, got {list(x.shape)}")


def ids(name: str, x: torch.Tensor) -> None:
    """Raise TypeError unless `x` is a tensor of word ids (int64 or int32)."""
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int64, torch.int32):
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {got}")


def within(name: str, x: torch.Tensor, low: int, high: int, what: str) -> None:
    """Raise ValueError unless all ids lie in [low, high); on the CPU alone, since elsewhere it would wait for them."""
    if x.device.type != "cpu" or not x.numel() or torch.compiler.is_compiling():
        return
    least, most = (int(bound) for bound in x.aminmax())
    if least < low or most >= high:
        raise ValueError(f"{name} must lie in [{low}, {high}), {what}, got {least if least < low else most}")


def _integer(value) -> bool:
    # torch.compile takes a size that varies for an int, but cannot ask it for an attribute.
    return not isinstance(value, bool) and (isinstance(value, int) or hasattr(value, "__index__"))


def cutoffs(values: Sequence[int], classes: int) -> tuple[int, ...]:
    """Return first ids of clusters as a tuple.

    Raises:
        TypeError: they are no sequence of integers. ValueError: they do not increase or leave [1, classes).
    """
    if not hasattr(values, "__iter__"):
        raise TypeError(f"cutoffs must be a sequence of integers, got {values!r}")
    for value in values:
        if not _integer(value):
            raise TypeError(f"cutoffs must be integers, got {value!r}")
    found = tuple(int(value) for value in values)
    if list(found) != sorted(set(found)) or any(not 0 < value < classes for value in found):
        raise ValueError(f"cutoffs must increase and lie in [1, {classes}), the vocabulary, got {list(values)}")
    return found


def size(name: str, value: int) -> None:
    """Raise TypeError unless `value` is an integer, ValueError unless it is at least 0."""
    if not _integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def part(rows: int, column: int, columns: int | None) -> int:
    """Return how many rows the batch has of which these are a part, from `column` on; all, if `columns` is None.

    Raises:
        TypeError: they are no integers. ValueError: there are not so many.
    """
    columns = rows if columns is None else columns
    size("column", column)
    size("columns", columns)
    if column + rows > columns:
        raise ValueError(f"{rows} rows from column {column} on are no part of a batch of {columns}")
    return columns


def positive(name: str, value: float) -> float:
    """Return `value` as a float; raise TypeError unless it is a number, ValueError unless it is positive."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not found > 0.0:
        raise ValueError(f"{name} must be positive, got {found}")
    return found


def probability(name: str, p: float) -> float:
    """Return `p` as a float; raise TypeError unless it is a number, ValueError unless it lies in [0, 1]."""
    try:
        p = float(p)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {p!r}") from None
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {p}")
    return p


def theta(value: float) -> float:
    """Return `value` as a float; raise ValueError unless it is a flatness, >= 0, whose products float32 can hold."""
    value = float(value)
    if not 0.0 <= value < 1e30:
        raise ValueError(f"theta must lie in [0, 1e30), got {value}")
    return value


def seed(x: torch.Tensor, like: torch.Tensor) -> None:
    """Raise unless `x` is an int64 scalar tensor on the device of `like`."""
    if not isinstance(x, torch.Tensor) or x.dtype != torch.int64:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"seed must be an int64 scalar tensor, got {got}")
    if x.dim() != 0:
        raise ValueError(f"seed must be a scalar tensor, got shape {list(x.shape)}")
    if x.device != like.device:
        raise TypeError(f"seed must be on {like.device}, got {x.device}")


def state(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor, **sizes: int) -> None:
    """Raise unless `x` is a state of the named sizes, on the device of `other`, in its dtype or in float32."""
    floating(name, x)
    same(name, x, other_name, other, dtype=x.dtype != torch.float32)
    shape(name, x, **sizes)


def recorded(*tensors: torch.Tensor | None) -> bool:
    """Whether a call has to go through its Function: for a backward, or because forward-mode derivatives are taken.

    Those pass through a bare operator as zeros without a word; a Function without them raises.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
