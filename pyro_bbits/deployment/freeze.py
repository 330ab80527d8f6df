"""From a float network and a bit configuration to a plain network of integer codes and scales."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bbits.configuration import BitConfiguration, LayerBits, TensorBits
from pyro_bbits.deployment.folding import fold_factors, unfoldable
from pyro_bbits.deployment.frozen import FROZEN_LAYERS, FrozenQuantizer, code_dtype, scale_outputs
from pyro_bbits.insertion.fixed import FIXED_LAYERS
from pyro_bbits.insertion.inputs import Inputs
from pyro_bbits.insertion.network import QuantizedNetwork
from pyro_bbits.insertion.products import product_place
from pyro_bbits.kernels.grid import half_width
from pyro_bbits.ladder import FLOAT32_BITS

__all__ = ["drop_norms", "freeze", "kept_norms"]

FLOAT_CLASSES = {fixed: plain for plain, fixed in FIXED_LAYERS.items()}
BIAS_LIMIT = 2**31 - 1


def freeze(
    net: nn.Module, configuration: BitConfiguration, *, example_inputs: Any = None, snap_biases: bool = False
) -> nn.Module:
    r"""Freeze a trained network at a bit configuration: ordinary layers with integer codes, scales and biases.

    The result computes what `configuration.apply(net)` computes, up to float rounding. It is a copy of the network in
    evaluation mode, its own classes kept; no gates, no hooks, no Pyro. Every quantized layer is a
    :class:`~pyro_bbits.deployment.FrozenLayer` at its old module path: a subclass of `nn.Conv2d` (or `nn.Linear`, ...)
    with

    * `codes` (integers shaped like the weight), `scale` (a scalar, or one per output channel), `bits`, `signed`;
    * `bias`, float, or None;
    * `input_quantizer`, a :class:`~pyro_bbits.deployment.FrozenQuantizer` (`bits`, `scale`, `signed`, `low`, `high`),
      or None where the layer reads the network's own input, or indices;
    * `weight`, a parameter that repeats the codes: `weight = codes * scale`;
    * `dead`, which output channels are removed: their codes and bias are exactly zero.

    A batch norm right behind a layer is folded: its factor goes into the scales of the output channels, its shift into
    the bias, and an `nn.Identity` takes its place; the codes stay the same integers (a negative factor turns their
    sign). A norm that cannot be folded stays; :func:`kept_norms` lists them. Weights above 24 bits have no codes.
    Operands of products of activations, such as attention's, pass a quantizer as well: submodules `matmul0_left`,
    `matmul0_right`, ... of the module that makes the product; there an operand without a submodule stays as it is.

    Use it in evaluation mode: with its norms folded it cannot be trained further.

    Arguments:
        net: The float network with trained weights, e.g. after `net.load_state_dict(quantized.net.state_dict())`.
        configuration: Widths, ranges and removed channels.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments. Needed only to fold the norms of
            a network whose code depends on values, where the code alone does not tell what reads a layer.
        snap_biases: Round each bias to the grid `input scale * weight scale`, as runtimes do that add it to integer
            sums; its int32 codes are then `bias_codes`. Biases of layers with a float input or weight, or too large for
            int32, stay.

    Returns:
        The frozen network, in evaluation mode.

    Raises:
        TypeError: If `net` is no float network.
        ValueError: If the configuration does not fit the network.

    Example:
        >>> from pyro_bbits import quantize
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> network = quantize(net, torch.rand(16, 4), bits=(2, 4, 8))
        >>> frozen = freeze(net, BitConfiguration.from_gates(network, network.open_gates()))
        >>> frozen[0].codes.dtype, frozen[0].scale.shape, frozen[1]
        (torch.int8, torch.Size([8]), Identity())
    """
    if isinstance(net, QuantizedNetwork):
        raise TypeError(
            "freeze needs the float network, not the quantized one; load its weights first: "
            "net.load_state_dict(quantized.net.state_dict())."
        )
    frozen = configuration.apply(net)
    tensors = {tensor.name: tensor for tensor in configuration.tensors}
    norms = {layer.name: layer.norm for layer in configuration.layers if layer.norm is not None}
    reasons = unfoldable(net, norms, None if example_inputs is None else Inputs.of(example_inputs))
    modules = dict(frozen.named_modules())
    with torch.no_grad():
        for layer in configuration.layers:
            if layer.is_product:
                _freeze_product(modules, layer, tensors)
            else:
                _freeze_layer(modules, layer, tensors, configuration.ladder[0], reasons.get(layer.name))
        drop_norms(frozen, {id(modules[norm]) for layer, norm in norms.items() if layer not in reasons})
        if snap_biases:
            for module in modules.values():
                if type(module) in FROZEN_LAYERS.values():
                    _snap_bias(module)
    return frozen.requires_grad_(False).eval()


def kept_norms(frozen: nn.Module) -> dict[str, str]:
    """Batch norms of a frozen network that were not folded, by module path, with the reason."""
    known = {
        layer.kept_norm: layer.kept_norm_reason
        for layer in frozen.modules()
        if type(layer) in FROZEN_LAYERS.values() and layer.kept_norm is not None
    }
    return {
        name: str(known.get(name, "no quantized layer stands right before it"))
        for name, module in frozen.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }


def _quantizer(entry: TensorBits, device: torch.device) -> FrozenQuantizer:
    return FrozenQuantizer(entry.bits, entry.beta, entry.signed, entry.name).to(device)


def _freeze_product(modules: Mapping[str, nn.Module], layer: LayerBits, tensors: Mapping[str, TensorBits]) -> None:
    owner, index = product_place(layer.name)
    for side, name in (("left", layer.input), ("right", layer.weight)):
        if name is not None:
            old = modules[owner].get_submodule(f"matmul{index}_{side}")
            device = next(old.buffers()).device
            modules[owner].add_module(f"matmul{index}_{side}", _quantizer(tensors[name], device))


def _freeze_layer(
    modules: Mapping[str, nn.Module],
    layer: LayerBits,
    tensors: Mapping[str, TensorBits],
    base: int,
    reason: str | None,
) -> None:
    module: Any = modules[layer.name]
    assert layer.weight is not None
    entry, device = tensors[layer.weight], module.weight.device
    module.__class__ = FROZEN_LAYERS[FLOAT_CLASSES.get(type(module), type(module))]
    module.bits, module.signed, module.weight_tensor = entry.bits or base, entry.signed, entry.name
    module.input_quantizer = None if layer.input is None else _quantizer(tensors[layer.input], device)
    folded = layer.norm is not None and reason is None
    module.norm = layer.norm if folded else None
    module.kept_norm, module.kept_norm_reason = (None, None) if folded else (layer.norm, reason)
    dead = torch.zeros(layer.channels, dtype=torch.bool, device=device)
    if folded or layer.norm is None:  # else the norm behind it silences them, and others may read them
        dead[list(layer.removed)] = True
    for name, value in (("dead", dead), ("codes", None), ("scale", None), ("bias_codes", None)):
        module.register_buffer(name, value)
    factor = _fold(module, modules[layer.norm]) if folded and layer.norm is not None else None
    _set_weight(module, entry.beta, factor)


def _fold(module: Any, norm: nn.Module) -> Tensor:
    """Take the norm's shift into the bias; the factor is returned."""
    factor, shift = fold_factors(norm, module.bias)
    module.bias = nn.Parameter(shift.masked_fill(module.dead, 0.0).to(module.weight.dtype))
    return factor.masked_fill(module.dead, 0.0)


def _set_weight(module: Any, beta: float, factor: Tensor | None) -> None:
    """Codes and scales from a weight that lies on its grid, its output channels times a factor."""
    if module.bits > FLOAT32_BITS:
        if factor is not None:
            module.weight = nn.Parameter(scale_outputs(module, module.weight.double(), factor).to(module.weight.dtype))
        return
    step = torch.tensor(beta, device=module.weight.device) / half_width(module.bits, module.signed)
    codes = (module.weight.double() / step.double()).round()
    if factor is None:
        scale = step
    else:
        scale = (factor * step.double()).float()
        codes = scale_outputs(module, codes, (scale != 0).double())
        scale = torch.where(scale == 0, step, scale)
        if module.signed:  # runtimes want positive scales
            codes, scale = scale_outputs(module, codes, scale.sign().double()), scale.abs()
    module.set_codes(codes.to(code_dtype(module.bits, module.signed)), scale)


def _snap_bias(module: Any) -> None:
    step = module.bias_scale
    if step is None or module.bias is None:
        return
    codes = (module.bias.double() / step.double()).round()
    if codes.abs().max() <= BIAS_LIMIT:
        module.set_bias_codes(codes.to(torch.int32))


def drop_norms(net: nn.Module, norms: set[int]) -> None:
    """Put an identity in the place of modules, known by their `id`, under all their names."""
    for module in list(net.modules()):
        for name, child in list(module._modules.items()):
            if id(child) in norms:
                setattr(module, name, nn.Identity())
