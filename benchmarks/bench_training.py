"""One whole training step by the recipes of the Penn Treebank: every regulariser, clipping, optimiser, state kept.

Ours is the package's model and NT-ASGD; the competitor is awd-lstm-lm's system in plain PyTorch (`awd_plain.py`) with
PyTorch's SGD or ASGD. 16-bit steps run the forward pass under autocast, as one does with plain PyTorch. The check
compares loss and gradients with the package's own reference in float64: ours with every mask on, drawn from the same
seeds, the competitor, whose masks are its own, without masks. It reads the first steps of the window only: float64
takes long, and the operators are checked over whole windows in their own benchmarks.
"""

import contextlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from awd_plain import PlainAWD
from cases import DTYPES, Case, Contender, Target, Work

from fastlm import _lib
from fastlm.models import LanguageModel, detach_state
from fastlm.optim import NTASGD
from fastlm.training import load_recipe

RIVAL = "awd-lstm-lm in plain PyTorch"
CHECKED = 10
MASKS = ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout", "zoneout")


def work(device, *, recipe, dtype, averaging=False, settings=None, V=10_000, T=70):
    recipe = load_recipe(recipe, settings)
    config, B = recipe.model_config(V), recipe.batch_size
    bare = replace(config, **dict.fromkeys(MASKS, 0.0))
    form = DTYPES[dtype]

    def context():
        return torch.autocast(device, form) if form is not torch.float32 else contextlib.nullcontext()

    model, plain = LanguageModel(config).to(device), PlainAWD(config).to(device)
    parameters = dict(lr=recipe.lr, weight_decay=recipe.weight_decay)
    ours = NTASGD(model.parameters(), **parameters)
    if averaging:
        ours.start_averaging()
        theirs = torch.optim.ASGD(plain.parameters(), **parameters, t0=0, lambd=0.0)
    else:
        theirs = torch.optim.SGD(plain.parameters(), **parameters)
    start = [p.detach().clone() for p in model.parameters()]
    state = {"ours": model.init_state(B), "theirs": plain.start(B)}

    def fast(tokens, targets):
        with context():
            out = model.loss(tokens, targets, state["ours"])
        out.loss.backward()
        ours.step(lr_scale=1.0, clip=recipe.clip)
        state["ours"] = detach_state(out.state)
        return results(model, ours)

    def rival(tokens, targets):
        with context():
            loss, _, after = plain.loss(tokens, targets, state["theirs"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), recipe.clip)
        theirs.step()
        state["theirs"] = after
        return results(plain, theirs)

    def gradients(make, config, loss, kind, reference=False):
        """Loss and gradients of a fresh model with the weights from before the first step."""

        def run(tokens, targets):
            own = make(config).to(device, kind)
            with torch.no_grad():
                torch._foreach_copy_(list(own.parameters()), start)
            torch.manual_seed(1)
            with _only_reference() if reference else contextlib.nullcontext():
                with context() if kind is torch.float32 else contextlib.nullcontext():
                    value = loss(own, tokens[:CHECKED], targets[:CHECKED])
                return value.detach(), *torch.autograd.grad(value, list(own.parameters()))

        return run

    def of_ours(own, tokens, targets):
        return own.loss(tokens, targets, own.init_state(B)).loss

    def of_theirs(own, tokens, targets):
        return own.loss(tokens, targets, own.start(B))[0]

    double, single = torch.float64, torch.float32
    return Work(
        lambda: tuple(torch.randint(V, (T, B), device=device) for _ in range(2)),
        [
            Contender("fastlm", fast, gradients(LanguageModel, config, of_ours, single)),
            Contender(
                RIVAL,
                rival,
                gradients(PlainAWD, bare, of_theirs, single),
                gradients(LanguageModel, bare, of_ours, double, reference=True),
                gradients(LanguageModel, bare, of_ours, single, reference=True),
            ),
        ],
        exact=gradients(LanguageModel, config, of_ours, double, reference=True),
        plain=gradients(LanguageModel, config, of_ours, single, reference=True),
        # every weight but the embedding's goes through three products, and so does that one as the decoder's
        flops=6.0 * T * B * sum(p.numel() for p in model.parameters() if p.dim() == 2),
        profiled=True,
        ahead=False,
    )


def results(model, optimizer):
    """The gradients, which leave the model, so that the next step makes its own."""
    found = [p.grad for p in model.parameters()]
    optimizer.zero_grad(set_to_none=True)
    return found


@contextlib.contextmanager
def _only_reference():
    before, _lib.DEFAULT_IMPL = _lib.DEFAULT_IMPL, "reference"
    try:
        yield
    finally:
        _lib.DEFAULT_IMPL = before


def case(title, recipe, dtype, **options):
    making = {key: options.pop(key) for key in ("averaging", "settings", "V", "T") if key in options}
    return Case("training", f"{title} {dtype}", partial(work, recipe=recipe, dtype=dtype, **making), dtype, **options)


TINY = dict(settings=dict(embedding_size=6, hidden_size=8, batch_size=3), V=30, T=5, size="tiny")
CASES = [
    case(
        "AWD-LSTM 3 x 1150, V=10,000 B=20 T=70, SGD,",
        "ptb-lstm",
        dtype,
        size="quick",
        targets={"cpu": (Target(RIVAL, ratio=ratio),), "cuda": (Target(RIVAL, ms=2.5),)},
    )
    for dtype, ratio in (("fp32", 1.7), ("bf16", 3.0))
]
CASES += [
    case("AWD-QRNN 4 x 1550, V=10,000 B=20 T=70, SGD,", "ptb-qrnn", "fp32", size="quick"),
    case("AWD-QRNN 4 x 1550, V=10,000 B=20 T=70, SGD,", "ptb-qrnn", "bf16"),
    case("AWD-LSTM 3 x 1150, V=10,000 B=20 T=70, averaged SGD,", "ptb-lstm", "fp32", averaging=True),
    case("AWD-LSTM 3 x 8, SGD,", "ptb-lstm", "fp32", **TINY),
    case("AWD-LSTM 3 x 8, averaged SGD,", "ptb-lstm", "fp32", averaging=True, **TINY),
    case("AWD-QRNN 4 x 8, SGD,", "ptb-qrnn", "fp32", **TINY),
    case("AWD-LSTM 3 x 8, SGD,", "ptb-lstm", "bf16", **TINY),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training(case, measured):
    measured(case)
