"""The continuous cache over a stream of text: how much the recent past speaks for the word that comes.

The cache pairs every hidden state with the word that followed it. Row t, with hidden state h_t and next word y_t, looks
back on the pairs (h_i, y_i) of its window, max(t - W, start_t) <= i < t, and scores them by likeness:

    norm_t = sum_i exp(theta h_t . h_i),        mass_t = sum_i [y_i = y_t] exp(theta h_t . h_i)

mass_t / norm_t is the probability that the cache gives to y_t. Both are returned as logarithms; an empty window gives
-inf twice. The pair of row t itself is never in its window: the cache does not see the answer.
Grave, Joulin and Usunier, "Improving neural language models with a continuous cache", arXiv 1612.04426, equations 2, 3.

There is no adjoint: the cache is a model of test time, its keys are values.
"""

from collections.abc import Sequence
from numbers import Integral, Real

import torch

from fastlm import _lib
from fastlm.ops import _checks

_lib.define(
    "cache_attention(Tensor hidden, Tensor next_ids, Tensor? memory, Tensor? memory_ids, Tensor? start, "
    "float[] theta, int[] window) -> (Tensor, Tensor)"
)
_lib.declare("cache_attention", kernels=("cache_attention",), triton=("cache_attention",), unmeasured=("cuda",))

_LONGEST = 2**48  # a window that no stream fills; longer ones would not fit in 64 bits
_BLOCK_SCORES = 1 << 20  # scores of one block of rows in the vectorised fallback: 4 MB, which a cache holds


def _state_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def reference(hidden, next_ids, memory, memory_ids, start, theta, window):
    """Row by row, window by window, as the formula stands."""
    past = 0 if memory is None else len(memory)
    keys = (hidden if memory is None else torch.cat([memory, hidden])).to(_state_dtype(hidden))
    ids = next_ids if memory is None else torch.cat([memory_ids, next_ids])
    thetas = torch.tensor(theta, dtype=keys.dtype, device=keys.device)
    log_mass = keys.new_full((len(window), len(theta), len(hidden)), float("-inf"))
    log_norm = log_mass.clone()
    for t in range(len(hidden)):
        oldest = -past if start is None else max(-past, int(start[t]))
        for j, width in enumerate(window):
            seen = slice(max(t - width, oldest) + past, t + past)
            with torch.autocast(hidden.device.type, enabled=False):
                scores = thetas[:, None] * (keys[seen] @ keys[t + past])  # [n_thetas, pairs]
            other = ids[seen] != ids[t + past]
            log_norm[j, :, t] = scores.logsumexp(1)
            log_mass[j, :, t] = scores.masked_fill(other, float("-inf")).logsumexp(1)
    return log_mass, log_norm


def _blocked(hidden, next_ids, memory, memory_ids, start, theta, window):
    """A block of rows against the band of keys that it sees; the windows are slices of the band."""
    rows, state = len(hidden), _state_dtype(hidden)
    past = 0 if memory is None else len(memory)
    log_mass = hidden.new_empty((len(window), len(theta), rows), dtype=state)
    log_norm = torch.empty_like(log_mass)
    widest = min(window[-1], past + rows)
    size = min(256, max(16, _BLOCK_SCORES // max(1, widest)))
    with torch.autocast(hidden.device.type, enabled=False):
        for first in range(0, rows, size):
            last = min(first + size, rows)
            width = min(window[-1], past + last - 1)  # columns: position first - width + row + column
            begin = max(first - width, -past)
            keys, ids = hidden[max(begin, 0) : last - 1], next_ids[max(begin, 0) : last - 1]
            if begin < 0:
                keys, ids = torch.cat([memory[past + begin :], keys]), torch.cat([memory_ids[past + begin :], ids])
            missing = width - (first - begin)
            all_scores = hidden.new_full((last - first, missing + len(keys)), float("-inf"), dtype=state)
            torch.mm(hidden[first:last].to(state), keys.to(state).T, out=all_scores[:, missing:])
            # Row r of the block sees the columns r .. r + width - 1: a view with a slanted stride.
            scores = all_scores.as_strided((last - first, width), (all_scores.shape[1] + 1, 1))
            ids = torch.cat([ids.new_zeros(missing), ids])
            match = ids.as_strided((last - first, width), (1, 1)) == next_ids[first:last, None]
            absent = _absent(start, first, last, width, missing, hidden.device)
            _reduce(scores, match, absent, theta, window, log_mass[:, :, first:last], log_norm[:, :, first:last])
    return log_mass, log_norm


def _absent(start, first, last, width, missing, device):
    """Where the band of a block has no pair: before the stream and its memory, or before `start`."""
    if start is None and missing == 0:
        return None
    position = torch.arange(width, device=device) + torch.arange(first - width, last - width, device=device)[:, None]
    oldest = first - width + missing
    return position < (oldest if start is None else start[first:last, None].clamp(min=oldest))


def _reduce(scores, match, absent, theta, window, log_mass, log_norm):
    """log sum exp over every window: the bands between successive windows, joined from the nearest outwards."""
    width, near = scores.shape[1], 0
    for j, reach in enumerate(window):
        far = min(reach, width)
        band = slice(width - far, width - near)
        for k, factor in enumerate(theta):
            terms = scores[:, band] * factor
            if absent is not None:
                terms.masked_fill_(absent[:, band], float("-inf"))
            log_norm[j, k] = terms.logsumexp(1)
            log_mass[j, k] = terms.masked_fill_(~match[:, band], float("-inf")).logsumexp(1)
        if j:
            torch.logaddexp(log_norm[j], log_norm[j - 1], out=log_norm[j])
            torch.logaddexp(log_mass[j], log_mass[j - 1], out=log_mass[j])
        near = far


def _fake(hidden, next_ids, memory, memory_ids, start, theta, window):
    shape = (len(window), len(theta), hidden.shape[0])
    return tuple(hidden.new_empty(shape, dtype=_state_dtype(hidden)) for _ in range(2))


_lib.reference("cache_attention", _blocked)
_lib.fake("cache_attention", _fake)


def cache_attention(
    hidden: torch.Tensor,
    next_ids: torch.Tensor,
    *,
    theta: float | Sequence[float],
    window: int | Sequence[int],
    memory: tuple[torch.Tensor, torch.Tensor] | None = None,
    start: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score a stream with the continuous cache: the weight on the next word, and on all words, in each row's window.

    Any split of a stream gives the same result, when each call gets the rows before it as `memory`.

    Args:
        hidden: `[N, D]`, the hidden state after each word; float32, bfloat16, float16 or float64.
        next_ids: `[N]` int64 or int32, the word that followed each state. Compared, never used as an index; they must
            fit in 32 bits, which is checked on the CPU.
        theta: flatness, one number or several, in [0, 1e30); 0 counts words.
        window: how many pairs a row looks back on at most, one number or several, >= 1.
        memory: `(hidden [M, D], next_ids [M])`, the rows before the first one of this call, oldest first.
        start: `[N]` int64 or int32, the oldest position that each row may see (the beginning of its document, say).
            Position 0 is the first row of this call, -1 the last row of `memory`.
        impl: `"auto"`, `"reference"`, `"cpu"`, `"cuda"` or `"triton"`.

    Returns:
        `(log_mass, log_norm)`, each `[n_windows, n_thetas, N]` float32 (float64 for float64 input), in the order of the
        arguments: log of the summed weights of the pairs with row t's next word, and of all pairs. The cache gives the
        next word the probability `exp(log_mass - log_norm)`; where `log_norm` is -inf the window was empty. Rows that
        see a NaN, or an infinity that some implementation multiplies to one, are NaN.

    Raises:
        ValueError: wrong shape, theta or window, ids beyond 32 bits, or an input that requires a gradient:
            there is none.
        TypeError: wrong dtype or device. RuntimeError: `impl` is not installed.
    """
    thetas = [_checks.theta(x) for x in _several("theta", theta)]
    windows = [_window(x) for x in _several("window", window)]
    _check_rows("hidden", hidden, "next_ids", next_ids)
    N, D = hidden.shape
    memory_hidden, memory_ids = (None, None) if memory is None else memory
    if memory is not None:
        _check_rows("memory[0]", memory_hidden, "memory[1]", memory_ids)
        _checks.same("memory[0]", memory_hidden, "hidden", hidden)
        _checks.shape("memory[0]", memory_hidden, M=len(memory_hidden), D=D)
        memory_hidden, memory_ids = memory_hidden[-max(windows) :], memory_ids[-max(windows) :].long()
    if start is not None:
        _checks.ids("start", start)
        _checks.same("start", start, "hidden", hidden, dtype=False)
        _checks.shape("start", start, N=N)
        start = start.long()
    chosen = _lib.resolve("cache_attention", impl, hidden)
    function = reference if chosen == "reference" else _lib.kernel("cache_attention", chosen)
    ascending = sorted(set(windows))
    result = function(hidden, next_ids.long(), memory_hidden, memory_ids, start, thetas, ascending)
    if windows == ascending:
        return result
    # not by a tensor of indices, which the host would wait to copy to a GPU
    return tuple(torch.stack([x[ascending.index(window)] for window in windows]) for x in result)


def _several(name, value) -> list:
    values = [value] if isinstance(value, Real) else list(value)
    if not values:
        raise ValueError(f"{name} must be a number or a sequence of numbers, got an empty sequence")
    return values


def _window(value) -> int:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"window must be an integer >= 1, got {value}")
    return min(int(value), _LONGEST)


def _check_rows(name, x, ids_name, ids):
    _checks.floating(name, x)
    _checks.ids(ids_name, ids)
    _checks.same(ids_name, ids, name, x, dtype=False)
    rows, _ = _checks.dims(name, x, "ND")
    _checks.shape(ids_name, ids, N=rows)
    _checks.within(ids_name, ids, -(2**31), 2**31, "32 bits")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient, the cache has none: use torch.no_grad()")
