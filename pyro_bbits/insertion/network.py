"""Put residual quantizers and channel gates into any network."""

import copy
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from pyro_bbits.gates import ChannelGroup, GateLayout, GateValues, Liveness
from pyro_bbits.insertion.context import PassContext
from pyro_bbits.insertion.layers import GATED_NORMS, QUANTIZED_LAYERS
from pyro_bbits.insertion.probe import Channel, Wiring, probe
from pyro_bbits.insertion.structure import LayerInfo
from pyro_bbits.insertion.trace import Inputs, Wire, trace
from pyro_bbits.ladder import BitLadder
from pyro_bbits.quantizer import Quantizers

__all__ = ["QuantizedNetwork", "quantize"]


class QuantizedNetwork(nn.Module):
    """A network whose weights and activations pass through gated quantizers.

    `network(*inputs, gates=...)` calls the user's own forward with the given gate values. The user's network is
    `network.net`: its parameters keep their names, so `network.net.state_dict()` loads into the float network and back.

    Attributes:
        net: The network itself, its layers turned into quantized ones.
        quantizers: Learned ranges and signs of the `T` quantized tensors.
        layout: Names and order of the gates.
        layers: What is known of each quantized layer, in the order of the calls.
        skipped: Multiplying layers that were left in float, with the reason.
    """

    def __init__(
        self,
        net: nn.Module,
        quantizers: Quantizers,
        layout: GateLayout,
        layers: Sequence[LayerInfo],
        context: PassContext,
        skipped: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.net, self.quantizers = net, quantizers
        self.layout, self.layers, self.skipped = layout, tuple(layers), dict(skipped)
        self._context = context
        self.training = net.training

    def forward(self, *args: Any, gates: GateValues, **kwargs: Any) -> Any:
        """Call the network with gate values.

        Arguments:
            args: Positional arguments of the network.
            gates: `(C,)` channel gates and `(T, R)` residual gates.
            kwargs: Keyword arguments of the network.

        Returns:
            What the network returns.

        Raises:
            ValueError: If the gates do not fit the layout.
        """
        shapes = tuple(gates.channels.shape), tuple(gates.tensors.shape)
        expected = (self.layout.num_channels,), (len(self.layout.tensors), len(self.layout.ladder.residuals))
        if shapes != expected:
            raise ValueError(f"gates must have shapes {expected}: (channels,), (tensors, rungs - 1); got {shapes}.")
        quantizers = self.quantizers
        try:
            self._context.fill(gates, quantizers.ranges, quantizers.signed, quantizers.ladder)
            return self.net(*args, **kwargs)
        finally:
            self._context.clear()

    def open_gates(self) -> GateValues:
        """All gates open, on the device of the network."""
        device = self.quantizers.log_range.device
        return GateValues(*(g.to(device) for g in self.layout.open_gates()))


def quantize(
    net: nn.Module,
    example_inputs: Any,
    *,
    bits: Sequence[int] | BitLadder = (2, 4, 8, 16, 32),
    exclude: str | Sequence[str] = (),
) -> QuantizedNetwork:
    """Put a gated quantizer on every weight and every activation that enters a multiplying layer of a network.

    The network is copied; the original is not touched. :class:`~torch.nn.Linear`, :class:`~torch.nn.Conv1d` and
    :class:`~torch.nn.Conv2d` are quantized. A tensor that feeds several layers has one quantizer. Sums, concatenations
    and the network's own input stay as they are. Output channels get a gate wherever a closed channel is exactly zero
    for everything that reads it; :attr:`LayerInfo.refused` tells why not elsewhere.

    Ranges and signs are calibrated on the example inputs, as the largest magnitude seen, in the mode (train or eval)
    the network is in.

    Arguments:
        net: Any network whose forward handles a batch in dimension 0.
        example_inputs: A tensor (the only argument), a tuple of arguments or a dict of keyword arguments; a few tens of
            real samples.
        bits: The ladder of bit widths.
        exclude: Shell-style pattern, or several, of module paths that stay in float, e.g. `("head.*",)`.

    Returns:
        The quantized network. With all gates open at 32 bits it equals the original to float precision.

    Raises:
        ValueError: If the examples are empty or not finite, if no layer can be quantized, or if a layer's weights are
            not finite.

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
    ladder = bits if isinstance(bits, BitLadder) else BitLadder(tuple(bits))
    inputs = Inputs.of(example_inputs)
    net = copy.deepcopy(net)
    _check_weights(net)
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    wires, skipped = _select(net, _run_trace(net, inputs), patterns)
    wiring = probe(net, wires, inputs)
    builder = _Builder(net, wires, wiring, ladder)
    return QuantizedNetwork(net, builder.quantizers(), builder.layout, builder.layers, builder.context, skipped)


def _check_weights(net: nn.Module) -> None:
    for name, parameter in net.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"parameter {name!r} is not initialized yet; run the network once before quantizing it.")
        if not parameter.isfinite().all():
            raise ValueError(
                f"parameter {name!r} holds NaN or infinite values; quantize a network with finite weights."
            )


def _run_trace(net: nn.Module, inputs: Inputs) -> dict[str, Wire]:
    try:
        return trace(net, inputs)
    except Exception as error:
        raise ValueError(
            f"the network could not be run on example_inputs ({type(error).__name__}: {error}); "
            "give inputs it accepts: a tensor, a tuple of arguments or a dict of keyword arguments."
        ) from error


def _select(net: nn.Module, wires: dict[str, Wire], exclude: Sequence[str]) -> tuple[dict[str, Wire], dict[str, str]]:
    """Split the layers into those to quantize and those left in float, with the reason."""
    skipped = {}
    for name, module in net.named_modules():
        if isinstance(module, tuple(QUANTIZED_LAYERS)) and type(module) not in QUANTIZED_LAYERS:
            skipped[name] = f"its class {type(module).__name__} is not supported"
        elif type(module) in QUANTIZED_LAYERS and name not in wires:
            skipped[name] = "it is not called on the example inputs"
    for pattern in exclude:
        matched = [name for name in wires if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"exclude pattern {pattern!r} matches no layer; the layers are {', '.join(wires)}.")
        skipped |= dict.fromkeys(matched, f"excluded by {pattern!r}")
    kept = {name: wire for name, wire in wires.items() if name not in skipped}
    if not kept:
        supported = ", ".join(kind.__name__ for kind in QUANTIZED_LAYERS)
        raise ValueError(f"the network has no layer to quantize; supported are {supported}, used in its forward.")
    return kept, skipped


class _Builder:
    """Assign rows and channel gates, then turn the layers of a (copied) network into quantized ones."""

    def __init__(self, net: nn.Module, wires: Mapping[str, Wire], wiring: Wiring, ladder: BitLadder) -> None:
        self.wires, self.wiring, self.ladder = wires, wiring, ladder
        self.modules = dict(net.named_modules())
        self.context = PassContext()
        self.rows: dict[Any, int] = {}
        self.tensors: list[str] = []
        self.ranges: list[float] = []
        self.signed: list[bool] = []
        weights = {name: self._weight_row(wire) for name, wire in wires.items()}
        inputs = {name: self._input_row(wire) for name, wire in wires.items()}
        self._refuse_tied(weights)
        prunable = [name for name in wires if name not in wiring.refused]
        groups = tuple(ChannelGroup(n, weights[n], wires[n].out_channels) for n in prunable)
        self.layout = GateLayout(ladder, tuple(self.tensors), groups)
        self.layers = [self._describe(wire, weights[wire.name], inputs[wire.name]) for wire in wires.values()]
        for layer in self.layers:
            self._convert(layer)

    def quantizers(self) -> Quantizers:
        device = next(iter(self.wires.values())).module.weight.device
        return Quantizers(self.ranges, self.signed, self.ladder).to(device)

    def _row(self, identity: Any, name: str, low: float, high: float) -> int:
        if identity not in self.rows:
            self.rows[identity] = len(self.tensors)
            self.tensors.append(name)
            self.ranges.append(max(abs(low), abs(high)) or 1.0)  # an all-zero tensor has no scale of its own
            self.signed.append(low < 0)
        return self.rows[identity]

    def _weight_row(self, wire: Wire) -> int:
        weight = wire.module.weight.detach()
        return self._row(id(wire.module.weight), f"{wire.name}.weight", weight.min().item(), weight.max().item())

    def _input_row(self, wire: Wire) -> int | None:
        if wire.group is None:
            return None
        peers = [w for w in self.wires.values() if w.group == wire.group]
        return self._row(wire.group, f"{peers[0].name}.input", min(w.low for w in peers), max(w.high for w in peers))

    def _refuse_tied(self, weights: Mapping[str, int]) -> None:
        """A weight that a layer with all its channels uses is never without channels, so its width always counts."""
        whole = {weights[name]: name for name in self.wiring.refused}
        for name, row in weights.items():
            if row in whole:
                self.wiring.refused.setdefault(
                    name, f"it shares its weight with {whole[row]}, which keeps all channels"
                )

    def _gate_indices(self, channels: set[Channel]) -> frozenset[int]:
        """Global indices of the gates behind (layer, channel) pairs; empty if one of them is never pruned."""
        if any(layer not in self.layout.slices for layer, _ in channels):
            return frozenset()
        return frozenset(self.layout.slices[layer].start + c for layer, c in channels)

    def _outputs(self, wire: Wire, inputs: tuple[frozenset[int], ...]) -> tuple[frozenset[int], ...]:
        if wire.is_depthwise:
            return tuple(inputs[c // (wire.out_channels // wire.in_channels)] for c in range(wire.out_channels))
        return tuple(self._gate_indices({(wire.name, c)}) for c in range(wire.out_channels))

    def _describe(self, wire: Wire, weight: int, input_row: int | None) -> LayerInfo:
        inputs = tuple(self._gate_indices(channels) for channels in self.wiring.reach[wire.name])
        return LayerInfo(
            name=wire.name,
            kind=type(wire.module).__name__,
            macs=wire.macs,
            weight=weight,
            input=input_row,
            norm=wire.norm,
            groups=wire.groups,
            depthwise=wire.is_depthwise,
            inputs=inputs,
            outputs=self._outputs(wire, inputs),
            refused=self.wiring.refused.get(wire.name),
        )

    def _convert(self, layer: LayerInfo) -> None:
        wire, module = self.wires[layer.name], self.wires[layer.name].module
        module.__class__ = QUANTIZED_LAYERS[type(module)]
        module.context, module.weight_row, module.input_row = self.context, layer.weight, layer.input
        module.reusable, module.output_gate = self._reusable(wire), None
        if not any(layer.outputs):
            return
        gate = Liveness(layer.outputs, self.layout.num_channels).to(module.weight.device)
        if layer.norm is None:
            module.output_gate = gate
            return
        norm: Any = self.modules[layer.norm]
        norm.__class__ = GATED_NORMS[type(norm)]
        norm.context, norm.output_gate = self.context, gate

    def _reusable(self, wire: Wire) -> bool:
        """An input changed in place between its readers is not one tensor, though it is one object."""
        keys = set().union(*(w.keys for w in self.wires.values() if w.group == wire.group))
        return len({key[:3] for key in keys}) == len(keys)
