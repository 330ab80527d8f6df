"""A frozen network from a float network of the same class, a manifest and tensors."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from pyro_bbits.deployment.bit_packing import pack_codes, unpack_codes
from pyro_bbits.deployment.freeze import drop_norms
from pyro_bbits.deployment.frozen import FROZEN_LAYERS, FrozenLayer, FrozenQuantizer, frozen_layers
from pyro_bbits.deployment.manifest import Manifest, PackedLayer
from pyro_bbits.insertion.attention import expand_attention
from pyro_bbits.insertion.fixed import FixedProducts
from pyro_bbits.insertion.layers import out_channels
from pyro_bbits.insertion.products import ProductForward

__all__ = ["packed_tensors", "rebuild"]


def packed_tensors(frozen: nn.Module, manifest: Manifest) -> dict[str, Tensor]:
    """All tensors of a frozen network as they are written, by name; the manifest describes it."""
    tensors = dict(_other_tensors(frozen))
    for name, module in frozen_layers(frozen).items():
        layer = manifest.layers[name]
        values = {key: getattr(module, key) for key in _keys(layer)}
        if layer.packed_bits is not None:
            values["codes"] = pack_codes(module.codes, layer.packed_bits)
        tensors |= {f"{name}.{key}": value for key, value in values.items()}
    return tensors


def rebuild(manifest: Manifest, tensors: Mapping[str, Tensor], net: nn.Module) -> nn.Module:
    """Turn a copy of a float network into the frozen one.

    Raises:
        ValueError: If they do not fit.
    """
    names = [*manifest.layers, *manifest.products]
    net = expand_attention(copy.deepcopy(net), lambda path: not any(_is_inside(name, path) for name in names))
    modules, others = dict(net.named_modules()), dict(tensors)
    folded = {layer.norm for layer in manifest.layers.values() if layer.norm is not None}
    for path in (*names, *folded, *manifest.sizes):
        if path not in modules:
            raise ValueError(f"the network has nothing called {path!r}")
    for name, layer in manifest.layers.items():
        if missing := [key for key in _keys(layer) if f"{name}.{key}" not in others]:
            raise ValueError(f"{name}.{missing[0]} is not in the file")
        _restore_layer(modules[name], name, layer, {key: others.pop(f"{name}.{key}") for key in _keys(layer)})
    drop_norms(net, {id(modules[norm]) for norm in folded})
    for name in manifest.products:
        _restore_products(manifest, name, modules[name])
    for name, size in manifest.sizes.items():
        norm: Any = modules[name]
        norm.num_features = size
    _restore_others(net, others)
    return net.requires_grad_(False).eval()


def _is_inside(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _keys(layer: PackedLayer) -> list[str]:
    """Names of the tensors of a layer in the file."""
    bias = {"none": [], "float": ["bias"], "codes": ["bias_codes"]}[layer.bias]
    return ["weight", *bias] if layer.packed_bits is None else ["codes", "scale", *bias]


def _restore_layer(module: Any, name: str, layer: PackedLayer, tensors: Mapping[str, Tensor]) -> None:
    if type(module).__name__ != layer.kind or type(module) not in FROZEN_LAYERS:
        raise ValueError(f"the file has a {layer.kind} called {name!r}, the network a {type(module).__name__}")
    if len(layer.shape) != module.weight.dim():
        raise ValueError(
            f"the weight of {name!r} has {len(layer.shape)} dimensions, the network's {module.weight.dim()}"
        )
    module.__class__ = FROZEN_LAYERS[type(module)]
    _resize(module, layer)
    module.bits, module.signed, module.weight_tensor = layer.bits, layer.signed, layer.weight_tensor
    module.norm, module.kept_norm, module.kept_norm_reason = layer.norm, layer.kept_norm, layer.kept_norm_reason
    module.input_quantizer = None if layer.input is None else layer.input.build()
    dead = torch.zeros(out_channels(module), dtype=torch.bool)
    dead[list(layer.dead)] = True
    for key, value in (("dead", dead), ("codes", None), ("scale", None), ("bias_codes", None)):
        module.register_buffer(key, value)
    module.weight = nn.Parameter(tensors.get("weight", torch.empty(0, dtype=getattr(torch, layer.dtype))))
    if layer.packed_bits is not None:
        codes = unpack_codes(tensors["codes"], layer.shape, layer.packed_bits, layer.bits, layer.signed)
        module.set_codes(codes, tensors["scale"])
    if layer.bias == "codes":
        module.set_bias_codes(tensors["bias_codes"])
    elif layer.bias == "float":
        module.bias = nn.Parameter(tensors["bias"])
    elif not isinstance(module, nn.Embedding):
        module.bias = None


def _resize(module: Any, layer: PackedLayer) -> None:
    """Let a layer know its channels, some of which may have been removed."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = layer.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = layer.shape
    else:
        module.groups, (first, second) = layer.groups, layer.shape[:2]
        grouped = second * layer.groups
        transposed = isinstance(module, _ConvTransposeNd)
        module.in_channels, module.out_channels = (first, grouped) if transposed else (grouped, first)


def _restore_products(manifest: Manifest, name: str, owner: Any) -> None:
    products = manifest.products[name]
    for key, quantizer in products.quantizers.items():
        owner.add_module(key, quantizer.build())
    owner.forward = ProductForward(owner, FixedProducts(owner, name, products.count))


def _other_tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers of everything but frozen layers and quantizers."""
    for path, module in net.named_modules():
        if isinstance(module, FrozenLayer | FrozenQuantizer):
            continue
        buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, value in {**module._parameters, **buffers}.items():
            if value is not None:
                yield f"{path}.{name}".removeprefix("."), value


def _restore_others(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = {name for name, _ in _other_tensors(net)}
    if expected != tensors.keys():
        name = sorted(expected ^ tensors.keys())[0]
        raise ValueError(f"{name} is only in the {'network' if name in expected else 'file'}")
    for name, value in tensors.items():
        path, _, key = name.rpartition(".")
        module = net.get_submodule(path)
        if key in module._parameters:
            module._parameters[key] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[key] = value
