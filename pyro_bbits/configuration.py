"""The bit configuration: which width every tensor has and which channels are kept; its JSON file `bits.json`."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from pyro_bbits.cost import NetworkCost
from pyro_bbits.files import write_text_atomically
from pyro_bbits.gates import GateValues, Liveness
from pyro_bbits.insertion import LayerInfo, NetworkStructure
from pyro_bbits.insertion.fixed import FIXED_LAYERS, FixedQuantizer
from pyro_bbits.ladder import BitLadder
from pyro_bbits.quantizer import quantize_fixed

__all__ = ["BitConfiguration", "LayerBits", "TensorBits"]

SCHEMA: Literal["pyro-bbits/bit-configuration"] = "pyro-bbits/bit-configuration"
VERSION: Literal[1] = 1


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TensorBits(_Strict):
    """A quantized tensor.

    Attributes:
        name: Its name, e.g. `conv1.weight` or `conv2.input`.
        kind: Weight or activation.
        bits: Width in bits; 0 if every channel of the weight is removed.
        beta: Range: values lie in [-beta, beta] if signed, else [0, beta]; the step is 2 beta / (2^bits - 1) or
            beta / (2^bits - 1).
        signed: Whether the range is symmetric around zero.
    """

    name: str
    kind: Literal["weight", "activation"]
    bits: Annotated[int, Field(ge=0, le=32)]
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    signed: bool


class LayerBits(_Strict):
    """A layer with quantized weight and input.

    Attributes:
        name: Module path.
        kind: Class of the float layer, e.g. `Conv2d`.
        weight: Name of its weight tensor.
        input: Name of its input tensor; null where it reads the network's own input, which stays as it is.
        norm: Module path of the batch norm whose scale and shift are zeroed with removed channels, if any.
        channels: Number of output channels.
        removed: Output channels that are exactly zero, in ascending order.
        macs: Multiply-accumulates per sample before removal.
        bops: BOPs per sample at this configuration.
    """

    name: str
    kind: str
    weight: str
    input: str | None
    norm: str | None
    channels: Annotated[int, Field(ge=1)]
    removed: tuple[Annotated[int, Field(ge=0)], ...]
    macs: Annotated[int, Field(ge=0)]
    bops: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _check_removed(self) -> Self:
        if list(self.removed) != sorted(set(self.removed)) or any(c >= self.channels for c in self.removed):
            raise ValueError(f"removed channels of {self.name!r} must ascend and lie below {self.channels}")
        return self


class BitConfiguration(_Strict):
    """Widths, ranges and removed channels of a whole network: all that is needed to quantize its float weights.

    Attributes:
        schema_name: Always `pyro-bbits/bit-configuration` (the key `schema` in the file).
        version: Version of the schema, 1.
        ladder: Widths that could be chosen.
        relative_bops: BOPs in percent of the unpruned network at 32 x 32 bits.
        tensors: All quantized tensors.
        layers: All quantized layers, in the order of their calls.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)

    schema_name: Literal["pyro-bbits/bit-configuration"] = Field(default=SCHEMA, alias="schema")
    version: Literal[1] = VERSION
    ladder: tuple[int, ...]
    relative_bops: Annotated[float, Field(ge=0)]
    tensors: tuple[TensorBits, ...]
    layers: tuple[LayerBits, ...]

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        BitLadder(self.ladder)
        known = [tensor.name for tensor in self.tensors]
        if len(set(known)) != len(known):
            raise ValueError("tensor names must be unique")
        for tensor in self.tensors:
            if tensor.bits not in (0, *self.ladder):
                raise ValueError(f"{tensor.bits} bits of {tensor.name!r} are no width of the ladder {self.ladder}")
            if tensor.kind == "activation" and not tensor.bits:
                raise ValueError(f"activation {tensor.name!r} has 0 bits; only weights can be removed")
        for layer in self.layers:
            if missing := {layer.weight, layer.input} - {None, *known}:
                raise ValueError(f"layer {layer.name!r} names tensors that are not listed: {sorted(map(str, missing))}")
        return self

    @classmethod
    def from_gates(cls, network: NetworkStructure, gates: GateValues) -> "BitConfiguration":
        """Read the configuration off a network and hard gates.

        Arguments:
            network: The quantized network, trained, or a snapshot of its structure.
            gates: Gates of 0 and 1.

        Raises:
            ValueError: If a gate is neither 0 nor 1.
        """
        if any(((g != 0) & (g != 1)).any() for g in gates):
            raise ValueError("a bit configuration needs gates of 0 and 1; decide them first, e.g. guide.hard_gates().")
        gates = GateValues(*(g.detach() for g in gates))
        cost = NetworkCost(network)
        bops = cost.layer_bops(gates).tolist()
        return cls(
            ladder=network.layout.ladder.bits,
            relative_bops=cost(gates).item(),
            tensors=_tensor_entries(network, gates),
            layers=tuple(_layer_entry(network, la, gates, b) for la, b in zip(network.layers, bops, strict=True)),
        )

    def bits(self) -> dict[str, int]:
        """Width of each tensor in bits, by name."""
        return {tensor.name: tensor.bits for tensor in self.tensors}

    def kept(self) -> dict[str, int]:
        """Kept output channels of each layer, by name."""
        return {layer.name: layer.channels - len(layer.removed) for layer in self.layers}

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
                f"{path} is not a valid bit configuration (version {VERSION}): {place}: {first['msg']}."
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
            ValueError: If a layer is missing or has another class or another number of channels.
        """
        net = copy.deepcopy(net)
        modules = dict(net.named_modules())
        self._check_fit(modules)
        tensors = {tensor.name: tensor for tensor in self.tensors}
        with torch.no_grad():
            for layer in self.layers:
                _fix_layer(modules, layer, tensors, self.ladder[0])
        return net.eval()

    def _check_fit(self, modules: Mapping[str, nn.Module]) -> None:
        for layer in self.layers:
            module = modules.get(layer.name)
            if module is None or type(module).__name__ != layer.kind or type(module) not in FIXED_LAYERS:
                found = "nothing of that name" if module is None else type(module).__name__
                raise ValueError(
                    f"the configuration has a {layer.kind} called {layer.name!r}, the network {found}; "
                    "apply it to a float network of the same architecture."
                )
            channels = len(_weight(module))
            if channels != layer.channels:
                raise ValueError(
                    f"layer {layer.name!r} has {channels} output channels, the configuration {layer.channels}; "
                    "apply it to a network of the same size."
                )
            if layer.norm is not None and not isinstance(modules.get(layer.norm), nn.modules.batchnorm._BatchNorm):
                raise ValueError(f"the configuration has a batch norm called {layer.norm!r}, the network has none.")


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _compare(kind: str, network: set[str], configuration: set[str]) -> None:
    if network != configuration:
        difference = ", ".join(sorted(network ^ configuration)[:5])
        raise ValueError(
            f"{kind} of network and configuration differ: {difference}; they must come from one architecture."
        )


def _tensor_entries(network: NetworkStructure, gates: GateValues) -> tuple[TensorBits, ...]:
    weights = {layer.weight for layer in network.layers}
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


def _layer_entry(network: NetworkStructure, layer: LayerInfo, gates: GateValues, bops: float) -> LayerBits:
    alive = Liveness(layer.outputs, network.layout.num_channels).to(gates.channels.device)(gates.channels)
    names = network.layout.tensors
    return LayerBits(
        name=layer.name,
        kind=layer.kind,
        weight=names[layer.weight],
        input=None if layer.input is None else names[layer.input],
        norm=layer.norm,
        channels=len(layer.outputs),
        removed=tuple((alive == 0).nonzero().flatten().tolist()),
        macs=layer.macs,
        bops=bops,
    )


def _fix_layer(
    modules: Mapping[str, nn.Module], layer: LayerBits, tensors: Mapping[str, TensorBits], base: int
) -> None:
    module: Any = modules[layer.name]
    entry = tensors[layer.weight]
    beta = torch.tensor(entry.beta, device=module.weight.device)
    # a weight without channels has no width of its own; what is left of it is masked below
    weight = quantize_fixed(module.weight, beta, entry.bits or base, signed=entry.signed)
    mask = torch.ones(layer.channels, device=weight.device, dtype=weight.dtype)
    mask[list(layer.removed)] = 0.0
    masked: Any = module
    if layer.norm is None:
        weight = weight * mask.reshape(-1, *[1] * (weight.dim() - 1))
    else:
        masked = modules[layer.norm]
        masked.weight = nn.Parameter(mask if masked.weight is None else masked.weight * mask)
    if masked.bias is not None:
        masked.bias = nn.Parameter(masked.bias * mask)
    module.weight = nn.Parameter(weight)  # a parameter of its own: tied layers may lose different channels
    if layer.input is not None:
        entry = tensors[layer.input]
        module.__class__ = FIXED_LAYERS[type(module)]
        module.input_quantizer = FixedQuantizer(entry.bits, entry.beta, entry.signed).to(weight.device)
