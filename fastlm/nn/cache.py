"""The continuous cache: a model's own recent past as a second predictor, at test time only.

Grave, Joulin and Usunier, arXiv 1612.04426. With h_i the hidden state after word x_i, over the last W pairs

    p_cache(w | t) ~ sum_i exp(theta h_t . h_i) [x_{i+1} = w];   p = (1 - lambda) p_model + lambda p_cache

A row never sees its own next word. Where the past is empty the model stands alone.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm import ops
from fastlm.ops import _checks

THETAS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2)
WINDOWS = (100, 200, 500, 1000, 2000, 4000)


class CacheState(NamedTuple):
    """The past of a stream that is scored in pieces.

    Attributes:
        hidden: `[M, D]`, the last hidden states, at most `window`, oldest first. next_ids: `[M]`, the next words.
        seen: how many pairs the stream has had so far.
    """

    hidden: Tensor
    next_ids: Tensor
    seen: int


class CacheRing(NamedTuple):
    """The past of a batch of streams that grow word by word; rows may be copied and permuted freely, as a beam does.

    Attributes:
        keys: `[B, W, D]`. ids: `[B, W]`. hidden: `[B, D]`, the last hidden states, whose next words are not known yet.
        seen: how many pairs each stream has had so far.
    """

    keys: Tensor
    ids: Tensor
    hidden: Tensor
    seen: int


class CacheResult(NamedTuple):
    """One line of a tuning table: the settings, lambda at its best, and the perplexity."""

    theta: float
    window: int
    lambda_: float
    ppl: float


class CacheTuning(NamedTuple):
    """The best settings on the text given, their perplexity, and all results, a line per window and theta."""

    theta: float
    lambda_: float
    window: int
    ppl: float
    table: tuple[CacheResult, ...]


class NeuralCache(torch.nn.Module):
    """The neural cache behind any model that gives a hidden state per word.

    The state is explicit, passed in and out; the state dict holds the settings.

    Args:
        theta: flatness, in [0, 1e30). lambda_: weight of the cache, in [0, 1]. window: pairs to look back on, >= 1.
        compat: `"awd-lstm-lm"` leaves the cache out until more than `window` pairs lie behind, as that code does.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, theta: float, lambda_: float, window: int, *, compat: str | None = None):
        super().__init__()
        if compat not in (None, "awd-lstm-lm"):
            raise ValueError(f"compat must be None or 'awd-lstm-lm', got {compat!r}")
        self.compat = compat
        self._set(theta, lambda_, window)

    def _set(self, theta, lambda_, window):
        if window != int(window) or window < 1:
            raise ValueError(f"window must be an integer >= 1, got {window}")
        self.theta = _checks.theta(theta)
        self.lambda_ = _checks.probability("lambda_", lambda_)
        self.window = int(window)

    def get_extra_state(self) -> Tensor:
        """`[theta, lambda, window]` in float64, a tensor so that any format can hold it."""
        return torch.tensor([self.theta, self.lambda_, self.window], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes what `get_extra_state` gave."""
        self._set(*state.tolist())

    def extra_repr(self) -> str:
        compat = f", compat={self.compat!r}" if self.compat else ""
        return f"theta={self.theta}, lambda_={self.lambda_}, window={self.window}{compat}"

    @torch.no_grad()
    def score(
        self, hidden: Tensor, next_ids: Tensor, nll: Tensor, state: CacheState | None = None
    ) -> tuple[Tensor, CacheState]:
        """The loss of the mixture on the next piece of a stream; any split of the stream gives the same.

        Args:
            hidden: `[N, D]`, the model's hidden state after each word. next_ids: `[N]`, the word that followed.
            nll: `[N]`, the model's negative log probability of that word, in nats.
            state: what the call before returned; a new stream if absent.

        Returns:
            `(nll [N], state)`: of the mixture, in nats, float64.

        Raises:
            ValueError: a shape does not fit. TypeError: a dtype or device does not fit.
        """
        log_cache, empty = self._log_cache(hidden, next_ids, nll, state, self.theta, self.window)
        model = -nll.double()
        mixture = torch.logaddexp(_log(1 - self.lambda_) + model, _log(self.lambda_) + log_cache[0, 0])
        past = [(hidden, next_ids)] if state is None else [(state.hidden, state.next_ids), (hidden, next_ids)]
        hidden, next_ids = (torch.cat(parts)[-self.window :].clone() for parts in zip(*past, strict=True))
        seen = len(nll) + (state.seen if state else 0)
        return -torch.where(empty[0], model, mixture), CacheState(hidden, next_ids, seen)

    def _log_cache(self, hidden, next_ids, nll, state, theta, window):
        """`log p_cache [windows, thetas, N]` of the next words in float64, and where there is none, `[windows, N]`."""
        _checks.shape("nll", nll, N=len(hidden))
        memory = None if state is None else (state.hidden, state.next_ids)
        log_mass, log_norm = ops.cache_attention(hidden, next_ids, theta=theta, window=window, memory=memory)
        empty = log_norm[:, 0] == -math.inf
        if self.compat:
            windows = torch.as_tensor(window, device=nll.device).reshape(-1, 1)
            behind = torch.arange(len(nll), device=nll.device) + (state.seen if state else 0)
            empty = empty | (behind <= windows)
        return log_mass.double() - log_norm.double(), empty

    @torch.no_grad()
    def step(
        self, hidden: Tensor, ids: Tensor, log_probs: Tensor, state: CacheRing | None = None
    ) -> tuple[Tensor, CacheRing]:
        """The mixture's distribution of the next word, while generating.

        Args:
            hidden: `[B, D]`, the hidden states after reading `ids`. ids: `[B]`, the words just read: they followed the
                hidden states of the step before, and so enter the cache now.
            log_probs: `[B, V]`, the model's log probabilities of the next word.
            state: what the step before returned; empty caches if absent.

        Returns:
            `(log_probs [B, V], state)`: of the mixture, in float32.

        Raises:
            ValueError: a shape does not fit. TypeError: a dtype or device does not fit.
        """
        B, D = _checks.dims("hidden", hidden, "BD")
        _checks.shape("ids", ids, B=B)
        if log_probs.dim() != 2 or len(log_probs) != B:
            raise ValueError(f"log_probs must have shape [B, V] with B = {B}, got {list(log_probs.shape)}")
        if state is None:
            keys, words = hidden.new_zeros(B, self.window, D), ids.new_zeros(B, self.window)
            return log_probs.float(), CacheRing(keys, words, hidden.clone(), 0)
        _checks.shape("state.keys", state.keys, B=B, W=self.window, D=D)
        keys, words, slot, seen = state.keys.clone(), state.ids.clone(), state.seen % self.window, state.seen + 1
        keys[:, slot], words[:, slot] = state.hidden, ids
        state = CacheRing(keys, words, hidden.clone(), seen)
        if self.compat and seen <= self.window:
            return log_probs.float(), state
        count = min(seen, self.window)
        cache = ops.cache_distribution(hidden, keys, words, count, log_probs.size(1), theta=self.theta)
        model = _log(1 - self.lambda_) + log_probs.float()
        return torch.logaddexp(model, _log(self.lambda_) + cache.log()), state

    @torch.no_grad()
    def tune(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        nll: Tensor,
        *,
        thetas: Sequence[float] = THETAS,
        windows: Sequence[int] = WINDOWS,
    ) -> CacheTuning:
        """Finds the best settings on one stream, from one pass over its scores, and takes them.

        Every pair of a theta and a window is tried; lambda, in which the loss is convex, is found by Newton's method.

        Args:
            hidden, next_ids, nll: as in `score`, of the validation text.
            thetas, windows: what to try.

        Returns:
            The best settings and the table of all.

        Raises:
            ValueError: a shape or setting does not fit, the text is empty, `hidden` or `nll` holds NaN or infinity, or
                no pair gives a finite perplexity; then the settings stay as they are.
        """
        if not len(nll):
            raise ValueError("nll must hold at least one word, got none")
        for name, x in (("hidden", hidden), ("nll", nll)):
            if not x.isfinite().all():
                raise ValueError(f"{name} must be finite, got NaN or infinity")
        thetas, windows = list(thetas), list(windows)
        log_cache, empty = self._log_cache(hidden, next_ids, nll, None, thetas, windows)
        table = []
        for window, log_ratio, no_cache in zip(windows, log_cache + nll.double(), empty, strict=True):
            # p_mixture / p_model = 1 + lambda (p_cache / p_model - 1); exp(700) is the largest that float64 holds
            excess = torch.where(no_cache, 0.0, torch.expm1(log_ratio.clamp(max=700.0)))
            lambdas = _best_lambda(excess)
            losses = nll.double().mean() - torch.log1p(lambdas.unsqueeze(1) * excess).mean(1)
            for theta, lambda_, ppl in zip(thetas, lambdas.tolist(), losses.exp().tolist(), strict=True):
                table.append(CacheResult(float(theta), int(window), lambda_, ppl))
        finite = [result for result in table if math.isfinite(result.ppl)]
        if not finite:
            raise ValueError("hidden and nll must give a finite perplexity with some theta and window, got none")
        best = min(finite, key=lambda result: result.ppl)
        self._set(best.theta, best.lambda_, best.window)
        return CacheTuning(best.theta, best.lambda_, best.window, best.ppl, tuple(table))


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _best_lambda(excess: Tensor, tolerance: float = 1e-7) -> Tensor:
    """The lambda in [0, 1] that maximises sum log(1 + lambda e) over each row of `excess [K, N]`.

    Newton's method inside a bracket: a step that would leave it halves it instead.
    """
    low, high = excess.new_zeros(len(excess)), excess.new_ones(len(excess))
    # where the slope at 0 is not upwards, the model alone is best
    high = torch.where(excess.sum(1) > 0, high, low)
    x = (low + high) / 2
    for _ in range(60):
        slopes = excess / (1 + x.unsqueeze(1) * excess)
        slope, curvature = slopes.sum(1), slopes.square().sum(1)
        low, high = torch.where(slope > 0, x, low), torch.where(slope < 0, x, high)
        new = x + slope / curvature
        new = torch.where((new > low) & (new < high), new, (low + high) / 2)
        moved = (new - x).abs().max()
        x = new
        if moved < tolerance:
            break
    return x
