"""How far guides and their gradient estimators end from the exact posterior."""

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import pandas as pd
import pyro
import torch

from pyro_bbits.analysis.exact import ExactPosterior
from pyro_bbits.gates import GateProbabilities
from pyro_bbits.inference import (
    AbstractGateGuide,
    BernoulliGuide,
    HardConcreteGuide,
    StraightThroughGuide,
    elbo_module,
    refine_gates,
)
from pyro_bbits.inference.checks import check_loader
from pyro_bbits.inference.evaluation import device_of, to_device
from pyro_bbits.inference.progress import report_progress
from pyro_bbits.models import GatedModel

__all__ = ["ESTIMATORS", "Estimator", "EstimatorComparison", "compare_estimators"]

MEAN_FIELD = "best mean field"


@dataclass(frozen=True)
class Estimator:
    """A way to fit gates.

    Attributes:
        guide: Class of the guide.
        simplified: Whether the paper's penalty takes the place of the KL.
        refined: Whether :func:`~pyro_bbits.inference.refine_gates` has the last word.
    """

    guide: type[AbstractGateGuide]
    simplified: bool = False
    refined: bool = False


ESTIMATORS: dict[str, Estimator] = {
    "hard concrete": Estimator(HardConcreteGuide),
    "hard concrete, refined": Estimator(HardConcreteGuide, refined=True),
    "straight-through": Estimator(StraightThroughGuide),
    "score function": Estimator(BernoulliGuide),
    "simplified penalty": Estimator(HardConcreteGuide, simplified=True),
}
"""Estimators by name. `simplified penalty` is the hard concrete trained on the paper's penalty instead of the KL."""


@dataclass(frozen=True, eq=False)
class EstimatorComparison:
    """An exact posterior beside what was fitted to it.

    Attributes:
        exact: The exact posterior.
        probabilities: What each estimator ended with, by name; `best mean field` is the optimum of their common family.
        seconds: How long each took.
        seed: Seed of the fits.
    """

    exact: ExactPosterior
    probabilities: Mapping[str, GateProbabilities]
    seconds: Mapping[str, float]
    seed: int

    def table(self) -> pd.DataFrame:
        """A row per estimator, indexed by its name.

        Returns:
            Columns `max_error` and `mean_error` (of the inclusion probabilities of free gates), `gap` (log evidence
            less the ELBO over hard gates, nats per data set), `relative_time` (1 for the first estimator) and `seed`.
        """
        exact, errors, first = self.exact, self.errors(), next(iter(self.seconds.values()))
        rows = {
            name: {
                "max_error": errors[name].max(),
                "mean_error": errors[name].mean(),
                "gap": exact.gap(probabilities),
                "relative_time": self.seconds[name] / first,
                "seed": self.seed,
            }
            for name, probabilities in self.probabilities.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("estimator")

    def inclusion(self) -> pd.DataFrame:
        """Inclusion probabilities: a row per free gate, a column `exact` and one per estimator."""
        exact = self.exact
        columns = {"exact": exact.inclusion}
        columns |= {name: exact.approximate_inclusion(p) for name, p in self.probabilities.items()}
        names = [name for name, free in zip(exact.gate_names, exact.free.tolist(), strict=True) if free]
        values = {name: column[exact.free].tolist() for name, column in columns.items()}
        return pd.DataFrame(values, index=pd.Index(names, name="gate"))

    def errors(self) -> pd.DataFrame:
        """Absolute errors of the inclusion probabilities: a row per free gate, a column per estimator."""
        inclusion = self.inclusion()
        return inclusion.drop(columns="exact").sub(inclusion["exact"], axis=0).abs()


def compare_estimators(
    model: GatedModel,
    data: Iterable[Any],
    *,
    estimators: Sequence[str] = tuple(ESTIMATORS),
    steps: int = 1000,
    particles: int = 8,
    lr: float = 0.05,
    init: float = 2.0,
    seed: int = 0,
    limit: int = 10_000,
    progress: bool = True,
) -> EstimatorComparison:
    """Fit guides to a network with fixed weights, and measure their distance to the exact posterior.

    Each guide is trained alone by Adam on its logits, at a rate that is constant for half of the steps and then falls
    to zero, one batch a step. The model is copied and stays as it is.

    Arguments:
        model: The model; pin gates in its prior until the rest can be enumerated.
        data: Batches `(x, y)` that make up the whole data set; few are best, one is ideal.
        estimators: Names of :data:`ESTIMATORS`.
        steps: Gradient steps of each.
        particles: Gate samples per step.
        lr: Learning rate of the logits.
        init: Initial logits.
        seed: Seed of each fit, and of the starts of the best mean field.
        limit: Largest number of configurations to enumerate.
        progress: Show a progress bar, and a line for each estimator.

    Returns:
        The comparison.

    Raises:
        TypeError: If the data have no length.
        ValueError: If an estimator is unknown or a setting out of range; and as
            :meth:`~pyro_bbits.analysis.ExactPosterior.from_model` does.
    """
    _check(estimators, steps, particles, lr)
    check_loader(data, "comparison")
    exact = ExactPosterior.from_model(model, data, limit=limit)
    found: dict[str, GateProbabilities] = {}
    seconds: dict[str, float] = {}
    settings: dict[str, Any] = {
        "steps": steps,
        "particles": particles,
        "lr": lr,
        "init": init,
        "seed": seed,
        "progress": progress,
    }
    jobs = {name: partial(_fit, model, data, name, **settings) for name in estimators}
    for name, job in (jobs | {MEAN_FIELD: partial(exact.best_mean_field, seed=seed)}).items():
        pyro.set_rng_seed(seed)
        start = time.perf_counter()
        found[name] = job()
        seconds[name] = time.perf_counter() - start
        if progress:
            print(f"{name:<24} gap {exact.gap(found[name]):7.3f} nats  {seconds[name]:6.1f} s")
    return EstimatorComparison(exact, found, seconds, seed)


def _check(estimators: Sequence[str], steps: int, particles: int, lr: float) -> None:
    if not estimators or (unknown := set(estimators) - set(ESTIMATORS)):
        what = ", ".join(sorted(unknown)) if estimators else "none"
        raise ValueError(f"estimators must be some of {', '.join(ESTIMATORS)}; got {what}.")
    if steps < 1 or particles < 1 or not lr > 0:
        raise ValueError(f"steps, particles and lr must be above 0; got {steps}, {particles} and {lr}.")


def _fit(
    model: GatedModel,
    data: Iterable[Any],
    name: str,
    *,
    steps: int,
    particles: int,
    lr: float,
    init: float,
    seed: int,
    progress: bool,
) -> GateProbabilities:
    model, estimator = copy.deepcopy(model).requires_grad_(False).eval(), ESTIMATORS[name]
    model.prior.simplified = estimator.simplified
    guide = estimator.guide(model.prior, init=init)
    elbo = elbo_module(model, guide, particles)
    optimizer = torch.optim.Adam(guide.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 - 2 * step / steps))
    device = device_of(guide)
    with pyro.validation_enabled(False), report_progress(1, steps, progress, name) as report:
        for x, y in islice(cycle(data), steps):
            optimizer.zero_grad()
            loss = elbo(to_device(x, device), y.to(device))
            loss.backward()
            optimizer.step()
            schedule.step()
            report(None, loss.item())
    if estimator.refined:
        refine_gates(model, guide, data, draws=16, channels=True, seed=seed, progress=progress)
    return guide.probabilities()
