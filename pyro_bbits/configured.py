"""A float network made to compute what a bit configuration says: quantized weights, zeroed channels, fixed inputs."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pyro_bbits.bit_entries import FloatBits, LayerBits, TensorBits
from pyro_bbits.insertion.attention import expand_attention
from pyro_bbits.insertion.fixed import FIXED_LAYERS, FixedProducts, FixedQuantizer
from pyro_bbits.insertion.layers import QUANTIZED_LAYERS, gate_outputs, out_channels
from pyro_bbits.insertion.products import MATMUL, ProductForward, product_place
from pyro_bbits.quantizer import quantize_fixed

__all__ = ["ConfiguredNetworkBuilder"]


class ConfiguredNetworkBuilder:
    """Builds the network of a configuration.

    Arguments:
        tensors: The quantized tensors.
        layers: The quantized layers and products.
        float_layers: What multiplies in float.
        base: The lowest width, of weights that have no channels left.
    """

    def __init__(
        self,
        tensors: tuple[TensorBits, ...],
        layers: tuple[LayerBits, ...],
        float_layers: tuple[FloatBits, ...],
        base: int,
    ) -> None:
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.layers, self.float_layers, self.base = layers, float_layers, base

    def build(self, net: nn.Module) -> nn.Module:
        """A copy of a float network at the configuration, in evaluation mode.

        Raises:
            ValueError: As :meth:`~pyro_bbits.BitConfiguration.apply`.
        """
        net = expand_attention(copy.deepcopy(net), self._is_float)
        modules = dict(net.named_modules())
        self._check_fit(modules)
        products = self._watch_products(modules)
        with torch.no_grad():
            for layer in self.layers:
                if layer.is_product:
                    _fix_product(layer, self.tensors, products)
                else:
                    _fix_layer(modules, layer, self.tensors, self.base)
        return net.eval()

    def _watch_products(self, modules: Mapping[str, nn.Module]) -> dict[str, FixedProducts]:
        """One visitor for each module that makes products, also where they stay in float: they are counted."""
        names = self._product_names()
        products: dict[str, FixedProducts] = {}
        for owner, count in Counter(product_place(name)[0] for name in names).items():
            module: Any = modules[owner]
            products[owner] = FixedProducts(module, owner, count)
            module.forward = ProductForward(module, products[owner])
        return products

    def _product_names(self) -> list[str]:
        quantized = [layer.name for layer in self.layers if layer.kind == MATMUL]
        return quantized + [layer.name for layer in self.float_layers if layer.kind == MATMUL]

    def _is_float(self, path: str) -> bool:
        """Whether nothing inside a module is quantized."""
        return not any(layer.name.startswith(f"{path}." if path else "") for layer in self.layers)

    def _check_fit(self, modules: Mapping[str, nn.Module]) -> None:
        for layer in self.layers:
            if not layer.is_product:
                _check_module(layer, modules)
        for name in self._product_names():
            _check_product(name, modules)
        known = {layer.name for layer in self.layers} | {layer.name for layer in self.float_layers}
        for name, module in modules.items():
            if type(module) in QUANTIZED_LAYERS and known.isdisjoint(_paths_around(name)):
                raise ValueError(
                    f"the configuration says nothing of the {type(module).__name__} called {name!r}; "
                    "apply it to a float network of the same architecture."
                )


def _paths_around(name: str) -> Iterator[str]:
    """A module path, and those of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _check_product(name: str, modules: Mapping[str, nn.Module]) -> None:
    owner, _ = product_place(name)
    if owner not in modules:
        raise ValueError(
            f"the configuration has a product of {owner!r}, the network nothing of that name; "
            "apply it to a float network of the same architecture."
        )


def _check_module(layer: LayerBits, modules: Mapping[str, nn.Module]) -> None:
    module = modules.get(layer.name)
    if module is None or type(module).__name__ != layer.kind or type(module) not in QUANTIZED_LAYERS:
        found = "nothing of that name" if module is None else type(module).__name__
        raise ValueError(
            f"the configuration has a {layer.kind} called {layer.name!r}, the network {found}; "
            "apply it to a float network of the same architecture."
        )
    channels = out_channels(module)
    if channels != layer.channels:
        raise ValueError(
            f"layer {layer.name!r} has {channels} output channels, the configuration {layer.channels}; "
            "apply it to a network of the same size."
        )
    if layer.norm is None:
        return
    norm: Any = modules.get(layer.norm)
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        raise ValueError(f"the configuration has a batch norm called {layer.norm!r}, the network has none.")
    if norm.num_features != channels:
        raise ValueError(
            f"layer {layer.name!r} has {channels} output channels, its batch norm {layer.norm!r} {norm.num_features}."
        )


def _quantizer(entry: TensorBits, device: torch.device) -> FixedQuantizer:
    return FixedQuantizer(entry.bits, entry.beta, entry.signed).to(device)


def _fix_layer(
    modules: Mapping[str, nn.Module], layer: LayerBits, tensors: Mapping[str, TensorBits], base: int
) -> None:
    module: Any = modules[layer.name]
    assert layer.weight is not None
    entry = tensors[layer.weight]
    beta = torch.tensor(entry.beta, device=module.weight.device)
    # a weight without channels has no width of its own; what is left of it is masked below
    weight = quantize_fixed(module.weight, beta, entry.bits or base, signed=entry.signed)
    mask = torch.ones(layer.channels, device=weight.device, dtype=weight.dtype)
    mask[list(layer.removed)] = 0.0
    masked: Any = module
    if layer.norm is None:
        weight = gate_outputs(module, weight, mask)
    else:
        masked = modules[layer.norm]
        masked.weight = nn.Parameter(mask if masked.weight is None else masked.weight * mask)
    if getattr(masked, "bias", None) is not None:
        masked.bias = nn.Parameter(masked.bias * mask)
    module.weight = nn.Parameter(weight)  # a parameter of its own: tied layers may lose different channels
    if layer.input is not None:
        module.__class__ = FIXED_LAYERS[type(module)]
        module.input_quantizer = _quantizer(tensors[layer.input], weight.device)


def _fix_product(layer: LayerBits, tensors: Mapping[str, TensorBits], products: Mapping[str, FixedProducts]) -> None:
    owner, index = product_place(layer.name)
    visitor = products[owner]
    device = next((p.device for p in visitor.module.parameters()), torch.device("cpu"))
    if layer.input is not None:
        visitor.add(index, "left", _quantizer(tensors[layer.input], device))
    if layer.weight is not None:
        visitor.add(index, "right", _quantizer(tensors[layer.weight], device))
