"""Put residual quantizers and channel gates into any network."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pyro_bbits.insertion.attention import expand_attention
from pyro_bbits.insertion.building import NetworkBuilder
from pyro_bbits.insertion.fusion import find_fusions
from pyro_bbits.insertion.inputs import Inputs
from pyro_bbits.insertion.layers import QUANTIZED_LAYERS
from pyro_bbits.insertion.network import QuantizedNetwork
from pyro_bbits.insertion.probe import Wiring, probe
from pyro_bbits.insertion.ranges import set_mse_ranges
from pyro_bbits.insertion.selection import Patterns, Selection
from pyro_bbits.insertion.structure import FloatLayer
from pyro_bbits.insertion.trace import trace
from pyro_bbits.insertion.wires import Trace
from pyro_bbits.ladder import BitLadder

__all__ = ["Ranges", "quantize"]

Ranges = Literal["max", "mse"]


def quantize(
    net: nn.Module,
    example_inputs: Any,
    *,
    bits: Sequence[int] | BitLadder = (2, 4, 8, 16, 32),
    include: Patterns = "*",
    exclude: Patterns = (),
    ranges: Ranges = "max",
) -> QuantizedNetwork:
    """Put a gated quantizer on every weight and every activation that is multiplied in a network.

    The network is copied; the original is not touched. Quantized are linear layers, convolutions and transposed
    convolutions of one to three dimensions, embeddings, and products of two activations (`@`, `matmul`, `bmm`,
    `einsum`, `scaled_dot_product_attention`); :class:`torch.nn.MultiheadAttention` is spelled out in these. A tensor
    that is read several times has one quantizer. Sums, concatenations and the network's own input stay as they are.
    What multiplies otherwise stays in float, is listed in :attr:`QuantizedNetwork.float_layers` and counts as
    32 x 32 bit.

    Output channels get a gate wherever a closed channel is exactly zero for everything that reads it;
    :attr:`LayerInfo.refused` tells why not elsewhere.

    Ranges and signs are calibrated on the example inputs, in the mode (train or eval) the network is in.

    Arguments:
        net: Any network whose inputs have the batch in dimension 0.
        example_inputs: A tensor (the only argument), a tuple of arguments or a dict of keyword arguments; a few tens of
            real samples.
        bits: The ladder of bit widths.
        include: Shell-style pattern, or several, of module paths to quantize. A path stands for all that is inside it.
        exclude: Of module paths that stay in float, e.g. `("head", "blocks.*.attention")`; wins over `include`.
        ranges: Where ranges start: `max`, the largest magnitude seen, which clips nothing; `mse`, the share of it at
            which 4 bits have the least squared error, better where few bits are expected and the weights are trained.

    Returns:
        The quantized network. With all gates open at 32 bits it equals the original to float precision.

    Raises:
        TypeError: If `net` is no module, or one that cannot be changed (compiled, scripted, wrapped).
        ValueError: If `ranges` is none of the two, the examples are empty or not finite, no layer can be quantized, a
            pattern matches nothing, or a layer's weights are not finite.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> network = quantize(net, torch.rand(16, 4))
        >>> network.layout.tensors
        ('0.weight', '2.weight', '2.input')
        >>> [layer.refused for layer in network.layers]
        [None, "it feeds the network's output"]
        >>> network(torch.rand(16, 4), gates=network.open_gates()).shape
        torch.Size([16, 2])
    """
    ladder = _ladder(bits)
    if ranges not in get_args(Ranges):
        raise ValueError(f"ranges must be one of {', '.join(get_args(Ranges))}; got {ranges!r}.")
    _check_net(net)
    inputs, selection = Inputs.of(example_inputs), Selection.of(include, exclude)
    net = expand_attention(_copy(net), selection.excluded)
    _check_weights(net)
    traced = _run_trace(net, inputs)
    float_layers = selection.apply(net, traced)
    _warn_of_float_layers(float_layers, sum(wire.macs for wire in traced.wires.values() if wire.is_quantized))
    wiring, fusions = _run_probe(net, traced, inputs), find_fusions(net, inputs)
    builder = NetworkBuilder(net, traced, wiring, ladder)
    builder.fuse(fusions)
    parts = builder.quantizers(), builder.layout, builder.layers, builder.context, float_layers, builder.alive()
    network = QuantizedNetwork(net, *parts)
    if ranges == "mse":
        set_mse_ranges(network, inputs)
    return network


def _ladder(bits: Any) -> BitLadder:
    if isinstance(bits, BitLadder):
        return bits
    if not isinstance(bits, Sequence) or isinstance(bits, str):
        raise TypeError(f"bits must be a sequence of widths, e.g. (2, 4, 8); got {bits!r}.")
    return BitLadder(tuple(bits))


def _check_net(net: Any) -> None:
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module; got {type(net).__name__}.")
    if isinstance(net, DataParallel | DistributedDataParallel):
        raise TypeError(f"net is wrapped in {type(net).__name__}; quantize the network inside it, net.module.")
    for name, module in net.named_modules():
        if isinstance(module, QuantizedNetwork) or type(module) in QUANTIZED_LAYERS.values():
            raise TypeError(f"{name or 'net'} is quantized already; quantize the float network.")
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{name or 'net'} is a script module, whose code is fixed; quantize the module it is from.")
        if isinstance(module, torch._dynamo.OptimizedModule):
            raise TypeError(f"{name or 'net'} is compiled; quantize the network itself and compile the result.")


def _copy(net: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(net)
    except RuntimeError as error:
        raise ValueError(
            f"the network cannot be copied ({error}); a tensor that is computed from parameters, as "
            "torch.nn.utils.weight_norm keeps one, has to be made a parameter first (remove_weight_norm)."
        ) from error


def _check_weights(net: nn.Module) -> None:
    for name, parameter in net.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"parameter {name!r} is not initialized yet; run the network once before quantizing it.")
        if not parameter.isfinite().all():
            raise ValueError(
                f"parameter {name!r} holds NaN or infinite values; quantize a network with finite weights."
            )


def _run_trace(net: nn.Module, inputs: Inputs) -> Trace:
    try:
        return trace(net, inputs)
    except Exception as error:
        raise ValueError(
            f"the network could not be run on example_inputs ({type(error).__name__}: {error}); "
            "give inputs it accepts: a tensor, a tuple of arguments or a dict of keyword arguments."
        ) from error


def _run_probe(net: nn.Module, traced: Trace, inputs: Inputs) -> Wiring:
    try:
        return probe(net, traced, inputs)
    except Exception as error:
        if type(error) is ValueError and "exclude=" in str(error):
            raise
        raise ValueError(
            "the wiring could not be found: the network runs on example_inputs, but not on another number of them in "
            f"evaluation mode ({type(error).__name__}: {error}). Dimension 0 of every input tensor must be the batch, "
            "and no batch size may be kept in the network."
        ) from error


def _warn_of_float_layers(float_layers: Sequence[FloatLayer], quantized: int) -> None:
    """What stays in float without the user's wish should not be found out from the cost."""
    unasked = [layer for layer in float_layers if layer.macs and not layer.is_excluded]
    uncalled = [layer.name for layer in float_layers if not layer.macs and not layer.is_excluded]
    if uncalled:
        warnings.warn(
            f"{', '.join(uncalled[:5])}{' and more' * (len(uncalled) > 5)} stay in float: not called on the example "
            "inputs, or of a class that is not supported.",
            stacklevel=3,
        )
    if unasked:
        total = quantized + sum(layer.macs for layer in float_layers)
        share = 100 * sum(layer.macs for layer in unasked) / total
        names = ", ".join(f"{layer.name or 'the network'} ({layer.reason})" for layer in unasked[:5])
        more = f" and {len(unasked) - 5} more" if len(unasked) > 5 else ""
        warnings.warn(f"{share:.3g} % of the multiplications stay in float: {names}{more}.", stacklevel=3)
