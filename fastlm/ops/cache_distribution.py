"""The distribution of the continuous cache over the vocabulary, for generation.

    p(w) = sum_i [x_i = w] a_i,        a = softmax_i(theta q . k_i)

over the entries of a ring buffer of keys k_i and words x_i, in any order. A word's weights are summed as integers, so
neither the order of its entries nor that of the threads shows in its sum. Grave, Joulin and Usunier, "Improving neural
language models with a continuous cache", arXiv 1612.04426, equations 2 and 3. Like `cache_attention` it has no adjoint.
"""

import torch

from fastlm import _lib
from fastlm.ops import _checks

_lib.define(
    "cache_distribution(Tensor query, Tensor keys, Tensor ids, Tensor count, SymInt vocab_size, float theta) -> Tensor"
)
_lib.declare("cache_distribution", kernels=("cache_distribution",), triton=("cache_distribution",))

_ONE = 2.0**60  # a probability of 1 as an integer: the sum of a row cannot overflow, the rounding is below float32's


def reference(query, keys, ids, count, vocab_size, theta):
    """Softmax over the valid entries, then a sum per word."""
    state = torch.float64 if query.dtype == torch.float64 else torch.float32
    valid = _valid(ids, count)
    _check_values(ids, count, vocab_size)
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.bmm(keys.to(state), query.to(state)[:, :, None])[:, :, 0]
    # in float64, since theta times a finite score may be beyond float32
    scores = (scores.double() * theta).masked_fill(~valid, float("-inf"))
    # An empty row of -inf becomes NaN in the softmax, and 0 here, as do entries beyond the count whatever they hold.
    weights = scores.softmax(1).mul_(_ONE).masked_fill(~valid, 0.0)
    unknown = weights.isnan().any(1, keepdim=True)  # seen here, since NaN as an integer is an arbitrary number
    sums = torch.zeros((len(query), vocab_size), dtype=torch.int64, device=query.device)
    sums.scatter_add_(1, ids.long().masked_fill(~valid, 0), weights.nan_to_num().long())
    return sums.double().div_(_ONE).masked_fill_(unknown, float("nan")).to(state)


def _valid(ids, count):
    return torch.arange(ids.shape[1], device=ids.device) < count[:, None]  # [B, W]


def _check_values(ids, count, vocab_size):
    valid = _valid(ids, count)
    known = ((ids >= 0) & (ids < vocab_size) | ~valid).all()
    counted = ((count >= 0) & (count <= ids.shape[1])).all()
    if ids.device.type != "cpu":
        torch._assert_async(known, "cache_distribution: ids outside the vocabulary")
        torch._assert_async(counted, "cache_distribution: count outside [0, W]")
    elif not known:
        raise ValueError(f"ids must lie in [0, {vocab_size}), the vocabulary")
    elif not counted:
        raise ValueError(f"count must lie in [0, W] = [0, {ids.shape[1]}], got {count.tolist()}")


def _fake(query, keys, ids, count, vocab_size, theta):
    state = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((query.shape[0], vocab_size), dtype=state)


_lib.reference("cache_distribution", reference)
_lib.fake("cache_distribution", _fake)


def cache_distribution(
    query: torch.Tensor,
    keys: torch.Tensor,
    ids: torch.Tensor,
    count: torch.Tensor | int,
    vocab_size: int,
    *,
    theta: float,
    impl: str = "auto",
) -> torch.Tensor:
    """The probability of every word of the vocabulary in the continuous cache.

    Args:
        query: `[B, D]`, the present hidden state of each stream; float32, bfloat16, float16 or float64.
        keys: `[B, W, D]` like `query`, the hidden states of the ring buffer, in any order.
        ids: `[B, W]` int64 or int32, the word that followed each of them.
        count: how many entries of the buffer are valid, those at 0 .. count - 1: a number, or `[B]` int64 or int32.
            What the others hold does not matter.
        vocab_size: V.
        theta: flatness, in [0, 1e30).
        impl: `"auto"`, `"reference"`, `"cpu"` or `"triton"`.

    Returns:
        `[B, V]` float32 (float64 for float64 input); a row sums to 1, or to 0 where `count` is 0. A row is NaN
        where the product of its query with a valid key is NaN or infinite.

    Raises:
        ValueError: wrong shape or theta, a count outside [0, W] or ids outside the vocabulary (device assertions on
            a GPU), or an input that requires a gradient: there is none.
        TypeError: wrong dtype or device. RuntimeError: `impl` is not installed.
    """
    _checks.floating("query", query)
    B, D = _checks.dims("query", query, "BD")
    _checks.same("keys", keys, "query", query)
    _, W, _ = _checks.dims("keys", keys, "BWD")
    _checks.shape("keys", keys, B=B, W=W, D=D)
    _checks.ids("ids", ids)
    _checks.same("ids", ids, "query", query, dtype=False)
    _checks.shape("ids", ids, B=B, W=W)
    if isinstance(count, int):
        count = torch.full((B,), count, dtype=torch.int64, device=query.device)
    _checks.ids("count", count)
    _checks.same("count", count, "query", query, dtype=False)
    _checks.shape("count", count, B=B)
    theta = _checks.theta(theta)
    for name, x in (("query", query), ("keys", keys)):
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, the cache has none: use torch.no_grad()")
    chosen = _lib.resolve("cache_distribution", impl, query)
    if chosen == "reference":
        return reference(query, keys, ids, count, vocab_size, theta)
    # On a GPU and under a compiler the kernel's own check has to do.
    if chosen in ("cpu", "triton") and query.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(ids, count, vocab_size)
    if chosen == "cpu":
        ids, count = ids.long(), count.long()
    return _lib.kernel("cache_distribution", chosen)(query, keys, ids, count, vocab_size, theta)
