"""The packed file: a frozen network with its codes in as few bits as they need, and its loader."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pyro_bbits.deployment.frozen import FrozenLayer, FrozenQuantizer
from pyro_bbits.deployment.manifest import Manifest
from pyro_bbits.deployment.rebuilding import packed_tensors, rebuild
from pyro_bbits.files import save_tensors_atomically

__all__ = ["PackedSize", "float_bytes", "load_packed", "save_packed"]

ENTRY = "pyro-bbits"
"""The entry of the header that holds the manifest."""


@dataclass(frozen=True)
class PackedSize:
    """How large a packed file is.

    Attributes:
        file: Its bytes.
        float32: Bytes of the numbers of the same network in float32.
    """

    file: int
    float32: int

    @property
    def ratio(self) -> float:
        """How many times smaller the file is."""
        return self.float32 / self.file

    def __str__(self) -> str:
        return f"{self.file:,} bytes, {self.ratio:.1f} times smaller than {self.float32:,} in float32"


def float_bytes(net: nn.Module) -> int:
    """Bytes of a network's parameters and running statistics in float32: what a plain file of it holds.

    Of a frozen layer its weight and bias count, not the codes that they repeat.
    """
    count = sum(p.numel() for p in net.parameters())
    for module in net.modules():
        if not isinstance(module, FrozenLayer | FrozenQuantizer):
            count += sum(b.numel() for b in module.buffers(recurse=False) if b.is_floating_point())
    return 4 * count


def save_packed(frozen: nn.Module, path: str | Path) -> PackedSize:
    """Write a frozen network as one safetensors file, atomically; integer codes are packed.

    The header's entry `pyro-bbits` is JSON: `manifest`, with class, shape, widths, signs and input quantizer of each
    layer (:class:`~pyro_bbits.deployment.manifest.Manifest`), and `sha256`, of the manifest and all tensors. Tensors of
    a layer are `<path>.codes` (bytes as ONNX packs INT2, INT4, INT8, UINT2, ...: the first code in the lowest bits),
    `<path>.scale`, `<path>.bias` or `<path>.bias_codes`, and `<path>.weight` where it has no codes. All other
    parameters and buffers have their own names.

    Arguments:
        frozen: What :func:`~pyro_bbits.deployment.freeze` or :func:`~pyro_bbits.deployment.remove_channels` returned.
        path: The file.

    Returns:
        Its size.

    Raises:
        ValueError: If the network holds no frozen layer.
        OSError: If the file cannot be written; what was there before is kept.
    """
    manifest = Manifest.of(frozen)
    tensors = packed_tensors(frozen, manifest)
    content = manifest.model_dump(by_alias=True)
    entry = {"manifest": content, "sha256": _digest(manifest, tensors)}
    save_tensors_atomically(path, tensors, {ENTRY: json.dumps(entry, sort_keys=True)})
    return PackedSize(Path(path).stat().st_size, float_bytes(frozen))


def load_packed(path: str | Path, net: nn.Module) -> nn.Module:
    """Rebuild a frozen network from its packed file.

    Arguments:
        path: What :func:`save_packed` wrote.
        net: A float network of the class that was frozen, with the same options; it may be on the meta device, for its
            numbers do not matter, and shapes come from the file. It is not changed.

    Returns:
        The frozen network on the CPU, in evaluation mode, equal to the one that was saved.

    Raises:
        ValueError: If the file cannot be read, is damaged or something else, or does not fit the network.
    """
    manifest, tensors = _read(path)
    try:
        return rebuild(manifest, tensors, net)
    except (AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not fit this network: {error}; give a float network of the class and options that the saved "
            "one had."
        ) from error


def _digest(manifest: Manifest, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(manifest.model_dump(by_alias=True), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: str | Path) -> tuple[Manifest, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            entry = json.loads((file.metadata() or {})[ENTRY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        manifest = Manifest.model_validate_json(json.dumps(entry["manifest"]))
        expected = entry["sha256"]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is no packed network, or of another version: {place}: {first['msg']}.") from None
    except KeyError as error:
        raise ValueError(f"{path} is no packed network: it has no {error}.") from None
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a packed network: {error}.") from error
    if _digest(manifest, tensors) != expected:
        raise ValueError(f"{path} is damaged: its content is not what was written.")
    return manifest, tensors
