"""Non-monotonically triggered averaged SGD (Merity, Keskar and Socher 2017, arXiv 1708.02182, algorithm 1).

Plain SGD runs until the validation loss stops improving; from then on SGD goes on at the same rate and the
mean of its iterates is what is validated and kept. With x_k the parameters after k steps since the switch,

    x_k = x_{k-1} - rate_k (grad + weight_decay x_{k-1}),     average_k = (x_1 + ... + x_k) / k.

The switch is made when the new validation loss is worse than the best of all but the last n (algorithm 1 of
the paper prints this window the other way round; its authors' program and results follow the rule above).

`lag="awd-lstm-lm"` reproduces that program, which used `torch.optim.ASGD(t0=0, lambd=0)`. Two things
differ there: the rate of a step is the one asked for in the step before it (the first step uses its own), and
the first iterate is left out, average_k = (x_2 + ... + x_k) / (k - 1) for k > 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class NonMonotone:
    """Tells when a validation loss has stopped improving.

    Args:
        n: how many of the latest losses the comparison leaves out; at least 0.
    """

    def __init__(self, n: int = 5):
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        self.n = n
        self.log: list[float] = []

    def observe(self, loss: float) -> bool:
        """Compares `loss` with the best one seen more than `n` calls ago, then adds it to the log."""
        worse = len(self.log) > self.n and loss > min(self.log[: len(self.log) - self.n])
        self.log.append(float(loss))
        return worse


class NTASGD(torch.optim.Optimizer):
    """SGD that starts to average its iterates once the validation loss stops improving.

    Give it every parameter that is trained, those of the output layer too. A step is a constant number of
    multi-tensor calls, one pass over parameters and gradients where PyTorch has a fused one; nothing is read back from
    the device.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, greater than 0.
        n: how many epochs the trigger looks past (`nonmono` in the authors' program).
        weight_decay: L2 penalty added to the gradient, of every parameter.
        lag: `None`, or `"awd-lstm-lm"` for the late rate and the shorter average of that program.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        n: int = 5,
        weight_decay: float = 0.0,
        lag: str | None = None,
    ):
        if not lr > 0:
            raise ValueError(f"lr must be greater than 0, got {lr}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        if lag not in (None, "awd-lstm-lm"):
            raise ValueError(f'lag must be None or "awd-lstm-lm", got {lag!r}')
        self.trigger = NonMonotone(n)
        self.lag = lag
        self.averaging = False
        self.averaged_steps = 0
        self._late_scale: float | None = None
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def observe(self, valid_loss: float) -> bool:
        """Notes the validation loss of an epoch; returns True when this one starts the averaging.

        Once averaging has started the losses are no longer noted and the answer is always False.
        """
        if self.averaging or not self.trigger.observe(valid_loss):
            return False
        self.start_averaging()
        return True

    def start_averaging(self) -> None:
        """Averages from the next step on, whatever the validation losses (finetuning starts like this)."""
        self.averaging = True

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Tensor] | None = None, *, lr_scale: float = 1.0, clip: float = 0.0
    ) -> Tensor | None:
        """Makes one step at `lr_scale` times the learning rate of each group.

        Args:
            closure: computes the gradients anew and returns the loss, which is handed back.
            lr_scale: for windows of varying length, the length over the nominal one.
            clip: the gradients are scaled down to this norm of all of them together, as by
                `torch.nn.utils.clip_grad_norm_`, before the weight decay; 0: they are taken as they are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = lr_scale
        if self.averaging and self.lag:
            scale = lr_scale if self._late_scale is None else self._late_scale
            self._late_scale = lr_scale
        if not clip >= 0:
            raise ValueError(f"clip must be at least 0, got {clip}")
        divisor = self._divisor(clip) if clip else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for same in _by_kind(params):
                _sgd(same, group["lr"] * scale, group["weight_decay"], divisor)
        if self.averaging:
            self._update_average()
        return loss

    def _divisor(self, clip: float) -> Tensor:
        """What the gradients must be divided by for a norm of at most `clip`; at least 1."""
        grads = [p.grad for p in self._params() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        return ((norm.float() + 1e-6) / clip).clamp(min=1.0)

    def _update_average(self) -> None:
        self.averaged_steps += 1
        used = self.averaged_steps - 1 if self.lag else self.averaged_steps
        params = self._params()
        for p in params:
            if p not in self.state:
                # A running mean in 16 bits stands still after a few hundred steps.
                dtype = torch.promote_types(p.dtype, torch.float32)
                self.state[p]["average"] = p.detach().to(dtype, copy=True)
        averages = [self.state[p]["average"] for p in params]
        current = [p.to(a.dtype) for p, a in zip(params, averages, strict=True)]
        if used <= 1:
            torch._foreach_copy_(averages, current)
        else:
            torch._foreach_lerp_(averages, current, 1.0 / used)

    @contextmanager
    def average(self) -> Iterator[None]:
        """Puts the averages into the parameters for the length of the block and restores them after it.

        Before the first averaged step the parameters stay as they are. Do not call `step` inside the block.
        """
        params = [p for p in self._params() if p in self.state]
        kept = [p.detach().clone() for p in params]
        try:
            with torch.no_grad():
                if params:
                    torch._foreach_copy_(params, [self.state[p]["average"] for p in params])
            yield
        finally:
            with torch.no_grad():
                if params:
                    torch._foreach_copy_(params, kept)

    def state_dict(self) -> dict[str, Any]:
        """All that decides the following steps: `state` holds the tensors, the rest is plain JSON."""
        own = {
            "averaging": self.averaging,
            "averaged_steps": self.averaged_steps,
            "late_scale": self._late_scale,
            "log": list(self.trigger.log),
            "n": self.trigger.n,
            "lag": self.lag,
        }
        return {**super().state_dict(), "ntasgd": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: the state belongs to another optimiser or to other parameter groups.
        """
        if "ntasgd" not in state_dict:
            raise ValueError("state_dict is not one of NTASGD: it has no entry 'ntasgd'")
        own = state_dict["ntasgd"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "ntasgd"})
        # torch casts the state to the dtype of the parameter: fp32 averages of 16-bit ones would be rounded.
        for i, p in enumerate(self._params()):
            saved = state_dict["state"].get(i)
            if saved is not None:
                self.state[p]["average"] = saved["average"].to(p.device, copy=True)
        self.trigger.n = own["n"]
        self.trigger.log = list(own["log"])
        self.lag = own["lag"]
        self.averaging = own["averaging"]
        self.averaged_steps = own["averaged_steps"]
        self._late_scale = own["late_scale"]

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def _fusible(p: Tensor) -> bool:
    """Whether PyTorch's fused kernel may have it: it ignores strides, and on a CPU gets 16-bit weight decay wrong."""
    return (
        p.device.type in ("cpu", "cuda")
        and p.dtype in (torch.float32, torch.float64)
        and p.grad.layout == torch.strided
        and p.is_contiguous()
        and p.grad.is_contiguous()
        and p.grad.dtype == p.dtype
    )


def _by_kind(params: list[Tensor]) -> list[list[Tensor]]:
    """The parameters in lists of one device and dtype, those for the fused kernel apart."""
    lists: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for p in params:
        lists.setdefault((p.device, p.dtype, _fusible(p)), []).append(p)
    return list(lists.values())


def _sgd(params: list[Tensor], rate: float, weight_decay: float, divisor: Tensor | None) -> None:
    """grad := grad / divisor, p := p - rate (grad + weight_decay p)."""
    grads = [p.grad for p in params]
    if divisor is not None:
        divisor = divisor.to(params[0].device)
    if _fusible(params[0]):
        torch._fused_sgd_(
            params,
            grads,
            [],
            weight_decay=weight_decay,
            momentum=0.0,
            lr=rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=True,
            grad_scale=divisor,
        )
        return
    if divisor is not None:
        torch._foreach_div_(grads, divisor)
    if weight_decay != 0:
        grads = torch._foreach_add(grads, params, alpha=weight_decay)
    torch._foreach_add_(params, grads, alpha=-rate)
