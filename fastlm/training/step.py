"""One training step: the loss of a window, its gradients, their mean over the ranks, clipping, the optimiser."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.errors import RecipeError
from fastlm.models import LanguageModel, State, detach_state, join_states, state_columns
from fastlm.ops import philox
from fastlm.optim import NTASGD
from fastlm.training.graphs import Graphs, cuda_capture
from fastlm.training.parallel import Ranks
from fastlm.training.recipe import Recipe


def make_optimizer(recipe: Recipe, model: LanguageModel) -> torch.optim.Optimizer:
    """The optimiser of a recipe, over all parameters of the model."""
    lr, weight_decay = recipe.lr, recipe.weight_decay
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, weight_decay=weight_decay)
    optimizer = NTASGD(model.parameters(), lr, n=recipe.nonmono, weight_decay=weight_decay, lag=recipe.compat or None)
    if recipe.optimizer == "asgd":
        optimizer.start_averaging()
    return optimizer


class TrainStep:
    """Makes the steps of a run.

    Attributes:
        dtype: of the products. graphs: the CUDA graphs that make the gradients, or None.

    Args:
        recipe: its hyper-parameters. model: what is trained. optimizer: that of `make_optimizer`.
        ranks: the processes that train together, each on its own columns of the batch.

    Raises:
        RecipeError: the columns of a rank cannot be shared out evenly, over the ranks or over `recipe.accumulate`.
    """

    def __init__(self, recipe: Recipe, model: LanguageModel, optimizer: torch.optim.Optimizer, ranks: Ranks):
        self.recipe, self.model, self.optimizer, self.ranks = recipe, model, optimizer, ranks
        columns, pieces = ranks.columns(recipe.batch_size), recipe.accumulate
        share = columns.stop - columns.start
        if share % pieces:
            raise RecipeError(f"accumulate must divide the {share} columns of each rank, got {pieces}")
        self.dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
        self._first, self._width = columns.start, share // pieces
        self.graphs = None
        if recipe.cuda_graphs and next(model.parameters()).is_cuda:
            self.graphs = Graphs(model.parameters(), cuda_capture())

    def __call__(
        self, inputs: Tensor, targets: Tensor, state: State | None, lr: float, lr_scale: float
    ) -> tuple[Tensor, State]:
        """Makes a step at `lr_scale` times the rate `lr`.

        Args:
            inputs, targets: `[T, B]`, the columns of this rank; targets may be on the host (see `LanguageModel.loss`).
            state: what the step before returned; None for new streams.
            lr: the learning rate. lr_scale: the length of the window over the nominal one.

        Returns:
            The mean cross entropy over the columns of all ranks in nats, 0-d on the device, and the next state. With
            CUDA graphs the next step overwrites both.
        """
        window = inputs, targets, self.model.init_state(inputs.shape[1]) if state is None else state
        if self.graphs is None:
            self.optimizer.zero_grad()
            nll, state = self._backward(*window)
        else:
            nll, state = self.graphs(self._backward, *window)
        self.ranks.average([*(p.grad for p in self.model.parameters()), nll])
        self._update(lr, lr_scale)
        return nll, state

    def _backward(self, inputs: Tensor, targets: Tensor, state: State) -> tuple[Tensor, State]:
        """Adds the gradient of the mean loss to those of the parameters, one piece of the columns after the other."""
        seeds, pieces, nll, states = philox.SharedSeeds(), self.recipe.accumulate, 0.0, []
        for first in range(0, inputs.shape[1], self._width):
            own = slice(first, first + self._width)
            with seeds, torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                place = {"column": self._first + first, "columns": self.recipe.batch_size}
                out = self.model.loss(inputs[:, own], targets[:, own], state_columns(state, own), **place)
            (out.loss / pieces).backward()
            nll = nll + out.nll / pieces
            states.append(detach_state(out.state))
        return nll, join_states(states)

    def _update(self, lr: float, lr_scale: float) -> None:
        clip, averages = self.recipe.clip, isinstance(self.optimizer, NTASGD)
        # NTASGD is told the scale by itself: under compat it takes that of the window before.
        for group in self.optimizer.param_groups:
            group["lr"] = lr if averages else lr * lr_scale
        if averages:
            self.optimizer.step(lr_scale=lr_scale, clip=clip)
            return
        if clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip, foreach=True)
        self.optimizer.step()
