"""The training loop: SVI on a gated model with ordinary PyTorch optimizers."""

import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pyro
from torch import Tensor, nn

from pyro_bbits.cost import NetworkCost
from pyro_bbits.gates import DecisionRule, GateValues
from pyro_bbits.inference.checks import (
    NonFiniteError,
    check_batch,
    check_guide,
    check_loader,
    check_signs,
    first_nonfinite,
)
from pyro_bbits.inference.evaluation import device_of, evaluate, to_device
from pyro_bbits.inference.guides import AbstractGateGuide
from pyro_bbits.inference.history import EpochRecord, History
from pyro_bbits.inference.objective import elbo_module, gate_kl_nats, parameter_groups
from pyro_bbits.inference.progress import Reporter, report_progress
from pyro_bbits.inference.recipe import FINE_TUNING, Optimizers, Recipe
from pyro_bbits.insertion import QuantizedNetwork
from pyro_bbits.models import AbstractModel

__all__ = ["fine_tune", "fit"]

Loader = Iterable[Any]


class _Recorder:
    """Fills in the record of an epoch."""

    def __init__(self, model: AbstractModel, guide: nn.Module, validation: Loader | None, rule: DecisionRule) -> None:
        self.model, self.guide, self.validation, self.rule = model, guide, validation, rule
        self.network = model.net if isinstance(model.net, QuantizedNetwork) else None
        self.gate_guide = guide if isinstance(guide, AbstractGateGuide) else None
        self.cost = NetworkCost(self.network) if self.network is not None else None
        if self.gate_guide is not None:
            self.gate_guide.hard_gates(rule)  # an unknown rule is an error now, not after an epoch
        self.start = time.perf_counter()

    def history(self) -> History:
        if self.network is None or self.gate_guide is None:
            return History()
        return History(self.network.layout.tensors, tuple(self.network.layout.slices))

    def record(self, epoch: int, loss: float) -> EpochRecord:
        gates = self.gate_guide.hard_gates(self.rule) if self.gate_guide is not None else None
        entries = {} if gates is None or self.network is None else self._gate_entries(gates)
        if self.validation is not None:
            result = evaluate(self.model, self.validation, gates)
            entries |= {"validation_nll": result.nll, "validation_accuracy": result.accuracy}
        return EpochRecord(epoch, loss, seconds=round(time.perf_counter() - self.start, 3), **entries)

    def _gate_entries(self, gates: GateValues) -> dict[str, Any]:
        assert self.gate_guide is not None and self.network is not None and self.cost is not None
        return {
            "kl": gate_kl_nats(self.gate_guide, self.gate_guide.prior, self.model.num_data) / self.model.num_data,
            "expected_bops": self.cost(self.gate_guide.probabilities()).item(),
            "bops": self.cost(gates).item(),
            "bits": self.network.layout.bits(gates),
            "kept": self.network.layout.kept(gates),
        }


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
) -> History:
    r"""Maximize the ELBO over weights, ranges and gates, and record every epoch.

    The loss is :class:`~pyro.infer.TraceMeanField_ELBO` of model and guide divided by the number of data points, in
    nats per sample; one gate sample per step. Weights, gates and ranges have an optimizer each. Start from pretrained
    weights by loading them into the network before it is quantized.

    Arguments:
        model: A :class:`~pyro_bbits.models.GatedModel` or :class:`~pyro_bbits.models.PlainModel`, on its device.
        guide: Its guide; :class:`~pyro_bbits.inference.EmptyGuide` for a plain model.
        train: Batches `(x, y)`, with a length. Use shuffled ones.
        validation: Held-out batches, evaluated after every epoch with hard gates.
        epochs: Passes over the training data.
        recipe: Optimizers, rates and schedule; the paper's by default.
        rule: How gates are decided for evaluation; see :func:`~pyro_bbits.gates.decide`.
        seed: Seed of gates, dropout and whatever else draws from the global generators; None leaves them alone.
        progress: Show a progress bar and a line for some epochs.
        title: What to call the run there.
        on_epoch: Called with the record of each epoch.

    Returns:
        The history of the run. Model and guide are trained in place.

    Raises:
        TypeError: If a loader has no length.
        ValueError: If settings are wrong, before any training; or if data or labels are, before the step that would
            use them (each batch of the first epoch is checked).
        NonFiniteError: If the loss becomes NaN or infinite; it names the first offender.
    """
    _check_settings(model, guide, train, validation, epochs)
    recorder = _Recorder(model, guide, validation, rule)
    if seed is not None:
        pyro.set_rng_seed(seed)
    history = recorder.history()
    run = _Run(model, guide, train, recipe or Recipe(), epochs)
    with report_progress(epochs, run.steps, progress, title) as report, _validation_off():
        for epoch in range(epochs):
            loss = run.epoch(epoch, report)
            record = recorder.record(epoch + 1, loss)
            history.epochs.append(record)
            report(record, loss)
            if on_epoch is not None:
                on_epoch(record)
    _warn_of_empty_layers(history)
    return history


def _warn_of_empty_layers(history: History) -> None:
    empty = [layer for layer, kept in zip(history.layers, history[-1].kept, strict=True) if not kept]
    if empty:
        warnings.warn(
            f"every channel of {', '.join(empty)} is removed; unless a skip connection leads past it, the output no "
            "longer depends on the input. A smaller mu or a lower gate learning rate keeps channels.",
            stacklevel=3,
        )


def _check_settings(
    model: AbstractModel, guide: nn.Module, train: Loader, validation: Loader | None, epochs: int
) -> None:
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1; got {epochs}.")
    check_loader(train, "training")
    if validation is not None:
        check_loader(validation, "validation")
    check_guide(model, guide)


def _validation_off() -> Any:
    # Pyro's argument checks read values on the host at every site of every step
    return pyro.validation_enabled(False)


class _Run:
    """Model, objective and optimizers of one call of fit."""

    def __init__(self, model: AbstractModel, guide: nn.Module, train: Loader, recipe: Recipe, epochs: int) -> None:
        self.model, self.guide, self.train = model, guide, train
        self.elbo = elbo_module(model, guide)
        self.steps = len(train)  # type: ignore[arg-type]
        self.optimizers = Optimizers(recipe, parameter_groups(model, guide), epochs, self.steps)
        self.device = device_of(self.elbo)

    def epoch(self, epoch: int, report: Reporter) -> float:
        """Train for an epoch; returns the mean loss."""
        self.elbo.train()
        total, steps = 0.0, 0
        for index, (x, y) in enumerate(self.train):
            x, y = to_device(x, self.device), y.to(self.device)
            if epoch == 0:
                self._check(x, y, first=index == 0)
            value = self._step(x, y, epoch, index)
            total, steps = total + value, steps + 1
            report(None, value)
        return total / steps

    def _step(self, x: Any, y: Tensor, epoch: int, index: int) -> float:
        loss = self.elbo(x, y) / self.model.num_data
        value = float(loss.detach())
        if value != value or value in (float("inf"), -float("inf")):
            culprit = first_nonfinite(self.model, self.guide, x)
            raise NonFiniteError(
                f"the loss is {value} at epoch {epoch + 1}, step {index + 1}; first to be NaN or infinite: {culprit}. "
                "A lower weight learning rate or clean inputs usually help."
            )
        self.optimizers.step(loss, epoch, index)
        return value

    def _check(self, x: Any, y: Tensor, first: bool) -> None:
        check_batch(self.model, x, y)
        if first and (names := check_signs(self.model, x)):
            warnings.warn(
                f"negative values reach the unsigned quantizers of {', '.join(names)} and are clipped to zero; "
                "give quantize() example inputs that show them.",
                stacklevel=4,
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
