"""Turning the layers of a traced network into quantized ones, with rows of gates and ranges."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from pyro_bbits.gates import ChannelGroup, GateLayout, LivenessBank
from pyro_bbits.insertion.context import PassContext
from pyro_bbits.insertion.fusion import Fusion
from pyro_bbits.insertion.layers import GATED_NORMS, QUANTIZED_LAYERS
from pyro_bbits.insertion.probe import Channel, Wiring
from pyro_bbits.insertion.products import MATMUL, ProductForward, QuantizedProducts, product_place
from pyro_bbits.insertion.structure import LayerInfo
from pyro_bbits.insertion.wires import Operand, Trace, Wire
from pyro_bbits.ladder import BitLadder
from pyro_bbits.quantizer import Quantizers

__all__ = ["NetworkBuilder"]


class NetworkBuilder:
    """Assign rows and channel gates, then turn the layers of a (copied) network into quantized ones."""

    def __init__(self, net: nn.Module, traced: Trace, wiring: Wiring, ladder: BitLadder) -> None:
        self.wires = {name: wire for name, wire in traced.wires.items() if wire.is_quantized}
        self.products = [wire.name for wire in traced.wires.values() if wire.is_product]
        self.wiring, self.ladder = wiring, ladder
        self.gated: list[tuple[frozenset[int], ...]] = []
        self.modules = dict(net.named_modules())
        self.context = PassContext()
        self.peers: dict[str | None, list[Operand]] = {}
        for operand in (operand for wire in self.wires.values() for operand in wire.operands):
            self.peers.setdefault(operand.group, []).append(operand)
        self.rows: dict[Any, int] = {}
        self.tensors: list[str] = []
        self.ranges: list[float] = []
        self.signed: list[bool] = []
        layers = [wire for wire in self.wires.values() if not wire.is_product]
        weights = {wire.name: self._weight_row(wire) for wire in layers}
        self.readers: Counter[int | None] = Counter(weights.values())
        operands = {name: [self._operand_row(o) for o in wire.operands] for name, wire in self.wires.items()}
        self._refuse_tied(weights, operands)
        prunable = [wire for wire in layers if wire.name not in wiring.refused]
        groups = tuple(ChannelGroup(wire.name, weights[wire.name], wire.out_channels) for wire in prunable)
        self.layout = GateLayout(ladder, tuple(self.tensors), groups)
        self.layers = [
            self._describe_product(wire, operands[wire.name])
            if wire.is_product
            else self._describe(wire, weights[wire.name], operands[wire.name][0])
            for wire in self.wires.values()
        ]
        for layer in self.layers:
            if not layer.is_product:
                self._convert(layer)
        self._convert_owners()

    def quantizers(self) -> Quantizers:
        device = next(wire for wire in self.wires.values() if not wire.is_product).module.weight.device
        return Quantizers(self.ranges, self.signed, self.ladder).to(device)

    def alive(self) -> LivenessBank:
        """Liveness of the output channels of all layers that have gates."""
        sizes = [group.channels for group in self.layout.groups]
        return LivenessBank(self.gated, sizes).to(self.quantizers().log_range.device)

    def fuse(self, fusions: Mapping[str, Fusion]) -> None:
        """Let batch norms quantize what is behind their ReLU, if all that reads it takes it by one unsigned row."""
        inputs = {layer.name: layer.input for layer in self.layers}
        for name, fusion in fusions.items():
            rows = {inputs.get(reader) for reader in fusion.readers}
            row = rows.pop()
            if rows or row is None or self.signed[row]:
                continue
            norm: Any = self.modules[name]
            norm.__class__ = GATED_NORMS.get(type(norm), type(norm))
            norm.context, norm.output_row, norm.output_pooled = self.context, row, fusion.pooled

    def _row(self, identity: Any, name: str, low: float, high: float) -> int:
        if identity not in self.rows:
            if low > high:  # nothing but empty tensors
                low = high = 0.0
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"{name} is infinite or NaN on the example inputs; its range cannot be calibrated.")
            self.rows[identity] = len(self.tensors)
            self.tensors.append(name)
            self.ranges.append(max(abs(low), abs(high)) or 1.0)  # an all-zero tensor has no scale of its own
            self.signed.append(low < 0)
        return self.rows[identity]

    def _weight_row(self, wire: Wire) -> int:
        weight = wire.module.weight.detach()
        return self._row(id(wire.module.weight), f"{wire.name}.weight", weight.min().item(), weight.max().item())

    def _operand_row(self, operand: Operand) -> int | None:
        if operand.parameter is not None and id(operand.parameter) in self.rows:
            return self.rows[id(operand.parameter)]  # a layer's weight, or a view of it
        if operand.group is None:
            return None
        peers = self.peers[operand.group]
        return self._row(operand.group, operand.group, min(o.low for o in peers), max(o.high for o in peers))

    def _refuse_tied(self, weights: Mapping[str, int], operands: Mapping[str, list[int | None]]) -> None:
        """A weight that something with all its channels uses is never without channels, so its width always counts."""
        whole = {row: name for name, rows in operands.items() if self.wires[name].is_product for row in rows}
        whole |= {weights[name]: name for name in self.wiring.refused if name in weights}
        for name, row in weights.items():
            if row in whole:
                self.wiring.refused.setdefault(
                    name, f"it shares its weight with {whole[row]}, which keeps all channels"
                )

    def _gate_indices(self, channels: set[Channel]) -> frozenset[int]:
        """Global indices of the gates behind (layer, channel) pairs; empty if one of them is never pruned."""
        try:
            return frozenset([self.layout.slices[layer].start + c for layer, c in channels])
        except KeyError:
            return frozenset()

    def _outputs(self, wire: Wire, inputs: tuple[frozenset[int], ...]) -> tuple[frozenset[int], ...]:
        if wire.is_depthwise:
            return tuple(inputs[c // (wire.out_channels // wire.in_channels)] for c in range(wire.out_channels))
        gates = self.layout.slices.get(wire.name)
        if gates is None:
            return (frozenset[int](),) * wire.out_channels
        return tuple(frozenset([gate]) for gate in range(gates.start, gates.stop))

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
            lookups=wire.lookups,
        )

    def _describe_product(self, wire: Wire, operands: list[int | None]) -> LayerInfo:
        always = (frozenset[int](),)
        return LayerInfo(
            name=wire.name,
            kind=MATMUL,
            macs=wire.macs,
            weight=operands[1],
            input=operands[0],
            norm=None,
            groups=1,
            depthwise=False,
            inputs=always,
            outputs=always,
            refused=self.wiring.refused[wire.name],
        )

    def _convert_owners(self) -> None:
        """Let the modules that make products quantize their operands."""
        counts = Counter(product_place(name)[0] for name in self.products)
        visitors = {owner: QuantizedProducts(owner, self.context, count) for owner, count in counts.items()}
        for layer in self.layers:
            if layer.is_product:
                owner, index = product_place(layer.name)
                visitors[owner].rows[index] = layer.input, layer.weight
        for owner, visitor in visitors.items():
            module: Any = self.modules[owner]
            module.forward = ProductForward(module, visitor)

    def _convert(self, layer: LayerInfo) -> None:
        wire = self.wires[layer.name]
        module: Any = wire.module
        module.__class__ = QUANTIZED_LAYERS[type(module)]
        module.context, module.weight_row, module.input_row = self.context, layer.weight, layer.input
        module.reusable, module.output_gate = self._reusable(wire), None
        module.sole_reader = self.readers[module.weight_row] == 1
        module.read_once = module.sole_reader and wire.calls == 1
        if not any(layer.outputs):
            return
        gate = len(self.gated)
        self.gated.append(layer.outputs)
        if layer.norm is None:
            module.output_gate = gate
            return
        norm: Any = self.modules[layer.norm]
        norm.__class__ = GATED_NORMS[type(norm)]
        norm.context, norm.output_gate = self.context, gate

    def _reusable(self, wire: Wire) -> bool:
        """Whether the same input is read again: one that is kept for nobody fills memory until the pass ends.

        An input changed in place between its readers is not one tensor, though it is one object.
        """
        peers = self.peers[wire.operands[0].group]
        keys = set().union(*(operand.keys for operand in peers))
        return (len(peers) > 1 or wire.calls > 1) and len({key[:3] for key in keys}) == len(keys)
