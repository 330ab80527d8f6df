"""BOPs that credit zeros inside quantized tensors: a product with a zero factor is not counted."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits.configuration import BitConfiguration
from pyro_bbits.cost import FLOAT_BITS, INPUT_BITS
from pyro_bbits.inference.evaluation import device_of

__all__ = ["nonzero_products", "zero_crediting_bops"]


def nonzero_products(layer: Any, x: Tensor, outputs: Tensor | None = None) -> float:
    """Multiplications of two numbers other than zero that a layer does per sample, padding not among them.

    Arguments:
        layer: A linear or convolutional layer.
        x: Its input as it is multiplied, `(N, ...)`.
        outputs: `(C,)` 0 for output channels that are removed; None keeps all.

    Raises:
        TypeError: If it is another layer.
    """
    weight, read = (tensor.ne(0).to(torch.float32) for tensor in (layer.weight, x))
    if outputs is not None:
        weight = weight * outputs.to(weight).view(-1, *[1] * (weight.dim() - 1))
    if isinstance(layer, nn.Linear):
        counts = F.linear(read, weight)
    elif isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        counts = F.conv2d(read, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    else:
        raise TypeError(
            f"zeros are counted in linear layers and two-dimensional convolutions; got {type(layer).__name__}."
        )
    return counts.double().sum().item() / len(x)


def zero_crediting_bops(net: nn.Module, configuration: BitConfiguration, rows: Iterable[Any]) -> list[dict[str, Any]]:
    """BOPs of each layer and of the whole network, as ever and without products that have a zero in them.

    Arguments:
        net: The configured network: `configuration.apply(...)`.
        configuration: Its configuration.
        rows: Batches `(x, y)` that the density of activations is measured on.

    Returns:
        A row for each layer and one for the network: relative BOPs in percent of the whole network at 32 x 32 bits, the
        same with zeros credited, and the share of nonzero weights and inputs in percent.
    """
    found: dict[str, list[tuple[float, float, int]]] = {layer.name: [] for layer in configuration.layers}
    handles = []
    for layer in configuration.layers:
        module, kept = net.get_submodule(layer.name), torch.ones(layer.channels)
        kept[list(layer.removed)] = 0.0

        def look(module: nn.Module, args: Any, *, name: str = layer.name, kept: Tensor = kept) -> None:
            quantizer = getattr(module, "input_quantizer", None)
            x = args[0] if quantizer is None else quantizer(args[0])
            found[name].append((nonzero_products(module, x, kept.to(x.device)), x.ne(0).double().mean().item(), len(x)))

        handles.append(module.register_forward_pre_hook(look))
    try:
        with torch.no_grad():
            for x, _ in rows:
                net.eval()(x.to(device_of(net)))
    finally:
        for handle in handles:
            handle.remove()
    return _table(net, configuration, {name: _mean(values) for name, values in found.items()})


def _mean(values: list[tuple[float, float, int]]) -> tuple[float, float]:
    """Products and density, mean over samples."""
    total = sum(size for *_, size in values)
    products, density = (sum(value[i] * value[2] for value in values) / total for i in (0, 1))
    return products, density


def _table(
    net: nn.Module, configuration: BitConfiguration, means: dict[str, tuple[float, float]]
) -> list[dict[str, Any]]:
    bits, rows = configuration.bits(), list[dict[str, Any]]()
    left = sum(layer.macs for layer in configuration.float_layers)
    full = FLOAT_BITS**2 * (sum(layer.macs for layer in configuration.layers) + left)
    for layer in configuration.layers:
        weight, read = (INPUT_BITS if name is None else bits[name] for name in (layer.weight, layer.input))
        products, density = means[layer.name]
        values: Any = net.get_submodule(layer.name).weight
        cost = {"relative BOPs %": 100 * layer.bops / full, "zeros credited %": 100 * weight * read * products / full}
        shares = {"nonzero weights %": 100 * values.ne(0).double().mean().item(), "nonzero inputs %": 100 * density}
        rows.append({"layer": layer.name, **cost, **shares})
    rest = 100 * FLOAT_BITS**2 * left / full
    whole = {name: rest + sum(row[name] for row in rows) for name in ("relative BOPs %", "zeros credited %")}
    return [*rows, {"layer": "whole network", **whole, "nonzero weights %": "", "nonzero inputs %": ""}]
