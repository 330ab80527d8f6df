"""Epochs of training: steps taken one by one, or captured and replayed."""

import math
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bbits.inference.batches import Check, batch_source
from pyro_bbits.inference.captured import REHEARSALS, CapturedEpochs, frozen_in
from pyro_bbits.inference.checks import BatchCheck, NonFiniteError, check_signs, first_nonfinite
from pyro_bbits.inference.distributed import Ranks
from pyro_bbits.inference.evaluation import to_device
from pyro_bbits.inference.execution import Execution
from pyro_bbits.inference.graphs import Graphs
from pyro_bbits.inference.norms import RecentBatches, tracked_norms
from pyro_bbits.inference.objective import elbo_module, parameter_groups
from pyro_bbits.inference.progress import Reporter
from pyro_bbits.inference.recipe import Optimizers, Recipe
from pyro_bbits.inference.step import TrainingStep
from pyro_bbits.models import AbstractModel

__all__ = ["NORM_SAMPLES", "Epochs"]

Batches = Iterable[tuple[Any, Tensor]]

NORM_SAMPLES = 1024
"""Training samples behind the batch norms' statistics for the decided gates: the last of each epoch."""

DISTRIBUTED_REHEARSALS = 11
"""Steps before the first one is captured; DistributedDataParallel arranges its buckets in the first ten."""


class Epochs:
    """The epochs of one call of :func:`fit`: objective, optimizers, and how steps are taken.

    Arguments:
        model: The model.
        guide: Its guide.
        train: Batches `(x, y)`.
        recipe: Optimizers, rates and schedule.
        epochs: Length of the run.
        ranks: The processes of the run.
        options: How steps are computed.

    Attributes:
        steps: Steps of an epoch.
        recent: The last batches of the last epoch.

    Raises:
        ValueError: If processes have different numbers of batches.
    """

    def __init__(
        self,
        model: AbstractModel,
        guide: nn.Module,
        train: Iterable[Any],
        recipe: Recipe,
        epochs: int,
        ranks: Ranks,
        options: Execution,
    ) -> None:
        self.model, self.guide, self.train, self.ranks, self.options = model, guide, train, ranks, options
        self.elbo = elbo_module(model, guide)
        self.steps = len(train)  # type: ignore[arg-type]
        if len(set(ranks.shares(self.steps))) > 1:
            raise ValueError(f"every process needs the same number of batches; got {ranks.shares(self.steps)}.")
        self.optimizers = Optimizers(recipe, parameter_groups(model, guide), epochs, self.steps)
        graphs = options.graphs(ranks, train)
        with nullcontext() if graphs is None else graphs.working():  # gradients arrive on the stream that wraps
            self.objective = ranks.wrap(self.elbo)
        self.step = TrainingStep(self.objective, self.optimizers, ranks, model.num_data, options.precision)
        self.check, self.length, self._prepared = BatchCheck(model), epochs * self.steps, False
        self.captured = None if graphs is None else self._captured(graphs)
        self.recent: Batches = RecentBatches(0)

    def epoch(self, epoch: int, report: Reporter) -> float:
        """Train for an epoch; returns the mean loss."""
        self._train_mode()
        self._tell_epoch(epoch)
        if self.captured is not None:
            check = None if self._prepared else self._look_at_captured()
            loss = self.captured.epoch(epoch, check, report)
            self.recent = self.captured.source.recent()
        else:
            loss = self._epoch_by_hand(epoch, report)
        self.ranks.share_buffers(self.elbo)
        return loss

    def close(self) -> None:
        """Let go of what is held for training only."""
        if self.captured is not None:
            self.captured.close()

    @property
    def _together(self) -> int:
        """How many batches the statistics of norms take at a time, in float32: a bf16 step has memory for one."""
        return 1 if self.options.precision == "bf16" else 2

    def _captured(self, graphs: Graphs) -> CapturedEpochs:
        order = torch.channels_last if self.options.channels_last(self.model) else None
        return CapturedEpochs(
            self.step,
            batch_source(self.train, self.ranks.device, NORM_SAMPLES // self.ranks.size, order, self._together),
            graphs,
            self.ranks.device,
            explain=lambda x: first_nonfinite(self.model, self.guide, x),
            granted=lambda: frozen_in(self.elbo),
            required=self.options.capture is True,
            rehearsals=DISTRIBUTED_REHEARSALS if self.ranks.several else REHEARSALS,
        )

    def _epoch_by_hand(self, epoch: int, report: Reporter) -> float:
        self.recent = held = RecentBatches(NORM_SAMPLES // self.ranks.size, self._together)
        holding = bool(tracked_norms(self.model))
        total, steps = 0.0, 0
        for index, (x, y) in enumerate(self.train):
            if holding:
                held.add(x, y)
            x, y = to_device(x, self.ranks.device), y.to(self.ranks.device)
            self._prepare(x)
            value = self._step(x, y, epoch, index)
            total, steps = total + value, steps + 1
            report(None, value)
        return total / steps

    def _prepare(self, x: Any) -> None:
        """Decide, before the first step of this run, whether the network is compiled."""
        if not self._prepared:
            self._prepared = True
            self.step.compiled = self.options.compiled(self.model, x, self.length)

    def _train_mode(self) -> None:
        self.objective.train()
        if self.options.freeze_norms:
            for norm in tracked_norms(self.model).values():
                norm.eval()

    def _tell_epoch(self, epoch: int) -> None:
        """Samplers such as DistributedSampler have an order for each epoch, but do not count."""
        set_epoch = getattr(getattr(self.train, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def _step(self, x: Any, y: Tensor, epoch: int, index: int) -> float:
        error = self._problem(x, y, first=index == 0) if epoch == 0 else None
        shares = self.ranks.shares(len(y), error)
        loss = self.step.loss(x, y, len(y) * len(shares) / sum(shares))
        value = self.ranks.mean(loss.detach()).item()
        if not math.isfinite(value):
            raise NonFiniteError.at(value, epoch, index, first_nonfinite(self.model, self.guide, x))
        self.optimizers.step(loss, epoch, index)
        if len(set(shares)) > 1:  # dropout may have drawn more numbers here than there
            self.ranks.share_generators()
        return value

    def _problem(self, x: Any, y: Tensor, first: bool) -> Exception | None:
        try:
            self._check(x, y, first)
        except (ValueError, TypeError) as error:
            return error
        return None

    def _look_at_captured(self) -> Check:
        """Checks the batches of the first epoch, before the steps are taken."""
        first = True

        def look(x: Any, y: Tensor) -> None:
            nonlocal first
            self._prepare(x)
            self.ranks.shares(len(y), self._problem(x, y, first))
            first = False

        return look

    def _check(self, x: Any, y: Tensor, first: bool) -> None:
        self.check(x, y)
        if first and (names := check_signs(self.model, x)):
            warnings.warn(
                f"negative values reach the unsigned quantizers of {', '.join(names)} and are clipped to zero; "
                "give quantize() example inputs that show them.",
                stacklevel=7,
            )
