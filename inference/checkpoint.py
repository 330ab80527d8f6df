"""Checkpoints: the whole state of a training run in one file, from which it goes on exactly."""

import hashlib
import json
import math
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_bbits.files import remove_leftovers, save_tensors_atomically, write_atomically
from pyro_bbits.inference.history import History
from pyro_bbits.inference.memory_format import match_memory
from pyro_bbits.inference.randomness import GeneratorStates
from pyro_bbits.inference.recipe import Recipe, set_rate
from pyro_bbits.models import AbstractModel
from pyro_bbits.prior import GatePrior

__all__ = ["Checkpoint", "Checkpoints", "TrainingState", "describe_run"]

FORMAT = "pyro-bbits/checkpoint"
VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """What one file holds.

    Attributes:
        tensors: Weights, buffers, gate logits, ranges, states of optimizers and generators, by name.
        facts: `epoch` (number completed), `run` (settings that must agree), `history`, and what else is no tensor.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        return int(self.facts["epoch"])

    @property
    def history(self) -> History:
        """History up to that epoch."""
        return History.from_text(self.facts["history"])

    @property
    def held_out_nll(self) -> float:
        """Held-out negative log-likelihood of the epoch in nats per sample; infinite if there is none."""
        nll = self.history[-1].validation_nll
        return math.inf if nll is None or not math.isfinite(nll) else nll

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, e.g. `model`, `guide`, `rng`."""
        return {key.removeprefix(f"{name}."): v for key, v in self.tensors.items() if key.startswith(f"{name}.")}

    def load_into(self, model: AbstractModel, guide: nn.Module) -> None:
        """Give a model and its guide the trained state, with the batch norms' statistics for the decided gates.

        To evaluate or export an epoch, such as the best; :func:`fit` goes on with `resume`.

        Arguments:
            model: A model made as that of the run was.
            guide: Its guide.
        """
        model.load_state_dict(self.part("model") | self.part("decided"))
        guide.load_state_dict(self.part("guide"))

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically; everything that is no tensor is JSON in its header."""
        header = {"format": FORMAT, "version": str(VERSION), "facts": json.dumps(self.facts)}
        save_tensors_atomically(path, self.tensors, header)

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the file is missing, damaged or something else.
        """
        return cls._read(path, with_tensors=True)

    @classmethod
    def load_facts(cls, path: Path) -> "Checkpoint":
        """The same without the tensors: only the header of the file is read.

        Raises:
            ValueError: As for :meth:`load`.
        """
        return cls._read(path, with_tensors=False)

    @classmethod
    def _read(cls, path: Path, *, with_tensors: bool) -> "Checkpoint":
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if (header.get("format"), header.get("version")) != (FORMAT, str(VERSION)):
                    raise ValueError(f"it is no {FORMAT} of version {VERSION}")
                names = file.keys() if with_tensors else ()
                loaded = cls({name: file.get_tensor(name) for name in names}, json.loads(header["facts"]))
            if not (isinstance(loaded.facts, dict) and len(loaded.history) >= 1 and loaded.epoch >= 1):
                raise ValueError("its epoch and history are missing")
            return loaded
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint {path} cannot be read: {error}.") from error


@dataclass(frozen=True)
class Checkpoints:
    """Where the checkpoints of one call of :func:`fit` lie, and how many are kept.

    One file per saved epoch, `epoch-000012.safetensors`, and `best.safetensors`: the saved epoch with the lowest
    held-out negative log-likelihood, if there are validation data. (Early epochs, with nothing quantized yet, may be
    the best by that measure.) A file is complete or not there, and the one before it is removed only afterwards.

    Attributes:
        folder: The folder, for this run alone; made if need be.
        keep: How many of the last checkpoints stay, at least 1.
        every: Epochs from one checkpoint to the next, at least 1; the last epoch is always saved.

    Raises:
        ValueError: If a number is below 1.
    """

    folder: str | Path
    keep: int = 2
    every: int = 1

    def __post_init__(self) -> None:
        for name in ("keep", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")

    def paths(self) -> list[Path]:
        """The files of the last epochs, oldest first."""
        found = Path(self.folder).glob("epoch-*.safetensors")
        return sorted(path for path in found if re.fullmatch(r"epoch-\d{6,}", path.stem))

    @property
    def best_path(self) -> Path:
        """The file of the best epoch."""
        return Path(self.folder) / "best.safetensors"

    def latest(self) -> Checkpoint | None:
        """The last checkpoint that can be read; None if there is no file.

        Raises:
            ValueError: If there are files, and none can be read.
        """
        errors = []
        for path in reversed(self.paths()):
            try:
                checkpoint = Checkpoint.load(path)
            except ValueError as error:
                errors.append(str(error))
                continue
            for message in errors:
                warnings.warn(f"{message} The one of epoch {checkpoint.epoch} is used.", stacklevel=2)
            return checkpoint
        if errors:
            raise ValueError(errors[0])
        return None

    def _best_nll(self) -> float:
        """What the best checkpoint so far has reached; infinite if there is none that can be read."""
        try:
            return Checkpoint.load_facts(self.best_path).held_out_nll if self.best_path.exists() else math.inf
        except ValueError:
            return math.inf

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether an epoch (from 1) of a run is saved."""
        return epoch % self.every == 0 or epoch == epochs

    def save(self, checkpoint: Checkpoint, epochs: int) -> None:
        """Write a checkpoint, note whether it is the best, and remove old ones.

        Arguments:
            checkpoint: The state after an epoch.
            epochs: Length of the run.

        Raises:
            OSError: If it cannot be written; those there are stay.
        """
        path = Path(self.folder) / f"epoch-{checkpoint.epoch:06d}.safetensors"
        remove_leftovers(self.folder)
        checkpoint.save(path)
        if checkpoint.held_out_nll < self._best_nll():
            write_atomically(self.best_path, lambda temporary: shutil.copyfile(path, temporary))
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)


def _is_fixed(prior: GatePrior) -> bool:
    """Whether the widths of all tensors are pinned, as in fine-tuning."""
    return bool(((prior.strength == 0) | prior.strength.isinf()).all())


def _fingerprint(prior: GatePrior) -> str | None:
    """Prices and pins; None once all widths are fixed."""
    if _is_fixed(prior):
        return None
    bops = prior.bops[None] if prior.bops_cost is not None else prior.strength.new_empty(0)
    values = torch.cat([prior.strength.flatten(), prior.channel_strength, bops]).cpu()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def describe_run(model: AbstractModel, guide: nn.Module, recipe: Recipe, **options: Any) -> dict[str, Any]:
    """What two runs must have in common for one to go on where the other stopped, as JSON can hold it.

    Arguments:
        model: The model.
        guide: Its guide.
        recipe: The recipe.
        options: Further settings by name: epochs, seed and the like.
    """
    shapes = [
        (name, tuple(value.shape), str(value.dtype))
        for name, value in sorted(nn.ModuleList([model, guide]).state_dict().items())
    ]
    layout, quantizers = getattr(model.net, "layout", None), getattr(model.net, "quantizers", None)
    content = repr((shapes, layout, getattr(quantizers, "signed", None)))
    rule = getattr(model.net, "rule", None)
    content += "" if rule is None else repr(rule)
    prior = getattr(model, "prior", None)
    return {
        "network": hashlib.sha256(content.encode()).hexdigest()[:16],
        "num_data": model.num_data,
        "likelihood": getattr(model.likelihood, "__qualname__", type(model.likelihood).__qualname__),
        "mu": getattr(prior, "mu", None),
        "simplified": getattr(prior, "simplified", None),
        "guide": type(guide).__name__,
        "temperature": getattr(guide, "temperature", None),
        "fixed gates": isinstance(prior, GatePrior) and _is_fixed(prior),
        "prior": _fingerprint(prior) if isinstance(prior, GatePrior) else None,
        **options,
        **{f"recipe.{key}": value for key, value in asdict(recipe).items()},
    }


@dataclass
class TrainingState:
    """Everything that changes while a run trains: what a checkpoint is made of, and put back into.

    Attributes:
        model: The model.
        guide: Its guide.
        optimizers: All optimizers, in their order.
        loader: The training loader. Its generators are kept where it has any (`generator`, or that of its `sampler`),
            and its `epoch` where it has one together with `set_epoch`.
        run: The settings that must agree, from :func:`describe_run`.
    """

    model: AbstractModel
    guide: nn.Module
    optimizers: list[Optimizer]
    loader: Iterable[Any]
    run: dict[str, Any]
    device: torch.device

    def capture(self, history: History, decided: Mapping[str, Tensor]) -> Checkpoint:
        """The state now.

        Arguments:
            history: The history up to now.
            decided: Statistics of batch norms for the decided gates, which a completed run ends with.
        """
        states = GeneratorStates.now(self.device)
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"guide.{k}": v for k, v in self.guide.state_dict().items()}
        tensors |= {f"rng.{k}": v for k, v in states.tensors.items()}
        tensors |= {f"loader.{i}": g.get_state() for i, g in enumerate(_generators(self.loader))}
        tensors |= {f"decided.{k}": v for k, v in decided.items()}
        rates = []
        for i, optimizer in enumerate(self.optimizers):
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
            for index, entries in optimizer.state_dict()["state"].items():
                kept = {k: v for k, v in entries.items() if v is not None}
                tensors |= {f"optimizer.{i}.{index}.{k}": torch.as_tensor(v) for k, v in kept.items()}
        facts = {
            "epoch": len(history),
            "run": self.run,
            "history": history.to_text(),
            "learning_rates": rates,
            "loader_epoch": getattr(self.loader, "epoch", getattr(self.loader, "_epoch", None)),
            **states.values,
        }
        return Checkpoint(tensors, facts)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put a state back.

        Raises:
            ValueError: If it is that of another network or other settings.
        """
        self._check(checkpoint)
        self.model.load_state_dict(checkpoint.part("model"))
        self.guide.load_state_dict(checkpoint.part("guide"))
        for i, (optimizer, rates) in enumerate(zip(self.optimizers, checkpoint.facts["learning_rates"], strict=True)):
            _restore_optimizer(optimizer, checkpoint.part(f"optimizer.{i}"), rates)
        values = {key: checkpoint.facts[key] for key in ("python", "numpy")}
        GeneratorStates(checkpoint.part("rng"), values).restore(self.device)
        for i, generator in enumerate(_generators(self.loader)):
            generator.set_state(checkpoint.part("loader")[str(i)])
        set_epoch = getattr(self.loader, "set_epoch", None)
        if set_epoch is not None:
            known = checkpoint.facts["loader_epoch"]
            set_epoch(checkpoint.epoch if known is None else known)

    def _check(self, checkpoint: Checkpoint) -> None:
        theirs = checkpoint.facts.get("run", {})
        for name, mine in json.loads(json.dumps(self.run)).items():
            if theirs.get(name) == mine:
                continue
            if name == "network":
                raise ValueError("the checkpoint is that of another network: names, shapes or gates differ.")
            raise ValueError(
                f"the checkpoint is that of a run with {name} {theirs.get(name)}, and this one has {mine}; resume "
                "with the same settings, or use another folder."
            )


def _generators(loader: Any) -> list[torch.Generator]:
    owners = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], rates: list[float]) -> None:
    content = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": content["param_groups"]})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        set_rate(group, rate)
        for parameter in group["params"]:
            own = optimizer.state.get(parameter, {})
            own.update({k: match_memory(v, parameter) for k, v in own.items() if isinstance(v, Tensor)})
