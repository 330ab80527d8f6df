"""Weights from a local file into a network, with every reason why they may not fit."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["load_pretrained", "read_state_dict"]

NESTS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # of nn.DataParallel and of torch.compile
COUNTER = "num_batches_tracked"
SHOWN = 3


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file: safetensors, or what `torch.save` wrote; nothing in it is executed.

    A checkpoint that holds its state dict under `state_dict`, `model_state_dict` or `model` is unwrapped, and the
    prefixes of `nn.DataParallel` and `torch.compile` are taken off the names.

    Arguments:
        path: The file; its content, not its suffix, tells which kind it is.

    Returns:
        Tensors on the CPU by name.

    Raises:
        ValueError: If the file cannot be read, or does not hold tensors by name.
    """
    path = Path(path)
    content = _unwrap(_read(path))
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"the weights {path} must be tensors by name, a state dict; got {type(content).__name__}.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"the weights {path} must be tensors by name; {name!r} holds {type(value).__name__}. "
                "Save net.state_dict() alone."
            )
    return _without_prefixes(content)


def load_pretrained(net: nn.Module, path: str | Path, *, head: Literal["keep", "reset"] = "keep") -> None:
    """Load weights from a local file into a network, in place; names and shapes must be the network's own.

    Published weights in torchvision's names fit :class:`~pyro_bbits.models.ResNet18` and
    :class:`~pyro_bbits.models.MobileNetV2`. Only the counters `num_batches_tracked`, which files from before torch
    0.4.1 lack, may be missing. Nothing is loaded unless everything fits.

    Arguments:
        net: The network.
        path: A state dict, see :func:`read_state_dict`.
        head: `keep` loads all weights; `reset` leaves the last linear layer as it is, for another number of classes.

    Raises:
        ValueError: If the file cannot be read, its names or shapes are not the network's, or a weight is NaN or
            infinite.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from pyro_bbits.models import MLP
        >>> with TemporaryDirectory() as folder:
        ...     torch.save(MLP(4, 1000).state_dict(), f"{folder}/weights.pth")
        ...     load_pretrained(MLP(4, 10), f"{folder}/weights.pth", head="reset")
        ...     load_pretrained(MLP(4, 10), f"{folder}/weights.pth")
        Traceback (most recent call last):
            ...
        ValueError: ...weights.pth does not fit MLP: its head 'head' has 1000 outputs, that of the network 10; ...
    """
    if head not in ("keep", "reset"):
        raise ValueError(f"head must be 'keep' or 'reset'; got {head!r}.")
    state, own, last = read_state_dict(path), net.state_dict(), _head(net)
    if head == "reset":
        if last is None:
            raise ValueError(f"{type(net).__name__} has no linear layer whose weights could be reset.")
        kept = {name: tensor for name, tensor in own.items() if name.startswith(f"{last}.")}
        state = {name: t for name, t in state.items() if not name.startswith(f"{last}.")} | kept
    state |= {name: t for name, t in own.items() if name.endswith(f".{COUNTER}") and name not in state}
    if reason := _misfit(state, own, last):
        raise ValueError(f"{path} does not fit {type(net).__name__}: {reason}.")
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path} holds NaN or infinite weights: {_some(bad)}.")
    net.load_state_dict(state)


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # the JSON header of safetensors follows its length, a 64-bit number
            return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights {path} cannot be read: {error}.") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may fail anywhere in the reader
        raise ValueError(
            f"the weights {path} cannot be read: they are neither safetensors nor a state dict saved by torch.save "
            f"without other objects ({type(error).__name__})."
        ) from error


def _unwrap(content: Any) -> Any:
    for key in NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return content[key]
    return content


def _without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stripped = dict(state)
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in stripped)), None):
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
    return stripped


def _head(net: nn.Module) -> str | None:
    """Module path of the last linear layer."""
    return next((name for name, m in reversed(list(net.named_modules())) if isinstance(m, nn.Linear)), None)


def _misfit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], head: str | None) -> str | None:
    """Why a state dict is not one of the network, whose own is given."""
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    if missing or extra:
        parts = [f"it lacks {_some(missing)}"] if missing else []
        parts += [f"it has {_some(extra)}, which the network does not"] if extra else []
        return "; ".join(parts)
    wrong = [name for name, tensor in own.items() if state[name].shape != tensor.shape]
    if wrong and head is not None and all(name in (f"{head}.weight", f"{head}.bias") for name in wrong):
        theirs, ours = len(state[f"{head}.weight"]), len(own[f"{head}.weight"])
        if theirs != ours:
            return (
                f"its head {head!r} has {theirs} outputs, that of the network {ours}; "
                "load_pretrained(..., head='reset'), or --pretrained-head reset, keeps the body and leaves the "
                "network's head as it is"
            )
    shapes = [f"{name} is {tuple(state[name].shape)}, in the network {tuple(own[name].shape)}" for name in wrong]
    return _some(shapes) if wrong else None


def _some(names: Iterable[str]) -> str:
    """The first few of many."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
