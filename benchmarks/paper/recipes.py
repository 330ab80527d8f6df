"""The experiments by name: what is trained, from where, with which prior, for how long."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin

from pyro_bbits.inference import Recipe
from pyro_bbits.inference.recipe import LARGEST_GATE_LR
from pyro_bbits.insertion import Ranges
from pyro_bbits.settings import Augmentation

__all__ = ["DATA", "RECIPES", "PaperRecipe", "make_recipe", "overridden", "shortened"]

LOWEST_LOGIT = -2.0
"""The published code never samples a gate whose logit is this low, so that its width does not exist."""

TRAINABLE = ("weights", "gates", "ranges")


@dataclass(frozen=True)
class PaperRecipe:
    """All that tells one experiment from another; the defaults are those of this library, full KL and all.

    Attributes:
        kind: `gated`; `float` without quantizers; `sensitivity`, the search without training; `baseline`, a method of
            :mod:`pyro_bbits.inference.baselines`.
        method: Name of the method in the tables; of a baseline, its key in the registry.
        epochs: Passes over the training data.
        batch: Training rows in a batch.
        mu: Strength of the prior, in nats per data point.
        bops: Price of the expected BOPs, in nats per data point and percent.
        warmup: Share of the epochs over which `mu` rises linearly to its value.
        simplified: The paper's penalty in place of the full KL.
        logits: Initial logit of the gate of each width.
        prune: Whether channels have gates.
        pins: Pairs of a pattern of tensor names and their width, which is then not learned.
        guide: `hard-concrete` or `straight-through`.
        rule: How gates are decided.
        temperature: Of the relaxation.
        weight_lr: Learning rate of weights, biases and norms.
        gate_lr: Of the gate logits; None lets the length of the run decide.
        range_lr: Of the logarithms of the ranges.
        weight_optimizer: `adam` or `sgd`.
        schedule: Of the learning rates, as in :class:`~pyro_bbits.inference.Recipe`.
        anneal_all: Whether gates and ranges follow it, as weights do.
        weight_decay: As in :class:`~pyro_bbits.inference.Recipe`, of a float network before as well.
        float_epochs: Epochs in full precision before quantization; 0 starts from random weights.
        examples: Training images that the initial ranges are found on.
        ranges: `max`, the largest magnitude; `mse`, the least squared error at 4 bits.
        train: What is trained: of `weights`, `gates`, `ranges`.
        images: Training images that are used; None uses all.
        augment: `crop` shifts training images by up to an eighth of their width, `crop-flip` mirrors them as well,
            `crop-flip-cutout` also paints a square over; None takes `crop-flip` for CIFAR-10, and none for the digits.
        distill: Weight of the float network's predictions in the targets.
        smoothing: Share of the targets that is spread over all classes.
        fine_tune: Epochs with fixed gates at the end.
        precision: Arithmetic in training; None leaves it to the command.
        options: Arguments of a baseline.
    """

    kind: Literal["gated", "float", "sensitivity", "baseline"] = "gated"
    method: str = "bayesian-bits"
    epochs: int = 100
    batch: int = 128
    mu: float = 0.1
    bops: float = 0.0
    warmup: float = 0.0
    simplified: bool = False
    logits: Mapping[int, float] = field(default_factory=lambda: dict.fromkeys((2, 4, 8, 16, 32), 6.0))
    prune: bool = True
    pins: tuple[tuple[str, int], ...] = ()
    guide: Literal["hard-concrete", "straight-through"] = "hard-concrete"
    rule: Literal["map", "threshold"] = "map"
    temperature: float = 2 / 3
    weight_lr: float = 1e-3
    gate_lr: float | None = None
    range_lr: float = 1e-3
    weight_optimizer: Literal["adam", "sgd"] = "adam"
    schedule: Literal["tail", "cosine", "steps", "constant"] = "tail"
    anneal_all: bool = False
    weight_decay: float = 0.0
    float_epochs: int = 0
    examples: int = 64
    ranges: Ranges = "max"
    train: tuple[str, ...] = TRAINABLE
    images: int | None = None
    augment: Augmentation | None = None
    distill: float = 0.0
    smoothing: float = 0.0
    fine_tune: int = 0
    precision: Literal["float32", "tf32", "bf16"] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, choices = getattr(self, entry.name), _choices(entry.type)
            if choices and value not in choices:
                raise ValueError(f"{entry.name} must be one of {', '.join(filter(None, choices))}; got {value!r}.")
            if entry.type is float and not isinstance(value, int | float):
                raise ValueError(f"{entry.name} must be a number; got {value!r}.")
        if unknown := set(self.train) - set(TRAINABLE):
            raise ValueError(f"train names {sorted(unknown)}; choose of {', '.join(TRAINABLE)}.")
        if self.distill and not self.float_epochs:
            raise ValueError("distillation needs a float network to learn from: set float_epochs above 0.")
        shares = self.distill, self.smoothing, self.warmup
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"distill, smoothing and warmup are shares of 1; got {', '.join(map(str, shares))}.")
        if (self.distill or self.smoothing) and self.kind != "gated":
            raise ValueError(f"distill and smoothing are for gated networks; {self.method} has its own targets.")
        if self.distill and self.smoothing:
            raise ValueError("a network is taught by another one or by smoothed labels: set distill or smoothing to 0.")

    @property
    def ladder(self) -> tuple[int, ...]:
        """The widths that can be reached: those whose gates do not start closed for good."""
        return tuple(bits for bits, logit in sorted(self.logits.items()) if logit > LOWEST_LOGIT)

    @property
    def initial_logits(self) -> dict[int, float]:
        """Initial logits of the widths of the ladder."""
        return {bits: self.logits[bits] for bits in self.ladder}

    @property
    def optimizers(self) -> Recipe:
        """Learning rates and schedule."""
        names = ("weight_lr", "gate_lr", "range_lr", "weight_optimizer", "schedule", "weight_decay")
        annealed: dict[str, Any] = {"anneal_ranges": self.anneal_all, "anneal_gates": self.anneal_all}
        return Recipe(**{name: getattr(self, name) for name in names}, **annealed)


def _choices(annotation: Any) -> tuple[Any, ...]:
    """What a `Literal` allows, and None where it may be left open; nothing for other types."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    literals = [part for part in get_args(annotation) if get_origin(part) is Literal]
    return (*get_args(literals[0]), None) if literals else ()


@dataclass(frozen=True)
class DataSetting:
    """What the paper does on one data set.

    Attributes:
        network: Its network.
        epochs: Passes over the data.
        mu: Strength of the prior, that of the first row of the paper's table.
        start: The width that training starts at.
        price: Of the expected BOPs in `best`, in nats per data point and percent.
        levers: What else `best` does otherwise there.
        special: What else `parity` does otherwise there, and what is made of it.
    """

    network: str
    epochs: int
    mu: float
    start: int
    price: float = 0.1
    levers: Mapping[str, Any] = field(default_factory=dict)
    special: Mapping[str, Any] = field(default_factory=dict)


IMAGENET: dict[str, Any] = {
    "batch": 384,
    "weight_lr": 3e-3,
    "weight_optimizer": "sgd",
    "schedule": "steps",
    "anneal_all": True,
    "fine_tune": 10,
}

DIGITS: dict[str, Any] = {"augment": "crop"}
PICTURES: dict[str, Any] = {"augment": "crop-flip-cutout", "weight_decay": 0.4, "schedule": "cosine"}

DATA = {
    "mnist": DataSetting("lenet5", 100, 0.1, 8, 1.5, DIGITS),
    "cifar10": DataSetting("vgg7", 300, 0.01, 32, 1.2, PICTURES),
    "imagenet": DataSetting("resnet18", 30, 0.03, 16, special=IMAGENET),
    "digits": DataSetting("digits-net", 40, 0.1, 32),
}
"""MNIST, CIFAR-10 and ImageNet as in the paper; the digits are for trying things out."""


def _parity(data: DataSetting) -> PaperRecipe:
    logits = {bits: 6.0 if bits <= data.start else -6.0 for bits in (2, 4, 8, 16, 32)}
    start = PaperRecipe(epochs=data.epochs, mu=data.mu, simplified=True, logits=logits, rule="threshold", gate_lr=1e-3)
    return replace(start, examples=2, **data.special)


def _own(data: DataSetting) -> PaperRecipe:
    return PaperRecipe(epochs=data.epochs, mu=data.mu)


def _best(data: DataSetting) -> PaperRecipe:
    """Each lever is an option; the README has the trials of most."""
    start = PaperRecipe(
        epochs=data.epochs,
        mu=1e-6,
        simplified=True,
        bops=data.price,
        warmup=0.1,
        logits=dict.fromkeys((2, 4, 8), 2.0),
        gate_lr=1e-2,
        float_epochs=max(1, data.epochs // 5),
        ranges="mse",
        distill=0.5,
        fine_tune=10,
    )
    return replace(start, **data.levers)


def _pruning_only(data: DataSetting, *pins: tuple[str, int]) -> PaperRecipe:
    logits = dict.fromkeys((2, 4, 8, 16, 32), 6.0)
    return replace(_parity(data), prune=True, pins=pins, logits=logits)


def _post_training(data: DataSetting, *train: str) -> PaperRecipe:
    """Weights and norms as they are; a few hundred images, some thousand steps."""
    start = replace(_parity(data), gate_lr=None, examples=64, ranges="mse", train=train, images=512)
    return replace(start, float_epochs=data.epochs, epochs=500, schedule="constant")


RECIPES = {
    "parity": _parity,
    "own": _own,
    "best": _best,
    "best-w8a8": lambda data: replace(_best(data), pins=(("*", 8),), bops=data.price / 2),
    "best-w4a8": lambda data: replace(_best(data), pins=(("*.weight", 4), ("*.input", 8))),
    "best-a8": lambda data: replace(_best(data), pins=(("*.input", 8),), bops=2 * data.price),
    "fine-tuned": lambda data: replace(_parity(data), fine_tune=10),
    "quantization-only": lambda data: replace(_parity(data), prune=False),
    "pruning-only-fp32": lambda data: _pruning_only(data, ("*", 32)),
    "pruning-only-w8a8": lambda data: _pruning_only(data, ("*", 8)),
    "pruning-only-w4a8": lambda data: _pruning_only(data, ("*.weight", 4), ("*.input", 8)),
    "post-training-gates": lambda data: _post_training(data, "gates"),
    "post-training-gates-ranges": lambda data: _post_training(data, "gates", "ranges"),
    "straight-through": lambda data: replace(_parity(data), guide="straight-through"),
    "expected-bops": lambda data: replace(_parity(data), mu=1e-6, bops=0.1),
    "sensitivity": lambda data: PaperRecipe(
        "sensitivity", "sensitivity", epochs=1, float_epochs=data.epochs, images=2048, ranges="mse"
    ),
    "float32": lambda data: PaperRecipe("float", "float32", epochs=data.epochs, precision="float32"),
    "bfloat16": lambda data: PaperRecipe("float", "bfloat16", epochs=data.epochs, precision="bf16"),
}
"""Makers of recipes for a data set. Names that are not here are looked for among the baselines."""

WIDTHS = re.compile(r"(?P<method>.+)-w(?P<weights>\d+)a(?P<inputs>\d+)")


def make_recipe(name: str, data: str, baselines: Mapping[str, Any]) -> PaperRecipe:
    """A recipe by name.

    Arguments:
        name: A key of `RECIPES` or of the baselines; `METHOD-w4a8` is a baseline of fixed widths, weights first.
        data: A key of `DATA`.
        baselines: The compared methods that are there.

    Raises:
        ValueError: If there is none of this name.
    """
    if name in RECIPES:
        return RECIPES[name](DATA[data])
    widths = WIDTHS.fullmatch(name)
    method = name if widths is None else widths["method"]
    if method in baselines:
        options = {} if widths is None else {"bits": (int(widths["weights"]), int(widths["inputs"]))}
        return PaperRecipe("baseline", method, epochs=DATA[data].epochs, mu=0.0, options=options)
    known = ", ".join(dict.fromkeys([*RECIPES, *baselines]))
    raise ValueError(f"no recipe is called {name!r}; choose one of {known}.")


def overridden(recipe: PaperRecipe, values: Mapping[str, Any]) -> PaperRecipe:
    """The recipe with other values.

    Raises:
        ValueError: If a name is unknown.
    """
    known = [entry.name for entry in fields(recipe)]
    if unknown := values.keys() - set(known):
        raise ValueError(f"a recipe has no {sorted(unknown)[0]!r}; it has {', '.join(known)}.")
    return replace(recipe, **values)


def shortened(recipe: PaperRecipe, share: float) -> PaperRecipe:
    """The recipe on a share of its epochs, its gates moving as far: a gate moves about one learning rate per step.

    Raises:
        ValueError: If the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1; got {share}.")
    epochs: dict[str, Any] = {
        name: _part(getattr(recipe, name), share) for name in ("epochs", "float_epochs", "fine_tune")
    }
    rate = None if recipe.gate_lr is None else min(recipe.gate_lr / share, max(recipe.gate_lr, LARGEST_GATE_LR))
    return replace(recipe, **epochs, gate_lr=rate)


def _part(epochs: int, share: float) -> int:
    return max(1, round(share * epochs)) if epochs else 0
