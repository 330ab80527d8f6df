"""Settings of a run of the command line: flags and YAML, validated before any work."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from pyro_bbits.files import write_text_atomically
from pyro_bbits.ladder import BitLadder

__all__ = ["Augmentation", "RunSettings"]

Rate = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Choice = Literal["auto", "always", "never"]
Augmentation = Literal["none", "crop", "crop-flip", "crop-flip-cutout"]

EPOCHS = {"digits": 40, "cifar10": 100}
BATCH = {"digits": 64}


WHERE_IT_RUNS = ("device", "threads", "data_path", "workers", "bad_images", "picture_cache", "capture", "compile")
"""Settings that may change when a run goes on."""


class RunSettings(BaseModel):
    """Everything that decides a training run; with a seed, its numbers too on the same machine.

    Attributes:
        data: Data set: `digits` (ships with scikit-learn), `mnist`, `cifar10`, or where one's own data lie: a folder of
            pictures, a `.npz` or a `.csv` file; see :func:`~pyro_bbits.data.load_data`.
        data_path: Folder with the parquet files of `mnist` or `cifar10`; None loads it from the hub.
        target: Column of targets in a `.csv`.
        task: `classification`, or `regression` for real-valued targets.
        image_size: Height and width in pixels that pictures of a folder are scaled and cropped to, by worker processes
            while training; None reads pictures of one size into memory as they are.
        bad_images: With an image size, what to do about pictures that cannot be decoded: `raise` an error, or `skip`
            them, for which all are read once before.
        augment: `crop-flip` crops and mirrors training images at random; `crop` only crops them, as digits and letters
            bear; `crop-flip-cutout` paints a part over as well, against memorizing in long runs. None takes `crop-flip`
            for `cifar10` and with an image size, `none` for others.
        workers: With an image size, processes that decode pictures; None takes one for each core but one.
        picture_cache: With an image size, a folder that keeps decoded pictures, so that each is decoded once only.
        network: A network of the registry; None takes the one made for the data set.
        pretrained: A file with the float network's state dict to start from, safetensors or `.pth`.
        pretrained_head: `reset` leaves the last linear layer of it out, for another number of classes.
        include: Patterns of the module paths to quantize; a path stands for all inside it.
        exclude: Patterns of those that stay in float; they win.
        bits: The ladder of bit widths, each a multiple of the one before.
        mu: Strength of the prior in nats per training sample, at least 0; larger means fewer bits and channels.
        cost: `bops` prices gates by what they cost in BOPs, `constant` all alike.
        bops_price: Price of the BOPs of the configuration as a whole, in nats per sample and percent of those of the
            float network; with `simplified` and a `mu` of 1e-6 it alone decides.
        simplified: Use the paper's penalty in place of the full KL; then probabilities are no measure of doubt.
        guide: Relaxation of the gates: `hard-concrete` (the paper's) or `straight-through`.
        prune: Whether channels may be removed.
        pin: Tensors of a fixed width: patterns of their names, as `*.input=8`; of several that fit the last holds.
        ranges: Where ranges start: `max`, the largest magnitude; `mse`, the least squared error of 4 bits.
        init_logit: Initial logit of every gate.
        rule: How gates are decided: `map`, or the paper's `threshold`.
        start: Weights that the quantized network starts from: `initial`, or those of the trained `float` network.
        distill: Weight of the float network's predictions in the targets, 0 to 1: of the trained one, or without a
            baseline of the pretrained one.
        epochs: Passes over the training data; None takes 40 for digits, 100 for CIFAR-10, else 20.
        fine_tune_epochs: Further passes with the gates fixed.
        float_epochs: Passes of the full-precision network; None takes as many as of the quantized one.
        batch_size: Samples per step; None takes 64 for digits, else 128.
        weight_lr: Learning rate of the weights.
        weight_decay: Decay of the weights, per unit of learning rate.
        schedule: Of the learning rate of the weights: `tail` falls linearly in the last third, `cosine` from the start,
            `steps` to a tenth after each third, `constant` never.
        gate_lr: Learning rate of the gate logits; None adapts it to the length of the run.
        range_lr: Learning rate of the logarithmic ranges.
        baseline: Also train the full-precision network in the same way, for comparison.
        seed: Seed of initial weights, order of samples, gates and the validation split.
        device: `auto` takes a GPU if there is one.
        precision: Arithmetic of training: `float32`, `tf32` or `bf16`; None leaves PyTorch's settings alone.
        capture: Whether steps are captured in CUDA graphs: `auto`, `always` or `never`.
        compile: Whether the network is compiled for training: `auto`, `always` or `never`.
        threads: CPU threads; None leaves the choice to PyTorch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Annotated[str, Field(min_length=1)] = "digits"
    data_path: Path | None = None
    target: str | None = None
    task: Literal["classification", "regression"] = "classification"
    image_size: Count | None = None
    bad_images: Literal["raise", "skip"] = "raise"
    augment: Augmentation | None = None
    workers: Annotated[int, Field(ge=0)] | None = None
    picture_cache: Path | None = None
    network: str | None = None
    pretrained: Path | None = None
    pretrained_head: Literal["keep", "reset"] = "keep"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    bits: tuple[int, ...] = (2, 4, 8, 16, 32)
    mu: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    cost: Literal["bops", "constant"] = "bops"
    bops_price: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    simplified: bool = False
    guide: Literal["hard-concrete", "straight-through"] = "hard-concrete"
    prune: bool = True
    pin: tuple[str, ...] = ()
    ranges: Literal["max", "mse"] = "max"
    init_logit: Annotated[float, Field(allow_inf_nan=False)] = 6.0
    rule: Literal["map", "threshold"] = "map"
    start: Literal["initial", "float"] = "initial"
    distill: Annotated[float, Field(ge=0, le=1)] = 0.0
    epochs: Count | None = None
    fine_tune_epochs: Annotated[int, Field(ge=0)] = 0
    float_epochs: Count | None = None
    batch_size: Count | None = None
    weight_lr: Rate = 1e-3
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    schedule: Literal["tail", "cosine", "steps", "constant"] = "tail"
    gate_lr: Rate | None = None
    range_lr: Rate = 1e-3
    baseline: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "tf32", "bf16"] | None = None
    capture: Choice = "auto"
    compile: Choice = "auto"
    threads: Count | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, which would pass for the number 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"must not be {str(value).lower()}, which YAML also reads from yes, no, on and off")
        return value

    @model_validator(mode="after")
    def _check_effect(self) -> Self:
        """Settings that would do nothing are a misunderstanding."""
        if self.pretrained_head == "reset" and self.pretrained is None:
            raise ValueError("pretrained_head goes with pretrained weights; give their file (--pretrained)")
        if not self.baseline and (self.start == "float" or self.float_epochs is not None):
            raise ValueError("start float and float_epochs need the full-precision network; leave out --no-baseline")
        if self.distill and not self.baseline and self.pretrained is None:
            raise ValueError("distill needs a float network to learn from: a baseline, or --pretrained weights")
        if self.distill and not self.baseline and self.pretrained_head == "reset":
            raise ValueError(
                "distill would learn from a head with random weights; train the baseline, or keep the head"
            )
        if self.bops_price and not self.mu:
            raise ValueError("bops_price needs a mu above 0, such as 1e-6 with simplified: with 0 all gates stay open")
        if self.distill and self.task != "classification":
            raise ValueError(f"distill is for classes; the task is {self.task}")
        return self

    @field_validator("pin", mode="before")
    @classmethod
    def _read_pins(cls, value: Any) -> Any:
        """A YAML mapping of patterns to widths is as good; whatever else is no text gets our message."""
        pairs = [f"{pattern}={bits}" for pattern, bits in value.items()] if isinstance(value, Mapping) else value
        if isinstance(pairs, str):
            return pairs
        return [str(part) for part in (pairs if isinstance(pairs, list | tuple) else [pairs])]

    @field_validator("include", "exclude", "pin", mode="before")
    @classmethod
    def _split_patterns(cls, value: Any) -> Any:
        """A flag or YAML string such as `fc,layer1.*`, or several."""
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            return value
        return tuple(pattern.strip() for part in parts for pattern in part.split(",") if pattern.strip())

    @field_validator("bits", mode="before")
    @classmethod
    def _split_bits(cls, value: Any) -> Any:
        """A flag or YAML string such as `2,4,8`."""
        if isinstance(value, str) and not value.strip():
            raise ValueError("give at least one width, such as 2,4,8")
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return BitLadder(value).bits

    @field_validator("pin")
    @classmethod
    def _check_pins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pin in value:
            _parsed(pin)
        return value

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        if self.data == "digits" and self.data_path is not None:
            raise ValueError("the digits data ship with scikit-learn and take no data_path")
        return self

    @property
    def resolved_epochs(self) -> int:
        """Epochs of the run."""
        return self.epochs or EPOCHS.get(self.data, 20)

    @property
    def pins(self) -> tuple[tuple[str, int], ...]:
        """Pairs of a pattern and a width."""
        return tuple(map(_parsed, self.pin))

    @property
    def resolved_batch_size(self) -> int:
        """Samples per step."""
        return self.batch_size or BATCH.get(self.data, 128)

    @classmethod
    def make(cls, values: Mapping[str, Any], config: Path | None = None) -> "RunSettings":
        """Merge a YAML file and values given directly, which win; None means not given.

        Raises:
            ValueError: If the file cannot be read or a setting is unknown or out of range; in one line.
        """
        read = _read_yaml(config) if config is not None else {}
        given = {key: value for key, value in values.items() if value is not None}
        try:
            return cls(**(read | given))
        except ValidationError as error:
            place = f"{config}: " if set(error.errors()[0]["loc"][:1]) <= read.keys() - given.keys() and read else ""
            raise ValueError(place + _first_line(error)) from None

    @classmethod
    def resumed(cls, path: Path, values: Mapping[str, Any], config: Path | None = None) -> "RunSettings":
        """The settings of a run that is to go on; what is given besides must agree, but for where it runs.

        Raises:
            ValueError: As for :meth:`make`, or if a setting differs from that of the run.
        """
        started = cls.load(path)
        given = (_read_yaml(config) if config is not None else {}) | {k: v for k, v in values.items() if v is not None}
        wanted = cls.make(started.model_dump() | given)
        for name, value in started.model_dump().items():
            if name == "picture_cache" and (getattr(wanted, name) is None) != (value is None):
                raise ValueError("a run goes on with a picture cache, or without one, as it was started.")
            if name not in WHERE_IT_RUNS and getattr(wanted, name) != value:
                raise ValueError(
                    f"the run was started with {name} {value}, and goes on with that; got {getattr(wanted, name)}. "
                    "Another --output begins a new run."
                )
        return wanted

    @classmethod
    def load(cls, path: Path) -> "RunSettings":
        """Read the settings of a run.

        Raises:
            ValueError: As for :meth:`make`.
        """
        return cls.make({}, path)

    def save(self, path: Path) -> None:
        """Write the settings as YAML, atomically; `bbits train --config` reads them."""
        write_text_atomically(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def _parsed(pin: str) -> tuple[str, int]:
    pattern, _, bits = (part.strip() for part in pin.rpartition("="))
    if not pattern or not bits.isdecimal():
        raise ValueError(f"a pin is PATTERN=BITS, such as *.input=8; got {pin!r}")
    return pattern, int(bits)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the settings {path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if content is None:
        raise ValueError(f"{path} is empty; it must hold settings by name, e.g. 'mu: 0.1'.")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} must hold settings by name, e.g. 'mu: 0.1'; got {type(content).__name__}.")
    return content


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        close = get_close_matches(name.replace("-", "_"), RunSettings.model_fields, n=1)
        guess = f" (did you mean {close[0]!r}?)" if close else ""
        return f"there is no setting {name!r}{guess}; the settings are {', '.join(RunSettings.model_fields)}."
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    if first["type"] == "value_error":  # one of ours, complete
        return f"{name}: {message}." if name else f"{message}."
    return f"{name}: {message}; got {first['input']!r}."
