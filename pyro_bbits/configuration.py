"""The bit configuration: which width every tensor has and which channels are kept; its JSON file `bits.json`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import ConfigDict, Field, ValidationError, model_validator
from torch import nn

from pyro_bbits.bit_entries import FloatBits, LayerBits, StrictModel, TensorBits, bops_in_percent, layer_bops
from pyro_bbits.configured import ConfiguredNetworkBuilder
from pyro_bbits.cost import NetworkCost
from pyro_bbits.files import write_text_atomically
from pyro_bbits.gates import GateValues, Liveness
from pyro_bbits.insertion import LayerInfo, NetworkStructure
from pyro_bbits.ladder import BitLadder

__all__ = ["BitConfiguration", "FloatBits", "LayerBits", "TensorBits"]

SCHEMA: Literal["pyro-bbits/bit-configuration"] = "pyro-bbits/bit-configuration"
VERSION: Literal[1] = 1
LAST_DIGITS = 1e-6
"""Relative: some units in the last place of float32."""


class BitConfiguration(StrictModel):
    """Widths, ranges and removed channels of a whole network: all that is needed to quantize its float weights.

    Attributes:
        schema_name: Always `pyro-bbits/bit-configuration` (the key `schema` in the file).
        version: Version of the schema, 1.
        ladder: Widths that could be chosen.
        relative_bops: BOPs in percent of the unpruned network at 32 x 32 bits.
        tensors: All quantized tensors.
        layers: All quantized layers and products, in the order of their calls.
        float_layers: What multiplies in float.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)

    schema_name: Literal["pyro-bbits/bit-configuration"] = Field(default=SCHEMA, alias="schema")
    version: Literal[1] = VERSION
    ladder: tuple[int, ...]
    relative_bops: Annotated[float, Field(ge=0)]
    tensors: tuple[TensorBits, ...]
    layers: tuple[LayerBits, ...]
    float_layers: tuple[FloatBits, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        BitLadder(self.ladder)
        for kind, names in (("tensor", [t.name for t in self.tensors]), ("layer", [la.name for la in self.layers])):
            if len(set(names)) != len(names):
                raise ValueError(f"{kind} names must be unique")
        tensors = {tensor.name: tensor for tensor in self.tensors}
        kept = {layer.weight for layer in self.layers if len(layer.removed) < layer.channels}
        for tensor in self.tensors:
            self._check_width(tensor, tensor.name in kept)
        for layer in self.layers:
            _check_layer(layer, tensors)
        used = {name for layer in self.layers for name in (layer.weight, layer.input)}
        if unused := tensors.keys() - used:
            raise ValueError(f"no layer uses {sorted(unused)[0]!r}; a layer is missing, or the name is wrong")
        self._check_bops()
        return self

    def _check_width(self, tensor: TensorBits, has_channels: bool) -> None:
        if tensor.bits not in (0, *self.ladder):
            raise ValueError(f"{tensor.bits} bits of {tensor.name!r} are no width of the ladder {self.ladder}")
        if tensor.kind == "activation" and not tensor.bits:
            raise ValueError(f"activation {tensor.name!r} has 0 bits; only weights can be removed")
        if not tensor.bits and has_channels:
            raise ValueError(f"{tensor.name!r} has 0 bits, which means that all its channels are removed; some are not")

    def _check_bops(self) -> None:
        widths = self.bits()
        for layer in self.layers:
            expected = layer_bops(layer, widths)
            if abs(layer.bops - expected) > 1e-3 * max(expected, 1.0):
                raise ValueError(
                    f"bops of layer {layer.name!r} are {layer.bops:.6g}, its widths make them {expected:.6g}; "
                    "BitConfiguration.with_bits changes widths and what follows from them"
                )
        expected = bops_in_percent(self.layers, self.float_layers)
        if abs(self.relative_bops - expected) > 1e-3 * max(expected, 1e-3):
            raise ValueError(f"relative_bops is {self.relative_bops:.6g}, the layers make it {expected:.6g}")

    @classmethod
    def from_gates(cls, network: NetworkStructure, gates: GateValues) -> "BitConfiguration":
        """Read the configuration off a network and hard gates.

        Arguments:
            network: The quantized network, trained, or a snapshot of its structure.
            gates: Gates of 0 and 1.

        Raises:
            ValueError: If a gate is neither 0 nor 1, or a rule quantizes the network in place of gates and ranges.
        """
        rule = getattr(network, "rule", None)
        if rule is not None:
            raise ValueError(
                f"the network is quantized by {type(rule).__name__}, whose grids a bit configuration cannot describe; "
                "give it a network without a rule."
            )
        if any(((g != 0) & (g != 1)).any() for g in gates):
            raise ValueError("a bit configuration needs gates of 0 and 1; decide them first, e.g. guide.hard_gates().")
        gates = GateValues(*(g.detach() for g in gates))
        cost = NetworkCost(network)
        costs = zip(cost.layer_bops(gates).tolist(), cost.kept_macs(gates.channels).tolist(), strict=True)
        return cls(
            ladder=network.layout.ladder.bits,
            relative_bops=cost(gates).item(),
            tensors=_tensor_entries(network, gates),
            layers=tuple(_layer_entry(network, la, gates, *c) for la, c in zip(network.layers, costs, strict=True)),
            float_layers=tuple(
                FloatBits(name=la.name, kind=la.kind, macs=la.macs, reason=la.reason) for la in network.float_layers
            ),
        )

    def is_same(self, other: "BitConfiguration") -> bool:
        """Whether two configurations are equal, but for the last digits of ranges.

        A range is the exponential of what was trained, and processors differ in its last bit: the configuration of a
        run is another number on another machine, and the same configuration.
        """
        pairs = zip(self.tensors, other.tensors, strict=False)
        close = all(math.isclose(mine.beta, its.beta, rel_tol=LAST_DIGITS) for mine, its in pairs)
        return close and self._without_ranges() == other._without_ranges()

    def _without_ranges(self) -> Self:
        tensors = tuple(tensor.model_copy(update={"beta": 1.0}) for tensor in self.tensors)
        return self.model_copy(update={"tensors": tensors})

    def bits(self) -> dict[str, int]:
        """Width of each tensor in bits, by name."""
        return {tensor.name: tensor.bits for tensor in self.tensors}

    def kept(self) -> dict[str, int]:
        """Kept output channels of each layer, by name."""
        return {layer.name: layer.channels - len(layer.removed) for layer in self.layers}

    @property
    def unpruned_bops(self) -> float:
        """BOPs in percent of the same widths with all channels kept; a weight without any has the lowest width."""
        widths = {name: bits or self.ladder[0] for name, bits in self.bits().items()}
        whole = [layer.model_copy(update={"kept_macs": 1.0}) for layer in self.layers]
        layers = tuple(layer.model_copy(update={"bops": layer_bops(layer, widths)}) for layer in whole)
        return bops_in_percent(layers, self.float_layers)

    @property
    def relative_macs(self) -> float:
        """Multiply-accumulates between kept channels, in percent of all; what stays in float keeps all."""
        beside = sum(layer.macs for layer in self.float_layers)
        kept = sum(layer.kept_macs * layer.macs for layer in self.layers)
        return 100 * (kept + beside) / max(1, sum(layer.macs for layer in self.layers) + beside)

    def with_bits(self, bits: Mapping[str, int]) -> "BitConfiguration":
        """The same configuration with other widths for some tensors, its BOPs counted anew.

        Arguments:
            bits: Width in bits by the name of a tensor.

        Raises:
            ValueError: If a tensor is unknown or a width is not on the ladder.
        """
        if unknown := bits.keys() - self.bits().keys():
            raise ValueError(f"there is no tensor {sorted(unknown)[0]!r}; there are {', '.join(self.bits())}.")
        tensors = tuple(t.model_copy(update={"bits": bits.get(t.name, t.bits)}) for t in self.tensors)
        widths = self.bits() | dict(bits)
        layers = tuple(la.model_copy(update={"bops": layer_bops(la, widths)}) for la in self.layers)
        values = dict(self) | {"tensors": tensors, "layers": layers}
        try:
            return type(self)(**values | {"relative_bops": bops_in_percent(layers, self.float_layers)})
        except ValidationError as error:
            raise ValueError(f"{_first_message(error)}.") from None

    def save(self, path: str | Path) -> None:
        """Write the JSON file, atomically.

        Raises:
            OSError: If it cannot be written.
        """
        write_text_atomically(path, json.dumps(self.model_dump(by_alias=True), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "BitConfiguration":
        """Read a JSON file that :meth:`save` wrote.

        Raises:
            ValueError: If the file cannot be read, is no bit configuration, or belongs to another schema version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the bit configuration {path} cannot be read: {error}.") from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise ValueError(
                f"{path} is not a valid bit configuration (version {VERSION}): {place}: {_first_message(error)}."
            ) from None

    def gates(self, network: NetworkStructure) -> GateValues:
        """The hard gates that a quantized network needs to be at this configuration.

        Raises:
            ValueError: If tensors or layers of the network differ from those of the configuration, or a layer keeps
                channels that the configuration removes.
        """
        layout, bits = network.layout, self.bits()
        _compare("quantized tensors", set(layout.tensors), set(bits))
        _compare(
            "layers",
            {f"{layer.name} with {len(layer.outputs)} channels" for layer in network.layers},
            {f"{layer.name} with {layer.channels} channels" for layer in self.layers},
        )
        if layout.ladder.bits != self.ladder:
            raise ValueError(f"the network's ladder is {layout.ladder.bits}, the configuration's {self.ladder}.")
        removed = {layer.name: layer.removed for layer in self.layers}
        for layer in network.layers:
            if layer.refused and not layer.depthwise and removed[layer.name]:
                raise ValueError(
                    f"the configuration removes channels of {layer.name!r}, which this network keeps: {layer.refused}."
                )
        gates = layout.open_gates()
        for row, name in enumerate(layout.tensors):
            gates.tensors[row] = torch.tensor(layout.ladder.open_gates(bits[name] or layout.ladder.base)).float()
        for group in layout.groups:
            gates.channels[layout.slices[group.layer]][list(removed[group.layer])] = 0.0
        device = network.quantizers.log_range.device
        return GateValues(gates.channels.to(device), gates.tensors.to(device))

    def apply(self, net: nn.Module) -> nn.Module:
        """Quantize a float network of the same architecture, its weights as trained.

        Weights are replaced by their quantized values, removed channels are exactly zero, and every quantized input
        passes a :class:`~pyro_bbits.insertion.fixed.FixedQuantizer`. The network is copied; there are no gates in the
        result, and it computes what the gated network computes with these gates in evaluation mode.

        Arguments:
            net: The float network, e.g. a fresh one after `net.load_state_dict(quantized.net.state_dict())`.

        Returns:
            The quantized network in evaluation mode.

        Raises:
            TypeError: If it is no network.
            ValueError: If a layer is missing or has another class or another number of channels, or the network has one
                that the configuration does not know.
        """
        if not isinstance(net, nn.Module):
            raise TypeError(
                f"a configuration is applied to a float network that holds the weights; got {type(net).__name__}. "
                "Load a state dict into the network first."
            )
        return ConfiguredNetworkBuilder(self.tensors, self.layers, self.float_layers, self.ladder[0]).build(net)


def _first_message(error: ValidationError) -> str:
    """What is wrong first; pydantic puts a prefix before what our own checks say."""
    return error.errors()[0]["msg"].removeprefix("Value error, ")


def _check_layer(layer: LayerBits, tensors: Mapping[str, TensorBits]) -> None:
    for name, kind in ((layer.weight, "activation" if layer.is_product else "weight"), (layer.input, "activation")):
        if name is None:
            if layer.weight is None and not layer.is_product:
                raise ValueError(f"layer {layer.name!r} has no weight")
            continue
        if name not in tensors:
            raise ValueError(f"layer {layer.name!r} names tensors that are not listed: [{name!r}]")
        if tensors[name].kind != kind and not layer.is_product:
            raise ValueError(f"layer {layer.name!r} uses the {tensors[name].kind} {name!r} as its {kind}")


def _compare(kind: str, network: set[str], configuration: set[str]) -> None:
    if network != configuration:
        difference = ", ".join(sorted(network ^ configuration)[:5])
        raise ValueError(
            f"{kind} of network and configuration differ: {difference}; they must come from one architecture."
        )


def _tensor_entries(network: NetworkStructure, gates: GateValues) -> tuple[TensorBits, ...]:
    weights = {layer.weight for layer in network.layers if not layer.is_product}
    ranges, signed = network.quantizers.ranges.detach().tolist(), network.quantizers.signed
    bits = network.layout.bits(gates)
    return tuple(
        TensorBits(
            name=name,
            kind="weight" if row in weights else "activation",
            bits=bits[row],
            beta=ranges[row],
            signed=signed[row],
        )
        for row, name in enumerate(network.layout.tensors)
    )


def _layer_entry(
    network: NetworkStructure, layer: LayerInfo, gates: GateValues, bops: float, kept_macs: float
) -> LayerBits:
    alive = Liveness(layer.outputs, network.layout.num_channels).to(gates.channels.device)(gates.channels)
    names = network.layout.tensors
    return LayerBits(
        name=layer.name,
        kind=layer.kind,
        weight=None if layer.weight is None else names[layer.weight],
        input=None if layer.input is None else names[layer.input],
        norm=layer.norm,
        channels=len(layer.outputs),
        removed=tuple((alive == 0).nonzero().flatten().tolist()),
        macs=layer.macs,
        kept_macs=min(1.0, kept_macs),
        bops=bops,
    )
