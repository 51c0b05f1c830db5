"""The operators: each a file with its mathematics, reference, adjoint and public function."""

from fastlm import _lib
from fastlm.ops.adaptive_softmax import adaptive_softmax
from fastlm.ops.cache_attention import cache_attention
from fastlm.ops.cache_distribution import cache_distribution
from fastlm.ops.dropconnect import dropconnect, dropconnect_mask
from fastlm.ops.embedding_dropout import embedding_dropout
from fastlm.ops.forget_mult import forget_mult
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.locked_dropout import locked_dropout
from fastlm.ops.lstm import lstm
from fastlm.ops.qrnn_pool import qrnn_pool

__all__ = [
    "adaptive_softmax",
    "cache_attention",
    "cache_distribution",
    "dropconnect",
    "dropconnect_mask",
    "embedding_dropout",
    "forget_mult",
    "linear_cross_entropy",
    "locked_dropout",
    "lstm",
    "qrnn_pool",
    "which",
]


def which(op, *args, impl: str = "auto") -> str:
    """The implementation that would serve a call.

    Args:
        op: a public operator or its name. args: the tensors of the call; device and dtype of the first one decide.
        impl: what the call would ask for.

    Returns:
        `"reference"`, `"cpu"`, `"triton"`, `"cuda"` or `"aten"`.

    Raises:
        ValueError: unknown operator. RuntimeError, TypeError: a named `impl` that cannot serve.
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in _lib.ops:
        raise ValueError(f"unknown operator {name!r}; there are {', '.join(sorted(_lib.ops))}")
    chosen = _lib.resolve(name, impl, args[0])
    return "reference" if chosen == "fallback" else chosen
