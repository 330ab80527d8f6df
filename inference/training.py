"""The training loop: SVI on a gated model with ordinary PyTorch optimizers."""

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any, Literal

import pyro
from torch import nn

from pyro_bbits.gates import DecisionRule
from pyro_bbits.inference.checkpoint import Checkpoint, Checkpoints, TrainingState, describe_run
from pyro_bbits.inference.checks import check_guide, check_loader, check_num_data, check_precision, check_validation
from pyro_bbits.inference.distributed import Ranks
from pyro_bbits.inference.epochs import Epochs
from pyro_bbits.inference.evaluation import device_of
from pyro_bbits.inference.execution import Automatic, Execution
from pyro_bbits.inference.guides import AbstractGateGuide
from pyro_bbits.inference.history import EpochRecord, History
from pyro_bbits.inference.memory_format import channels_last
from pyro_bbits.inference.norms import set_norm_statistics
from pyro_bbits.inference.precision import Precision, matrix_arithmetic
from pyro_bbits.inference.progress import report_progress
from pyro_bbits.inference.recipe import FINE_TUNING, Recipe
from pyro_bbits.inference.recorder import Recorder
from pyro_bbits.models import AbstractModel

__all__ = ["fine_tune", "fit"]

Loader = Iterable[Any]
Resume = Literal["auto"] | bool


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
    capture: Automatic = "auto",
    precision: Precision | None = None,
    compile: Automatic = "auto",
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

    Speed: on a GPU the whole step, from the gathering and augmentation of the batch to the optimizers, is captured in a
    CUDA graph and replayed, which takes Python and Pyro out of it; losses are then read some steps late. It trains as
    the same steps one by one do. A step that reads on the host cannot be captured; a warning names the place, and
    training goes on without. Networks on images are trained in channels-last order there.

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
        capture: Whether to capture steps in CUDA graphs: `"auto"` does so on a GPU where it is possible and warns where
            it is not, True raises where it is not, False takes steps one by one.
        precision: Arithmetic of products and convolutions in training: `float32`, `tf32` or `bf16` (see
            :data:`~pyro_bbits.inference.Precision`); None leaves PyTorch's settings alone.
        compile: Whether the network is compiled for training: `"auto"` does so on a CPU in runs so long that it pays
            (some minutes), True always, on a GPU too, False never. Draws of dropout differ when compiled.

    Returns:
        The history of the run, from its first epoch. Model and guide are trained in place.

    Raises:
        TypeError: If a loader has no length.
        ValueError: If settings are wrong, before any training; or if data or labels are, before the step that would
            use them (each batch of the first epoch is checked).
        NonFiniteError: If the loss becomes NaN or infinite; it names the first offender.
    """
    execution = Execution(capture, precision, compile, freeze_norms)
    _check_settings(model, guide, train, validation, epochs)
    check_num_data(model, train)
    found, recipe, ranks = _find(checkpoints, resume), recipe or Recipe(), Ranks(device_of(model))
    recorder = Recorder(model, guide, validation, rule, ranks)
    if seed is not None:
        pyro.set_rng_seed(seed)
    ranks.share_generators()
    with (
        _validation_off(),
        matrix_arithmetic(precision),
        channels_last(model, execution.channels_last(model)),
        closing(Epochs(model, guide, train, recipe, epochs, ranks, execution)) as run,
    ):
        options = {"epochs": epochs, "steps": run.steps, "rule": rule, "seed": seed, "freeze_norms": freeze_norms}
        settings = describe_run(model, guide, recipe, precision=precision, **options)
        state = TrainingState(model, guide, run.optimizers.all, train, settings, ranks.device)
        history, norms = recorder.history(), {}
        if found is None:
            check_validation(model, validation)
        else:
            state.restore(found)
            history, norms = found.history, found.part("decided")
            recorder.go_on_from(history)
        with report_progress(epochs, run.steps, progress and ranks.first, title, len(history)) as report:
            for epoch in range(len(history), epochs):
                loss = run.epoch(epoch, report)
                decided = recorder.decide()
                saved = checkpoints is not None and checkpoints.due(epoch + 1, epochs)
                if validation is not None or saved or epoch + 1 == epochs or ranks.several:
                    # else nobody would read them; processes average them, and must all do so or none
                    norms = recorder.decided_norms(run.recent, decided)
                record = recorder.record(epoch + 1, loss, decided, norms)
                history.epochs.append(record)
                report(record, loss)
                if on_epoch is not None:
                    on_epoch(record)
                if checkpoints is not None and ranks.first and saved:
                    checkpoints.save(state.capture(history, norms), epochs)
        drawn = recorder.drawn()
    set_norm_statistics(model, norms)
    if ranks.first:
        recorder.warn(history, drawn, precision)
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
