"""Networks on made data, and what their training costs through the public `fit`."""

import inspect
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.speed.authors_network import PublishedNetwork, PublishedStep
from benchmarks.speed.timing import Timing, time_interleaved
from pyro_bbits import GatePrior, quantize
from pyro_bbits.data import TensorLoader
from pyro_bbits.inference import EmptyGuide, HardConcreteGuide, fit
from pyro_bbits.inference.precision import Precision, matrix_arithmetic
from pyro_bbits.models import VGG7, AbstractModel, GatedModel, LeNet5, PlainModel, ResNet18, ViT

__all__ = [
    "CASES",
    "MODES",
    "Case",
    "Cost",
    "Learned",
    "gated",
    "plain",
    "published_cost",
    "summary",
    "timed_fit",
]


@dataclass(frozen=True)
class Case:
    """A network, and the data set whose shape it is trained on.

    Attributes:
        make: Builds the network.
        shape: Shape of one sample.
        samples: Training samples: an epoch has the length that it has on the real data.
        classes: Number of classes.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: int
    classes: int = 10

    def network(self, device: torch.device) -> nn.Module:
        """The network with weights of seed 0."""
        torch.manual_seed(0)
        return self.make().to(device)

    def data(self, samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random images and labels."""
        torch.manual_seed(0)
        return torch.randn(samples, *self.shape, device=device), torch.randint(self.classes, (samples,), device=device)


CASES = {
    "lenet5": Case(LeNet5, (1, 28, 28), 60_000),
    "vgg7": Case(VGG7, (3, 32, 32), 50_000),
    "resnet18": Case(lambda: ResNet18(num_classes=10, stem="small"), (3, 32, 32), 50_000),
    "vit": Case(ViT, (3, 32, 32), 50_000),
    "resnet18-224": Case(ResNet18, (3, 224, 224), 5_120, 1000),
}

Learned = Literal["ranges", "widths", "gated"]
"""What is trained: ranges at fixed 8 bits, the gates of each tensor's width too, or those of channels as well."""

_WISHES: dict[str, dict[str, Any]] = {
    "auto": {},
    "eager": {"capture": False, "compile": False},
    "captured": {"capture": True, "compile": False},
    "compiled": {"capture": False, "compile": True},
    "compiled+captured": {"capture": True, "compile": True},
}
_KNOWN = inspect.signature(fit).parameters

MODES = {
    name: {key: value for key, value in wishes.items() if key in _KNOWN}
    for name, wishes in _WISHES.items()
    if all(key in _KNOWN for key, value in wishes.items() if value)
}
"""Options of `fit` by the name of the mode: those modes that this version of it has."""


def plain(net: nn.Module, x: Tensor) -> tuple[AbstractModel, nn.Module]:
    """The float network as a model, with its empty guide."""
    return PlainModel(net, num_data=len(x)), EmptyGuide()


def gated(
    net: nn.Module, x: Tensor, mu: float = 0.01, learned: Learned = "gated"
) -> tuple[GatedModel, HardConcreteGuide]:
    """The quantized network with the paper's guide, and as many gates as are to be learned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = quantize(net, x[:64])
    prior = GatePrior(network, mu)
    if learned != "gated":
        prior.pin_channels()
    if learned == "ranges":
        prior.pin("*", bits=8)
    return GatedModel(network, prior, num_data=len(x)), HardConcreteGuide(prior)


def extra_parameters(model: AbstractModel) -> dict[str, float]:
    """What is trained beyond the network's own: a range for each tensor, a logit for each gate that is not pinned."""
    if not isinstance(model, GatedModel):
        return {}
    prices = torch.cat([model.prior.channel_strength, model.prior.strength.flatten()])
    extra = len(model.prior.strength) + int(((prices > 0) & prices.isfinite()).sum())
    own = sum(p.numel() for p in model.parameters()) - model.net.quantizers.log_range.numel()
    return {"extra parameters": extra, "extra parameters %": 100 * extra / own}


@dataclass(frozen=True)
class Cost:
    """What training costs.

    Attributes:
        ms: Milliseconds per step, from the time between the ends of two epochs: one for each pair of epochs.
        peak_mb: Most memory above parameters, optimizer state and data; None on a CPU.
        start: Seconds of the first epoch, in which graphs are captured and code is compiled.
        extra: What is trained beyond the network's own parameters, as a number and in percent of these.
    """

    ms: list[float]
    peak_mb: float | None
    start: float
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def timing(self) -> Timing:
        """Median, smallest and largest."""
        return Timing.of(self.ms)


def timed_fit(
    model: AbstractModel, guide: nn.Module, train: TensorLoader, *, epochs: int, options: dict[str, Any]
) -> Cost:
    """Train for some epochs without validation; all but the first count."""
    device, ends = train.inputs.device, [time.perf_counter()]
    parameters = [p for module in (model, guide) for p in module.parameters() if p.requires_grad]
    static = 2 * sum(p.nbytes for p in parameters)  # the two moments of Adam
    if device.type == "cuda":
        static += torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of undecided gates, and of ranges that random data leave
        fit(
            model,
            guide,
            train,
            epochs=epochs,
            progress=False,
            on_epoch=lambda record: ends.append(time.perf_counter()),
            **options,
        )
    peak = (torch.cuda.max_memory_allocated(device) - static) / 1e6 if device.type == "cuda" else None
    first, *others = [later - sooner for sooner, later in pairwise(ends)]
    return Cost([1e3 * seconds / len(train) for seconds in others], peak, first, extra_parameters(model))


def published_cost(net: nn.Module, train: TensorLoader, *, steps: int, precision: Precision) -> Cost:
    """The published arithmetic in its own loop on one batch: what moves the data is not counted."""
    device, (x, y) = train.inputs.device, next(iter(train))
    if device.type == "cuda" and x.dim() == 4:  # as fit does
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)  # type: ignore[call-overload]
    static = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    started = time.perf_counter()
    with warnings.catch_warnings(), matrix_arithmetic(precision):
        warnings.simplefilter("ignore")
        step = PublishedStep(PublishedNetwork(net, x[:64]), bf16=precision == "bf16")
        static += 3 * sum(p.nbytes for p in step.network.parameters())
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        timing = time_interleaved({"": lambda: step(x, y)}, device, bursts=steps, seconds=0.0, warm=2)[""]
    peak = (torch.cuda.max_memory_allocated(device) - static) / 1e6 if device.type == "cuda" else None
    return Cost([timing.ms], peak, time.perf_counter() - started)


def summary(costs: Sequence[Cost]) -> Cost:
    """All rounds as one."""
    peaks = [cost.peak_mb for cost in costs if cost.peak_mb is not None]
    start = statistics.median(cost.start for cost in costs)
    return Cost([ms for cost in costs for ms in cost.ms], max(peaks, default=None), start, costs[0].extra)
