"""The training loop: SVI on a gated model with ordinary PyTorch optimizers."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import pyro
from torch import Tensor, nn

from pyro_bbits.gates import DecisionRule
from pyro_bbits.inference.checkpoint import Checkpoint, Checkpoints, TrainingState, describe_run
from pyro_bbits.inference.checks import (
    NonFiniteError,
    check_batch,
    check_guide,
    check_loader,
    check_num_data,
    check_precision,
    check_signs,
    check_validation,
    first_nonfinite,
)
from pyro_bbits.inference.distributed import Ranks
from pyro_bbits.inference.evaluation import device_of, to_device
from pyro_bbits.inference.guides import AbstractGateGuide
from pyro_bbits.inference.history import EpochRecord, History
from pyro_bbits.inference.norms import RecentBatches, set_norm_statistics, tracked_norms
from pyro_bbits.inference.objective import elbo_module, parameter_groups
from pyro_bbits.inference.progress import Reporter, report_progress
from pyro_bbits.inference.recipe import FINE_TUNING, Optimizers, Recipe
from pyro_bbits.inference.recorder import Recorder
from pyro_bbits.models import AbstractModel

__all__ = ["fine_tune", "fit"]

Loader = Iterable[Any]
Resume = Literal["auto"] | bool

NORM_SAMPLES = 1024
"""Training samples behind the batch norms' statistics for the decided gates: the last of each epoch."""


def fit(
    model: AbstractModel,
    guide: nn.Module,
    train: Loader,
    validation: Loader | None = None,
    *,
    epochs: int = 20,
    recipe: Recipe | None = None,
    rule: DecisionRule = "map",
    seed: int | None = None,
    progress: bool = True,
    title: str = "training",
    on_epoch: Callable[[EpochRecord], object] | None = None,
    checkpoints: Checkpoints | None = None,
    resume: Resume = False,
    freeze_norms: bool = False,
) -> History:
    r"""Maximize the ELBO over weights, ranges and gates, and record every epoch.

    The loss is :class:`~pyro.infer.TraceMeanField_ELBO` of model and guide divided by the number of data points, in
    nats per sample; one gate sample per step. Weights, gates and ranges have an optimizer each. Start from pretrained
    weights by loading them into the network before it is quantized.

    Batch norms: training collects their running statistics under drawn gates. For the evaluation after each epoch they
    are estimated anew for the decided gates, on the last training samples of the epoch
    (:func:`~pyro_bbits.inference.recalibrate_norms`), and put back; those of the last epoch stay in the network.

    Checkpoints: a run that goes on from one gives the numbers of a run that was never interrupted, bit for bit on one
    CPU. The order of batches follows where the loader has `set_epoch` (:class:`~pyro_bbits.data.TensorLoader`) or draws
    from PyTorch's global generator or one of its own (`generator`), as :class:`~torch.utils.data.DataLoader` does; what
    worker processes draw follows too, unless they are persistent. Other sources of randomness are not known here.

    Several processes: if PyTorch's default process group is initialized, each process calls `fit` with its own part of
    every batch and the same model; gates are drawn alike, gradients are those of the whole batch, and `num_data` stays
    that of the whole data set. Every process evaluates all of `validation`; rank 0 alone shows progress and writes
    checkpoints, from which all read. Batch norms normalize by the part of the batch that their process has; statistics
    for the decided gates are averaged. :class:`~torch.nn.SyncBatchNorm` needs GPUs, and is not gated.

    Arguments:
        model: A :class:`~pyro_bbits.models.GatedModel` or :class:`~pyro_bbits.models.PlainModel`, on its device.
        guide: Its guide; :class:`~pyro_bbits.inference.EmptyGuide` for a plain model.
        train: Batches `(x, y)`, with a length. Use shuffled ones.
        validation: Held-out batches, evaluated after every epoch with hard gates; checked before the first.
        epochs: Passes over the training data.
        recipe: Optimizers, rates and schedule; the paper's by default.
        rule: How gates are decided for evaluation; see :func:`~pyro_bbits.gates.decide`.
        seed: Seed of gates, dropout and whatever else draws from the global generators; None leaves them alone.
        progress: Show a progress bar and a line for some epochs.
        title: What to call the run there.
        on_epoch: Called with the record of each epoch, in every process.
        checkpoints: Where to keep the state of the run, and how often; None keeps none.
        resume: Go on from the last checkpoint: True demands one, `"auto"` takes one if there is any, False starts anew
            and refuses a folder that holds some. A finished run is loaded, and not trained again.
        freeze_norms: Keep batch norms in evaluation mode: running statistics are used, and stay what they are.

    Returns:
        The history of the run, from its first epoch. Model and guide are trained in place.

    Raises:
        TypeError: If a loader has no length.
        ValueError: If settings are wrong, before any training; or if data or labels are, before the step that would
            use them (each batch of the first epoch is checked).
        NonFiniteError: If the loss becomes NaN or infinite; it names the first offender.
    """
    _check_settings(model, guide, train, validation, epochs)
    check_num_data(model, train)
    found, recipe, ranks = _find(checkpoints, resume), recipe or Recipe(), Ranks(device_of(model))
    recorder = Recorder(model, guide, validation, rule, ranks)
    if seed is not None:
        pyro.set_rng_seed(seed)
    ranks.share_generators()
    run = _Run(model, guide, train, recipe, epochs, ranks, freeze_norms)
    options = {"epochs": epochs, "steps": run.steps, "rule": rule, "seed": seed, "freeze_norms": freeze_norms}
    settings = describe_run(model, guide, recipe, **options)
    state = TrainingState(model, guide, run.optimizers.all, train, settings, ranks.device)
    history, decided = recorder.history(), {}
    with _validation_off():
        if found is None:
            check_validation(model, validation)
        else:
            state.restore(found)
            history, decided = found.history, found.part("decided")
            recorder.go_on_from(history)
        with report_progress(epochs, run.steps, progress and ranks.first, title, len(history)) as report:
            for epoch in range(len(history), epochs):
                loss = run.epoch(epoch, report)
                decided = recorder.decided_norms(run.recent)
                record = recorder.record(epoch + 1, loss, decided)
                history.epochs.append(record)
                report(record, loss)
                if on_epoch is not None:
                    on_epoch(record)
                if checkpoints is not None and ranks.first and checkpoints.due(epoch + 1, epochs):
                    checkpoints.save(state.capture(history, decided), epochs)
        drawn = recorder.drawn()
    set_norm_statistics(model, decided)
    if ranks.first:
        recorder.warn(history, drawn)
    return history


def _find(checkpoints: Checkpoints | None, resume: Resume) -> Checkpoint | None:
    if resume not in (True, False, "auto"):
        raise ValueError(f"resume must be True, False or 'auto'; got {resume!r}.")
    if checkpoints is None:
        if resume is True:
            raise ValueError("resume=True needs the checkpoints to go on from: checkpoints=Checkpoints(folder).")
        return None
    if not resume and checkpoints.paths():
        raise ValueError(
            f"{checkpoints.folder} holds checkpoints of another run; pass resume=True to go on with it, or choose "
            "another folder."
        )
    found = checkpoints.latest() if resume else None
    if resume is True and found is None:
        raise ValueError(f"there is no checkpoint in {checkpoints.folder}; resume='auto' starts a run without one.")
    return found


def _check_settings(
    model: AbstractModel, guide: nn.Module, train: Loader, validation: Loader | None, epochs: int
) -> None:
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1; got {epochs}.")
    check_loader(train, "training")
    if validation is not None:
        check_loader(validation, "validation")
    check_guide(model, guide)
    check_precision(model)


def _validation_off() -> Any:
    # Pyro's argument checks read values on the host at every site of every step
    return pyro.validation_enabled(False)


class _Run:
    """Model, objective and optimizers of one call of fit."""

    def __init__(
        self,
        model: AbstractModel,
        guide: nn.Module,
        train: Loader,
        recipe: Recipe,
        epochs: int,
        ranks: Ranks,
        freeze_norms: bool,
    ) -> None:
        self.model, self.guide, self.train, self.ranks = model, guide, train, ranks
        self.elbo = elbo_module(model, guide)
        self.steps = len(train)  # type: ignore[arg-type]
        if len(set(ranks.shares(self.steps))) > 1:
            raise ValueError(f"every process needs the same number of batches; got {ranks.shares(self.steps)}.")
        self.optimizers = Optimizers(recipe, parameter_groups(model, guide), epochs, self.steps)
        self.objective = ranks.wrap(self.elbo)
        self.freeze_norms = freeze_norms
        self.recent = RecentBatches(0)

    def epoch(self, epoch: int, report: Reporter) -> float:
        """Train for an epoch; returns the mean loss."""
        self._train_mode()
        self._tell_epoch(epoch)
        self.recent = RecentBatches(NORM_SAMPLES // self.ranks.size)
        holding = bool(tracked_norms(self.model))
        total, steps = 0.0, 0
        for index, (x, y) in enumerate(self.train):
            if holding:
                self.recent.add(x, y)
            x, y = to_device(x, self.ranks.device), y.to(self.ranks.device)
            value = self._step(x, y, epoch, index)
            total, steps = total + value, steps + 1
            report(None, value)
        self.ranks.share_buffers(self.elbo)
        return total / steps

    def _train_mode(self) -> None:
        self.objective.train()
        if self.freeze_norms:
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
        # the KL is the same in every process and the weights have mean 1: the mean of losses is that of the whole batch
        loss = self.objective(x, y) * (len(y) * len(shares) / sum(shares) / self.model.num_data)
        value = self.ranks.mean(loss.detach()).item()
        if not math.isfinite(value):
            culprit = first_nonfinite(self.model, self.guide, x)
            raise NonFiniteError(
                f"the loss is {value} at epoch {epoch + 1}, step {index + 1}; first to be NaN or infinite: {culprit}. "
                "A lower weight learning rate or clean inputs usually help."
            )
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

    def _check(self, x: Any, y: Tensor, first: bool) -> None:
        check_batch(self.model, x, y)
        if first and (names := check_signs(self.model, x)):
            warnings.warn(
                f"negative values reach the unsigned quantizers of {', '.join(names)} and are clipped to zero; "
                "give quantize() example inputs that show them.",
                stacklevel=6,
            )


def fine_tune(
    model: AbstractModel,
    guide: AbstractGateGuide,
    train: Loader,
    validation: Loader | None = None,
    *,
    epochs: int = 10,
    recipe: Recipe = FINE_TUNING,
    rule: DecisionRule = "map",
    **options: Any,
) -> History:
    """Train weights and ranges with the gates fixed at their decided values.

    The gates are decided by `rule` and pinned in the prior, so model and guide stay what they are and the KL is 0.
    Take the posterior from the guide before: afterwards it is certain.

    Arguments:
        model: The gated model.
        guide: Its trained guide.
        train: Batches `(x, y)`.
        validation: Held-out batches.
        epochs: Passes over the training data; the paper uses 10.
        recipe: The paper's fine-tuning by default.
        rule: How gates are decided.
        options: Further arguments of :func:`fit`.

    Returns:
        The history of the fine-tuning.

    References:
        van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), section 4.
    """
    _check_settings(model, guide, train, validation, epochs)
    guide.prior.pin_gates(guide.hard_gates(rule))
    return fit(model, guide, train, validation, epochs=epochs, recipe=recipe, rule=rule, **options)
