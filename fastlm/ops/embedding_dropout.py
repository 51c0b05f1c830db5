"""Embedding dropout: whole words of an embedding dropped, the same ones wherever they stand in a call.

    y_n = w_{id_n} m_{id_n},    m_v = keep_v / (1 - p),        dL/dw_v = m_v sum of dL/dy_n over the n with id_n = v

with keep_v from the mask generator (`fastlm.ops.philox`, stream 3) over the rows of w, and m in the dtype of w. The
row `padding_idx` has no gradient, as in `torch.nn.Embedding`. Gal and Ghahramani, "A Theoretically Grounded
Application of Dropout in Recurrent Neural Networks", arXiv 1512.05287, section 4.2, as in Merity, Keskar and Socher,
arXiv 1708.02182, section 4.3.
"""

import torch

from fastlm import _lib
from fastlm.ops import _checks, philox
from fastlm.ops.dropconnect import dropconnect_mask

_lib.define("embedding_dropout_fwd(Tensor weight, Tensor ids, float p, Tensor seed) -> Tensor")
_lib.define(
    "embedding_dropout_bwd(Tensor grad, Tensor ids, SymInt count, float p, Tensor seed, int padding_idx) -> Tensor"
)
_KERNELS = ("embedding_dropout_fwd", "embedding_dropout_bwd")
_lib.declare("embedding_dropout", triton=_KERNELS)


def _rows(ids, count, p, seed, dtype, masked_by="auto"):
    """The factor [..., 1] of each row looked up."""
    mask = dropconnect_mask((count,), p, seed, stream=philox.EMBEDDING, impl=masked_by)
    return (mask.to(dtype) * philox.scale(p))[ids].unsqueeze(-1)


def reference(
    weight: torch.Tensor,
    ids: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    padding_idx: int | None = None,
    masked_by: str = "reference",
) -> torch.Tensor:
    """The lookup times the mask of its rows, differentiable; the fallback has the mask from its kernel, "auto"."""
    rows = torch.nn.functional.embedding(ids, weight, padding_idx)
    return rows * _rows(ids, len(weight), p, seed, weight.dtype, masked_by)


def _adjoint(grad, ids, count, p, seed, padding_idx):
    rows = grad * _rows(ids, count, p, seed, grad.dtype)
    return torch.ops.aten.embedding_dense_backward(rows, ids, count, padding_idx, False)


_lib.reference("embedding_dropout_fwd", lambda *args: reference(*args, masked_by="auto"))
_lib.reference("embedding_dropout_bwd", _adjoint)
_lib.fake("embedding_dropout_fwd", lambda weight, ids, p, seed: weight.new_empty(*ids.shape, weight.shape[1]))
_lib.fake("embedding_dropout_bwd", lambda grad, ids, count, *_: grad.new_empty(count, grad.shape[-1]))


class _EmbeddingDropout(torch.autograd.Function):
    @staticmethod
    def forward(weight, ids, p, seed, padding_idx, impl):
        return _lib.kernel("embedding_dropout_fwd", impl)(weight, ids, p, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, ids, ctx.p, seed, ctx.padding_idx, ctx.impl = inputs
        ctx.count = len(weight)
        ctx.save_for_backward(ids, seed)

    @staticmethod
    def backward(ctx, grad):
        ids, seed = ctx.saved_tensors
        options = (ctx.count, ctx.p, seed, ctx.padding_idx, ctx.impl)
        return _Adjoint.apply(grad, ids, *options), None, None, None, None, None


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(grad, ids, count, p, seed, padding_idx, impl):
        return _lib.kernel("embedding_dropout_bwd", impl)(grad, ids, count, p, seed, padding_idx)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("embedding_dropout has no second derivative; impl='reference' has")


def embedding_dropout(
    weight: torch.Tensor,
    ids: torch.Tensor,
    p: float,
    seed: torch.Tensor | None = None,
    *,
    padding_idx: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Look up rows of an embedding, of which whole words are dropped and the rest scaled by 1 / (1 - p).

    Args:
        weight: [V, E], float32, bfloat16, float16 or float64. Never modified.
        ids: int64 or int32 of any shape [...], in [0, V).
        p: probability of dropping a word, in [0, 1].
        seed: int64 scalar tensor on the device of `weight`; drawn from PyTorch's default generator when None.
        padding_idx: the word whose row gets no gradient, in [0, V); none when None.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        A new tensor [..., E] in the dtype of `weight`; differentiable (once by the kernels), with a dense gradient.

    Raises:
        TypeError: wrong dtype or device. ValueError: wrong shape, `p` outside [0, 1], ids outside the vocabulary (a
        device assertion on a GPU). RuntimeError: `impl` is not installed.
    """
    _checks.floating("weight", weight)
    count, _ = _checks.dims("weight", weight, "VE")
    _checks.ids("ids", ids)
    _checks.same("ids", ids, "weight", weight, dtype=False)
    _checks.within("ids", ids, 0, count, "the vocabulary")
    p = _checks.probability("p", p)
    if padding_idx is not None and not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx must be an int or None, got {padding_idx!r}")
    if padding_idx is not None and not 0 <= padding_idx < count:
        raise ValueError(f"padding_idx must lie in [0, {count}), the vocabulary, got {padding_idx}")
    chosen = _lib.resolve("embedding_dropout", impl, weight)
    if seed is None:
        seed = philox.draw_seed(weight.device)
    _checks.seed(seed, weight)
    if chosen in ("reference", "fallback"):  # which keeps the mask for the backward pass: quicker than drawing it again
        return reference(weight, ids, p, seed, padding_idx, "reference" if chosen == "reference" else "auto")
    return _EmbeddingDropout.apply(weight, ids, p, seed, -1 if padding_idx is None else padding_idx, chosen)
