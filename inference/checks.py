"""Checks before and during training: say what is wrong, and where, before work is lost."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_bbits.inference.evaluation import device_of, evaluation_mode, to_device
from pyro_bbits.inference.guides import AbstractGateGuide
from pyro_bbits.inference.objective import EmptyGuide
from pyro_bbits.inference.randomness import undisturbed
from pyro_bbits.insertion import QuantizedNetwork
from pyro_bbits.models import AbstractModel

__all__ = [
    "BatchCheck",
    "NonFiniteError",
    "check_guide",
    "check_loader",
    "check_num_data",
    "check_precision",
    "check_signs",
    "check_validation",
    "first_nonfinite",
]


class NonFiniteError(ValueError):
    """The loss became NaN or infinite; the message names the first offender."""

    @classmethod
    def at(cls, value: float, epoch: int, index: int, culprit: str) -> "NonFiniteError":
        """The error of a step, epoch and step counted from 0."""
        return cls(
            f"the loss is {value} at epoch {epoch + 1}, step {index + 1}; first to be NaN or infinite: {culprit}. "
            "A lower weight learning rate or clean inputs usually help."
        )


def check_loader(loader: Iterable[Any], kind: str) -> None:
    """Raise unless a loader has a length above 0."""
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(
            f"the {kind} loader needs a length (batches per epoch); got {type(loader).__name__}."
        ) from error
    if length == 0:
        raise ValueError(f"the {kind} data are empty: the loader has no batch.")


def check_num_data(model: AbstractModel, loader: Any) -> None:
    """Warn if a gated model counts other samples than its loader gives: data and KL would be weighed wrongly."""
    size = _num_samples(loader)
    if size is None or not hasattr(model, "prior") or abs(size - model.num_data) <= 0.01 * size:
        return
    warnings.warn(
        f"the model was made for num_data={model.num_data} training samples, and the training loader has {size}; the "
        "KL of the gates is weighed against the wrong number of data.",
        stacklevel=3,  # the caller of fit
    )


def _num_samples(loader: Any) -> int | None:
    """Samples of one pass, all processes together; None if the loader does not say."""
    sampler = getattr(loader, "sampler", None)
    owners = (loader.dataset,) if hasattr(sampler, "num_replicas") else (sampler, getattr(loader, "dataset", None))
    try:
        return int(loader.num_data if hasattr(loader, "num_data") else len(next(o for o in owners if o is not None)))
    except (TypeError, StopIteration):
        return None


def check_validation(model: AbstractModel, loader: Iterable[Any] | None) -> None:
    """Raise if a held-out batch is not finite or does not fit the model, as :class:`BatchCheck` does.

    Raises:
        ValueError: It says that the validation data are meant.
    """
    if loader is None:
        return
    device, check = device_of(model), BatchCheck(model)
    try:
        with undisturbed(device):
            for x, y in loader:
                check(to_device(x, device), y.to(device))
    except ValueError as error:
        raise ValueError(f"validation data: {error}") from error


def check_guide(model: AbstractModel, guide: nn.Module) -> None:
    """Raise if a guide has no gates for the model's, or follows another prior: the KL would be that of neither."""
    if isinstance(guide, EmptyGuide) and hasattr(model, "prior"):
        raise ValueError("the model samples gates and an EmptyGuide has none; use HardConcreteGuide(model.prior).")
    if isinstance(guide, AbstractGateGuide) and guide.prior is not getattr(model, "prior", guide.prior):
        raise ValueError(
            "the guide was made for another prior than the model's; make both from one object, "
            f"e.g. {type(guide).__name__}(model.prior)."
        )


def check_precision(model: nn.Module) -> None:
    """Raise if parameters are float16: the steps of an optimizer vanish or overflow in it."""
    half = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float16]
    if half:
        raise ValueError(
            f"{half[0]!r} is float16, in which training ends in NaN; train the network in float32, .float()."
        )


class BatchCheck:
    """Checks that inputs and targets are finite and fit a model, batch after batch.

    One pass of the first batch through the network, of which nothing is kept, tells what targets must look like.

    Arguments:
        model: The model, in the mode it will run in.
    """

    def __init__(self, model: AbstractModel) -> None:
        self.model = model
        self._targets: _Targets | None = None

    def __call__(self, x: Any, y: Tensor) -> None:
        """Check a batch.

        Raises:
            ValueError: If an input or target is NaN or infinite, a label is out of range or the shapes do not fit.
        """
        _check_inputs(x)
        if self._targets is None:
            with evaluation_mode(self.model):
                self._targets = _Targets.of(self.model.predict(x))
            self._targets.check(y, self._targets.rows)
        else:
            self._targets.check(y, _rows(x, len(y)))


def _check_inputs(x: Any) -> None:
    for leaf in tree_leaves(x):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.isfinite().all():
            row = int((~leaf.isfinite()).nonzero()[0, 0]) if leaf.dim() else 0
            raise ValueError(
                f"the inputs hold NaN or infinite values, first in sample {row} of a batch; clean the data."
            )


def _rows(x: Any, default: int) -> int:
    sizes = [len(leaf) for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.dim()]
    return default if default in sizes or not sizes else sizes[0]


@dataclass(frozen=True)
class _Targets:
    """What the targets of a model must look like.

    Attributes:
        rows: Rows of the batch it was learned from.
        shape: Shape of the targets of one sample.
        classes: Number of classes; None if the targets are no classes.
    """

    rows: int
    shape: tuple[int, ...]
    classes: int | None

    @classmethod
    def of(cls, predicted: Any) -> "_Targets":
        full = predicted.batch_shape + predicted.event_shape
        while isinstance(predicted, dist.Independent):
            predicted = predicted.base_dist
        classes = predicted.logits.shape[-1] if isinstance(predicted, dist.Categorical) else None
        return cls(full[0] if full else 0, tuple(full[1:]), classes)

    def check(self, y: Tensor, rows: int) -> None:
        """Raise a ValueError if targets of so many samples are wrong."""
        expected = (rows, *self.shape)
        if y.shape != expected:
            raise ValueError(
                f"targets must have shape {expected} for this network and likelihood; got {tuple(y.shape)}."
            )
        if y.is_floating_point() and not y.isfinite().all():
            raise ValueError("the targets hold NaN or infinite values; clean the data.")
        if self.classes is not None:
            self._check_labels(y, self.classes)

    def _check_labels(self, y: Tensor, classes: int) -> None:
        if y.is_floating_point():
            raise ValueError(f"labels must be integers from 0 to {classes - 1}; got {y.dtype}.")
        if int(y.min()) < 0 or int(y.max()) >= classes:
            raise ValueError(
                f"labels must lie between 0 and {classes - 1}, the network having {classes} outputs; "
                f"got labels from {int(y.min())} to {int(y.max())}."
            )


def check_signs(model: AbstractModel, x: Any) -> list[str]:
    """Names of unsigned quantizers that see negative values: calibration saw none, so these are clipped to zero.

    Arguments:
        model: A gated model.
        x: A batch of inputs.

    Returns:
        The tensors' names; empty for a model without quantizers.
    """
    network = model.net
    if not isinstance(network, QuantizedNetwork):
        return []
    weights = {layer.weight for layer in network.layers if not layer.is_product}
    offenders: dict[str, None] = {}

    def look(row: int, tensor: Tensor) -> None:
        if row not in weights and not network.quantizers.signed[row] and tensor.min() < 0:
            offenders[network.layout.tensors[row]] = None

    with evaluation_mode(model), network.watching(look):
        model.predict(x)
    return list(offenders)


def first_nonfinite(model: AbstractModel, guide: nn.Module, x: Any) -> str:
    """Name the first thing that is NaN or infinite: an input, a parameter, or the module that first produces one."""
    for leaf in tree_leaves(x):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.isfinite().all():
            return "the inputs of the batch"
    for owner, module in (("model", model), ("guide", guide)):
        for name, parameter in module.named_parameters():
            if not parameter.isfinite().all():
                return f"the parameter {name!r} of the {owner}"
    return _first_nonfinite_module(model, x) or "the likelihood of the batch"


def _first_nonfinite_module(model: AbstractModel, x: Any) -> str | None:
    found: list[str] = []

    def look(module: nn.Module, args: Any, output: Any, name: str) -> None:
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not found and any(not leaf.isfinite().all() for leaf in leaves):
            found.append(name)

    handles = [m.register_forward_hook(partial(look, name=n)) for n, m in model.named_modules()]
    try:
        with torch.no_grad():
            model.predict(to_device(x, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return f"the output of module {found[0]!r}" if found else None
