"""The main job in one function: data, network, training, posterior, configuration, figures."""

import copy
import math
import platform
import signal
import threading
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import nn

from pyro_bbits import __version__
from pyro_bbits.analysis.posterior import GatePosterior
from pyro_bbits.analysis.run import RunFolder, pick_device
from pyro_bbits.data import Loaders, open_data
from pyro_bbits.inference import (
    AbstractGateGuide,
    Checkpoints,
    EmptyGuide,
    EpochRecord,
    Evaluation,
    HardConcreteGuide,
    History,
    NonFiniteError,
    Recipe,
    StraightThroughGuide,
    evaluate,
    fine_tune,
    fit,
    recalibrate_norms,
)
from pyro_bbits.inference.distributed import Ranks
from pyro_bbits.inference.epochs import NORM_SAMPLES
from pyro_bbits.insertion import StructureSnapshot, quantize
from pyro_bbits.models import (
    DistilledModel,
    GatedModel,
    Likelihood,
    NormalLikelihood,
    PlainModel,
    build_network,
    default_network,
    fitting_networks,
    load_pretrained,
)
from pyro_bbits.prior import GatePrior
from pyro_bbits.settings import RunSettings

__all__ = ["Experiment"]

CHOICES: dict[str, Any] = {"auto": "auto", "always": True, "never": False}
GUIDES = {"hard-concrete": HardConcreteGuide, "straight-through": StraightThroughGuide}
CALIBRATION_SAMPLES = 64
ACCURACY_DROP = 5.0
"""Percentage points of held-out accuracy that quantization may cost before a run warns."""


@dataclass(frozen=True)
class Stages:
    """Options of :func:`fit` on checkpoints, for each stage of a run."""

    float: dict[str, Any]
    quantized: dict[str, Any]
    fine_tuning: dict[str, Any]
    resume: bool


class Experiment:
    """A run of the command line: settings to a finished folder.

    Everything that can be wrong with settings, data and network is found at construction, before the folder is made.

    Arguments:
        settings: The settings.
        progress: Show progress on the console.
        checkpoint_every: Epochs from one checkpoint to the next; 0 keeps none.

    Raises:
        ValueError: If data, network, weights or device are not to be had.
    """

    def __init__(self, settings: RunSettings, *, progress: bool = True, checkpoint_every: int = 1) -> None:
        self.settings, self.progress, self.checkpoint_every = settings, progress, checkpoint_every
        self.device = pick_device(settings.device)
        if settings.capture == "always" and self.device.type != "cuda":
            raise ValueError("--capture always needs a GPU, and this run is on the CPU; leave it out.")
        self.ranks = Ranks(self.device)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.data = open_data(settings)
        self.network_name = settings.network or self._default_network()
        pyro.set_rng_seed(settings.seed)
        self.net = self._network()
        self.teacher = self.net
        self._quantize()

    def _default_network(self) -> str:
        try:
            return default_network(self.data.name)
        except ValueError:
            fitting = ", ".join(fitting_networks(self.data.input_shape, self.data.num_outputs))
            raise ValueError(
                f"{self.data.name} has no default network; choose one with --network. For inputs of shape "
                f"{self.data.input_shape} and {self.data.num_outputs} outputs there are: "
                f"{fitting or 'none in this library'}."
            ) from None

    def _network(self) -> nn.Module:
        net = build_network(self.network_name, self.data.input_shape, self.data.num_outputs)
        if self.settings.pretrained is not None:
            load_pretrained(net, self.settings.pretrained, head=self.settings.pretrained_head)
        return net

    def run(self, folder: RunFolder, *, resume: bool = False) -> dict[str, Any]:
        """Train, evaluate and write everything into the folder.

        The test split is used once, at the end: for the float network, and for the configured network without gates.
        Of several processes, rank 0 alone writes.

        Arguments:
            folder: The folder.
            resume: Go on from the checkpoints in the folder, with the numbers of a run that was never interrupted.

        Returns:
            The final figures, as in `results.json`.
        """
        start, settings, loaders = time.perf_counter(), self.settings, self._loaders()
        if self.ranks.first:
            folder.save_description(self.data.description())
        stages = self._stages(folder, resume)
        float_test, float_history = self._train_float(loaders, stages) if settings.baseline else (None, None)
        network, model = self.network, self._model()
        guide = GUIDES[settings.guide](self.prior, init=settings.init_logit)
        posterior, history = self._train_gated(model, guide, loaders, folder, stages)
        if float_history is not None and self.ranks.first:
            _warn_of_loss(float_history, history)
        configured = posterior.configuration(settings.rule).apply(self._float_copy(network.net))
        test = evaluate(PlainModel(configured, 1, model.likelihood), loaders.test)
        results = self._results(posterior, float_test, test) | self._noise(model.likelihood)
        results |= {"seconds": round(time.perf_counter() - start, 1)}
        if self.ranks.first:
            folder.save_plots()
            results["files"] = folder.digests()
            folder.save_results(results)
        return results

    def _quantize(self) -> None:
        """Make the quantized network of the float one as it is now, and the prior over its gates."""
        settings = self.settings
        network = quantize(
            self.net,
            self._calibration(),
            bits=settings.bits,
            include=settings.include,
            exclude=settings.exclude,
            ranges=settings.ranges,
        )
        self.network = network.to(self.device)
        options: dict[str, Any] = {"cost": settings.cost, "simplified": settings.simplified}
        self.prior = GatePrior(self.network, settings.mu, bops=settings.bops_price, **options)
        if not settings.prune:
            self.prior.pin_channels()
        for pattern, bits in settings.pins:
            self.prior.pin(pattern, bits=bits)

    def _model(self) -> GatedModel:
        """The program, taught by the float network if it is asked for."""
        num_data, share = self.data.num_data, self.settings.distill
        if share:
            teacher = self.teacher.to(self.device)
            model: GatedModel = DistilledModel(self.network, self.prior, num_data, teacher, share)
        else:
            model = GatedModel(self.network, self.prior, num_data, self.data.likelihood)
        return model.to(self.device)

    def _stages(self, folder: RunFolder, resume: bool) -> Stages:
        def options(stage: str) -> dict[str, Any]:
            place = folder.checkpoints / stage
            if not self.checkpoint_every and not (resume and place.is_dir()):
                return {}
            # 0 keeps none beyond the last, but goes on from what is there
            every = self.checkpoint_every or max(self.settings.resolved_epochs, self.settings.fine_tune_epochs)
            checkpoints = Checkpoints(place, every=every)
            return {"checkpoints": checkpoints, "resume": "auto" if resume else False}

        return Stages(options("float"), options("quantized"), options("fine-tuning"), resume)

    def _loaders(self) -> Loaders:
        return self.data.loaders(
            self.settings.resolved_batch_size,
            seed=self.settings.seed,
            device=self.device,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
        )

    def _float_copy(self, trained: nn.Module) -> nn.Module:
        """A fresh float network with trained weights, as a user of the exported files would make it."""
        net = build_network(self.network_name, self.data.input_shape, self.data.num_outputs).to(self.device)
        net.load_state_dict(trained.state_dict())
        return net

    def _recipe(self) -> Recipe:
        settings = self.settings
        names = ("weight_lr", "gate_lr", "range_lr", "weight_decay", "schedule")
        return Recipe(**{name: getattr(settings, name) for name in names})

    def _execution(self) -> dict[str, Any]:
        """Options of :func:`fit` on how its steps are computed."""
        settings = self.settings
        choices = {"capture": CHOICES[settings.capture], "compile": CHOICES[settings.compile]}
        return {"precision": settings.precision, **choices}

    def _train_float(self, loaders: Loaders, stages: Stages) -> tuple[Evaluation, History]:
        model = PlainModel(copy.deepcopy(self.net), self.data.num_data, self.data.likelihood).to(self.device)
        loaders.train.set_epoch(0)
        history = fit(
            model,
            EmptyGuide(),
            loaders.train,
            loaders.validation,
            epochs=self.settings.float_epochs or self.settings.resolved_epochs,
            recipe=self._recipe(),
            seed=self.settings.seed,
            progress=self.progress,
            title="full precision",
            **self._execution(),
            **stages.float,
        )
        self.teacher = model.net
        if self.settings.start == "float":
            self.net.load_state_dict(model.net.state_dict())
            self.net.eval()  # ranges are those of batch norms as trained
            self._quantize()
        return evaluate(model, loaders.test), history

    def _train_gated(
        self, model: GatedModel, guide: AbstractGateGuide, loaders: Loaders, folder: RunFolder, stages: Stages
    ) -> tuple[GatePosterior, History]:
        """Train, fine-tune if asked for, and save what there is, also when interrupted."""
        settings, seen = self.settings, History(model.net.layout.tensors, tuple(model.net.layout.slices))
        if stages.resume and folder.history_file.exists():
            seen = folder.history()
        before = 0

        def keep(record: EpochRecord) -> None:
            number = before + record.epoch
            seen.epochs[number - 1 :] = [replace(record, epoch=number)]
            if self.ranks.first:
                seen.save(folder.history_file)

        if self.ranks.first:
            seen.save(folder.history_file)
        options: dict[str, Any] = {"rule": settings.rule, "progress": self.progress, "on_epoch": keep}
        options |= self._execution()
        loaders.train.set_epoch(0)
        posterior, steps = None, _Steps(model.net)
        try:
            fit(
                model,
                guide,
                loaders.train,
                loaders.validation,
                epochs=settings.resolved_epochs,
                recipe=self._recipe(),
                seed=settings.seed,
                title="quantized",
                **options,
                **stages.quantized,
            )
            before = settings.resolved_epochs
            posterior = GatePosterior.from_guide(guide, model.net)
            if settings.fine_tune_epochs:
                options |= {"epochs": settings.fine_tune_epochs, "title": "fine-tuning"} | stages.fine_tuning
                fine_tune(model, guide, loaders.train, loaders.validation, **options)
        except (NonFiniteError, OSError):
            raise  # there is nothing to keep; what cannot be written now, cannot be written again
        except BaseException as error:
            # without a step, what an earlier part of the run has saved is better
            new = isinstance(error, KeyboardInterrupt) and not folder.posterior_file.exists()
            if self.ranks.first and (steps.taken or new):
                _ignore_dead_workers()
                self._recalibrate(model, guide, loaders)
                self._save(model, guide, folder, posterior)
            raise
        return self._save(model, guide, folder, posterior), seen

    def _recalibrate(self, model: GatedModel, guide: AbstractGateGuide, loaders: Loaders) -> None:
        """What :func:`fit` does at the end of an epoch, here in the middle of one, and without the other processes."""
        batches = math.ceil(NORM_SAMPLES / self.settings.resolved_batch_size)
        try:
            recalibrate_norms(model, loaders.train, guide.hard_gates(self.settings.rule), batches=batches)
        except Exception as error:  # the workers that read pictures may be gone; the weights shall not be
            warnings.warn(f"batch norms keep the statistics of the training: {error}", stacklevel=2)

    def _save(
        self, model: GatedModel, guide: AbstractGateGuide, folder: RunFolder, belief: GatePosterior | None
    ) -> GatePosterior:
        """After fine-tuning the guide is certain: the belief is that from before, the ranges are the tuned ones."""
        belief = belief or GatePosterior.from_guide(guide, model.net)
        posterior = replace(belief, structure=StructureSnapshot.of(model.net))
        if self.ranks.first:
            folder.save_network(model.net.net, posterior, self.settings.rule)
        return posterior

    def _results(self, posterior: GatePosterior, float_test: Evaluation | None, test: Evaluation) -> dict[str, Any]:
        configuration = posterior.configuration(self.settings.rule)
        low, high = posterior.bops_interval()
        return {
            "data": self.settings.data,
            "network": self.network_name,
            "mu": self.settings.mu,
            "simplified": self.settings.simplified,
            "bops_price": self.settings.bops_price,
            "distill": self.settings.distill,
            "seed": self.settings.seed,
            "rule": self.settings.rule,
            "epochs": self.settings.resolved_epochs,
            "test_samples": test.samples,
            **self._scores(float_test, test),
            "relative_bops": configuration.relative_bops,
            "expected_relative_bops": posterior.expected_bops(),
            "relative_bops_94_interval": [low, high],
            "bits": configuration.bits(),
            "kept": configuration.kept(),
            "device": self._device_name(),
            "versions": {"pyro-bbits": __version__, "torch": torch.__version__, "pyro-ppl": pyro.__version__},
        }

    def _scores(self, float_test: Evaluation | None, test: Evaluation) -> dict[str, float | None]:
        """Figures on the test split; those of a regression in the units of the targets as the user gave them."""
        scaling, score = self.data.target_scaling, "accuracy" if test.rmse is None else "rmse"
        unit = 1.0 if scaling is None else scaling.std[0]
        factor = 1.0 if score == "accuracy" else unit
        values = (None if result is None else getattr(result, score) for result in (float_test, test))
        before, after = (None if value is None else factor * value for value in values)
        nll = test.nll + (self.data.num_outputs * math.log(unit) if scaling is not None else 0)
        return {f"test_{score}_float": before, f"test_{score}": after, "test_nll": nll}

    def _noise(self, likelihood: Likelihood) -> dict[str, float]:
        """The learned deviation of a regression's targets around the prediction, in their units."""
        if not isinstance(likelihood, NormalLikelihood):
            return {}
        scaling = self.data.target_scaling
        return {"noise_std": likelihood.log_scale.exp().item() * (1.0 if scaling is None else scaling.std[0])}

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name()
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

    def _calibration(self) -> torch.Tensor:
        return self.data.example_inputs(CALIBRATION_SAMPLES)


def _ignore_dead_workers() -> None:
    """Processes that read pictures die with this one if the signal went to all; that shall not stop it from saving."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class _Steps:
    """Whether a training step has begun on a network."""

    def __init__(self, network: nn.Module) -> None:
        self.taken = False
        network.register_forward_pre_hook(self._look)

    def _look(self, network: nn.Module, args: Any) -> None:
        self.taken = self.taken or network.training


def _warn_of_loss(float_history: History, history: History) -> None:
    full, quantized = float_history[-1].validation_accuracy, history[-1].validation_accuracy
    if full is not None and quantized is not None and full - quantized > ACCURACY_DROP:
        warnings.warn(
            f"the held-out accuracy of the quantized network is {quantized:.2f} %, that of the full-precision one "
            f"{full:.2f} %; a smaller mu or --bops-price, more epochs or fine-tuning (--fine-tune-epochs 3) bring them "
            "closer.",
            stacklevel=3,
        )
