"""One run of a recipe: from data to a trained network, and its figures on the test split."""

import copy
import importlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import nn

from benchmarks.paper.data import augmented, first_rows
from benchmarks.paper.metrics import saving_of
from benchmarks.paper.recipes import PaperRecipe
from benchmarks.paper.sensitivity import gates_at, sensitivity_curve
from pyro_bbits import BitConfiguration, GatePrior, quantize
from pyro_bbits.analysis import GatePosterior
from pyro_bbits.analysis.run import RunFolder
from pyro_bbits.data import DataSplits, ImageFolderData
from pyro_bbits.files import save_tensors_atomically
from pyro_bbits.inference import (
    AbstractGateGuide,
    Checkpoints,
    EmptyGuide,
    EpochRecord,
    Evaluation,
    HardConcreteGuide,
    History,
    Recipe,
    StraightThroughGuide,
    evaluate,
    fine_tune,
    fit,
)
from pyro_bbits.insertion import QuantizedNetwork, StructureSnapshot
from pyro_bbits.models import (
    AbstractModel,
    DistilledModel,
    GatedModel,
    PlainModel,
    SmoothedModel,
    build_network,
    load_pretrained,
)

__all__ = ["Experiment", "Outcome", "find_baselines"]

GUIDES: dict[str, type[AbstractGateGuide]] = {
    "hard-concrete": HardConcreteGuide,
    "straight-through": StraightThroughGuide,
}
CHECKPOINTS = 20
"""About how many times a stage is saved."""

ALLOWED_DROP = 1.0
"""Points of validation accuracy that the search without training may cost where one point of its curve is reported."""


def find_baselines() -> Mapping[str, Any]:
    """The compared methods by name; none where the library has none."""
    try:
        registry: Mapping[str, Any] = importlib.import_module("pyro_bbits.inference.baselines").BASELINES
    except ImportError:
        return {}
    return registry


@dataclass(frozen=True)
class Outcome:
    """Figures of a run; percent, and nats per sample."""

    test: Evaluation
    relative_bops: float
    validation_accuracy: float | None = None
    configuration: BitConfiguration | None = None
    curve: list[list[float]] = field(default_factory=list)
    bits: dict[str, float] = field(default_factory=dict)

    def entries(self) -> dict[str, Any]:
        """What a result holds of it."""
        found = {
            "test_accuracy": self.test.accuracy,
            "test_nll": self.test.nll,
            "test_samples": self.test.samples,
            "relative_bops": self.relative_bops,
            "validation_accuracy": self.validation_accuracy,
            "curve": self.curve,
            "bits": self.bits,
        }
        if self.configuration is None:
            return found
        _, widths_only, pruning_only = saving_of(self.configuration)
        chosen = {"bits": self.configuration.bits(), "kept": self.configuration.kept()}
        return found | chosen | {"widths_only": widths_only, "pruning_only": pruning_only}


class Experiment:
    """A recipe on a data set.

    Arguments:
        recipe: The recipe.
        data: The data.
        network: Name of the network.
        seed: Seed of weights, order, augmentation and gates.
        folder: Where checkpoints and the trained network go; what lies there is gone on with.
        device: Where to train.
        options: Further arguments of :func:`~pyro_bbits.inference.fit`.
        pretrained: Weights of a trained float network, in place of training one.
        choose: Whether there are validation rows of their own; without them nothing is evaluated while training.

    Raises:
        ValueError: If there are none, and the recipe chooses by them.
    """

    def __init__(
        self,
        recipe: PaperRecipe,
        data: DataSplits | ImageFolderData,
        network: str,
        *,
        seed: int,
        folder: Path,
        device: torch.device,
        options: Mapping[str, Any] | None = None,
        pretrained: Path | None = None,
        choose: bool = True,
    ) -> None:
        if recipe.kind == "sensitivity" and not choose:
            raise ValueError("the sensitivity search chooses by validation rows; they cannot be trained on as well.")
        self.recipe, self.network, self.seed, self.device = recipe, network, seed, device
        self.all = augmented(data, recipe.augment)
        self.data = augmented(first_rows(data, recipe.images), recipe.augment)
        self.folder, self.pretrained, self.choose = RunFolder(folder), pretrained, choose
        self.options = {"progress": False, "seed": seed} | dict(options or {})
        if recipe.precision is not None:
            self.options["precision"] = recipe.precision
        self.loaders = self.data.loaders(recipe.batch, seed=seed, device=device)
        pyro.set_rng_seed(seed)
        self.initial = self._float_copy()

    def run(self) -> Outcome:
        """Train, and evaluate on the test split, once."""
        kinds: dict[str, Callable[[], Outcome]] = {
            "float": self._float,
            "gated": self._gated,
            "sensitivity": self._sensitivity,
            "baseline": self._baseline,
        }
        return kinds[self.recipe.kind]()

    def _float_copy(self, weights: nn.Module | None = None) -> nn.Module:
        net = build_network(self.network, self.data.input_shape, self.data.num_outputs).to(self.device)
        if weights is not None:
            net.load_state_dict(weights.state_dict())
        return net

    def _stage(self, name: str, epochs: int) -> dict[str, Any]:
        """Arguments of `fit` for a stage: where its checkpoints lie, and its epochs."""
        checkpoints = Checkpoints(self.folder.checkpoints / name, keep=1, every=max(1, epochs // CHECKPOINTS))
        return self.options | {"epochs": epochs, "checkpoints": checkpoints, "resume": "auto", "title": name}

    @property
    def _validation(self) -> Any:
        return self.loaders.validation if self.choose else None

    # --- float ----------------------------------------------------------------------------------------------------

    def _float(self) -> Outcome:
        recipe, model = self.recipe, PlainModel(self.initial, self.data.num_data)
        stage = self._stage("float", recipe.epochs)
        history = fit(model, EmptyGuide(), self.loaders.train, self._validation, recipe=recipe.optimizers, **stage)
        history.save(self.folder.history_file)
        save_tensors_atomically(self.folder.weights_file, model.net.state_dict())
        half = recipe.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            test = evaluate(model, self.loaders.test)
        return Outcome(test, 25.0 if half else 100.0, history[-1].validation_accuracy)

    def _trained_float(self) -> nn.Module:
        """A float network to start from: given, trained here on all rows, or with random weights."""
        if self.pretrained is not None:
            load_pretrained(self.initial, self.pretrained)
        elif self.recipe.float_epochs:
            loaders = self.all.loaders(self.recipe.batch, seed=self.seed, device=self.device)
            model = PlainModel(self.initial, self.all.num_data)
            stage = self._stage("float", self.recipe.float_epochs)
            decay = Recipe(weight_decay=self.recipe.weight_decay)
            fit(model, EmptyGuide(), loaders.train, loaders.validation if self.choose else None, recipe=decay, **stage)
        return self.initial

    # --- gated ----------------------------------------------------------------------------------------------------

    def build(self) -> tuple[GatedModel, AbstractGateGuide]:
        """Model and guide of a gated recipe, before training."""
        recipe, net = self.recipe, self._trained_float()
        network = self._quantized(net)
        prior = GatePrior(network, recipe.mu, simplified=recipe.simplified, bops=recipe.bops)
        if not recipe.prune:
            prior.pin_channels()
        for pattern, bits in recipe.pins:
            prior.pin(pattern, bits=bits)
        guide = GUIDES[recipe.guide](prior, init=recipe.initial_logits, temperature=recipe.temperature)
        model = self._model(network, prior, net)
        network.net.requires_grad_("weights" in recipe.train)
        network.quantizers.requires_grad_("ranges" in recipe.train)
        guide.requires_grad_("gates" in recipe.train)
        return model, guide

    def _model(self, network: QuantizedNetwork, prior: GatePrior, teacher: nn.Module) -> GatedModel:
        """The program, with the targets that the recipe asks for."""
        recipe, num_data = self.recipe, self.data.num_data
        if recipe.distill:
            frozen = copy.deepcopy(teacher).requires_grad_(False)
            return DistilledModel(network, prior, num_data, frozen, recipe.distill)
        if recipe.smoothing:
            return SmoothedModel(network, prior, num_data, recipe.smoothing)
        return GatedModel(network, prior, num_data)

    def _quantized(self, net: nn.Module) -> QuantizedNetwork:
        examples = self.data.example_inputs(self.recipe.examples).to(self.device)
        if self.recipe.ranges == "mse":
            net.eval()  # batch norms as trained
        return quantize(net, examples, bits=self.recipe.ladder, ranges=self.recipe.ranges)

    def _gated(self) -> Outcome:
        recipe, (model, guide) = self.recipe, self.build()
        frozen = {"freeze_norms": "weights" not in recipe.train, "rule": recipe.rule}
        warm = _Warmup(model.prior, recipe.warmup, recipe.epochs)
        self.loaders.train.set_epoch(0)
        stage = self._stage("quantized", recipe.epochs) | frozen | {"on_epoch": warm}
        history = fit(model, guide, self.loaders.train, self._validation, recipe=recipe.optimizers, **stage)
        history.save(self.folder.history_file)
        belief = GatePosterior.from_guide(guide, model.net)
        if recipe.fine_tune:
            stage = self._stage("fine-tuning", recipe.fine_tune) | frozen
            history = fine_tune(model, guide, self.loaders.train, self._validation, **stage)
        posterior = replace(belief, structure=StructureSnapshot.of(model.net))
        self.folder.save_network(model.net.net, posterior, recipe.rule)
        return self._configured(posterior.configuration(recipe.rule), model.net.net, history)

    def _configured(self, configuration: BitConfiguration, trained: nn.Module, history: History) -> Outcome:
        """Figures of the configured network without gates."""
        configured = PlainModel(configuration.apply(self._float_copy(trained)), 1)
        test = evaluate(configured, self.loaders.test)
        return Outcome(test, configuration.relative_bops, history[-1].validation_accuracy, configuration)

    # --- others ---------------------------------------------------------------------------------------------------

    def _sensitivity(self) -> Outcome:
        model, _ = self.build()
        curve = sensitivity_curve(model, self.loaders.train, self.loaders.validation)
        best = max(point.accuracy for point in curve)
        chosen = min((p for p in curve if p.accuracy >= best - ALLOWED_DROP), key=lambda p: p.relative_bops)
        configuration = BitConfiguration.from_gates(model.net, gates_at(model.net, chosen.widths))
        configured = PlainModel(configuration.apply(self._float_copy(model.net.net)), 1)
        points = [[p.relative_bops, p.accuracy] for p in curve]
        test = evaluate(configured, self.loaders.test)
        return Outcome(test, configuration.relative_bops, chosen.accuracy, configuration, points)

    def _baseline(self) -> Outcome:
        recipe, make = self.recipe, find_baselines()[self.recipe.method]
        examples = self.data.example_inputs(recipe.examples).to(self.device)
        baseline = make(self._trained_float(), examples, self.data.num_data, **recipe.options)
        model: AbstractModel = baseline.model.to(self.device)
        guide = baseline.guide.to(self.device)
        stage = self._stage("quantized", recipe.epochs)
        history = fit(model, guide, self.loaders.train, self._validation, recipe=baseline.recipe, **stage)
        history.save(self.folder.history_file)
        test = evaluate(model, self.loaders.test, baseline.gates())
        accuracy = history[-1].validation_accuracy
        return Outcome(test, float(baseline.relative_bops()), accuracy, bits=dict(baseline.bits()))


class _Warmup:
    """Raises the strength of a prior over the first epochs; pins stay. Called after each epoch.

    Strengths are changed in place, where a captured step reads them, and are part of a checkpoint.
    """

    def __init__(self, prior: GatePrior, share: float, epochs: int) -> None:
        self.buffers = [prior.strength, prior.channel_strength, prior.bops]
        self.full = [buffer.clone() for buffer in self.buffers]
        self.epochs = round(share * epochs)
        self._set(1)

    def __call__(self, record: EpochRecord) -> None:
        self._set(record.epoch + 1)

    def _set(self, epoch: int) -> None:
        if epoch <= self.epochs + 1:
            for buffer, full in zip(self.buffers, self.full, strict=True):
                buffer.copy_(full * min(1.0, epoch / (self.epochs + 1)))
