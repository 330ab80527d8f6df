"""What is known of a quantized network apart from its weights: layers, wiring, gates, ranges."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from pyro_bbits.gates import ChannelGroup, GateLayout
from pyro_bbits.insertion.products import MATMUL
from pyro_bbits.ladder import BitLadder
from pyro_bbits.quantizer import Quantizers

__all__ = ["FloatLayer", "LayerInfo", "NetworkStructure", "StructureSnapshot"]


@dataclass(frozen=True)
class LayerInfo:
    """A quantized layer of a network, or a product of two activations, such as attention's.

    Attributes:
        name: Module path; of a product, that of the module whose code makes it, and its number: `attention.matmul0`.
        kind: Class name of the float layer, e.g. `Conv2d`, or `MatMul`.
        macs: Multiply-accumulates per sample.
        weight: Row of its weight among the quantized tensors; of a product, of its right operand, which may be None.
        input: Row of its input, or of the left operand of a product. None where it reads the network's input, counted
            as 8 bit, or indices.
        norm: Module path of the batch norm that carries its channel gates, if any.
        groups: Groups of a convolution; 1 for a linear layer.
        depthwise: Whether every output channel reads one input channel alone.
        inputs: For each input channel the channel gates that keep it alive; empty means always alive.
        outputs: The same for each output channel.
        refused: Why its own channels are not pruned; None if they are.
        lookups: Numbers that an embedding looks up per sample; it multiplies nothing.
    """

    name: str
    kind: str
    macs: int
    weight: int | None
    input: int | None
    norm: str | None
    groups: int
    depthwise: bool
    inputs: tuple[frozenset[int], ...]
    outputs: tuple[frozenset[int], ...]
    refused: str | None
    lookups: int = 0

    @property
    def is_product(self) -> bool:
        """Whether it is a product of two activations."""
        return self.kind == MATMUL


@dataclass(frozen=True)
class FloatLayer:
    """A part of a network that multiplies and stays in float; it counts as 32 x 32 bit.

    Attributes:
        name: Module path.
        kind: Class name.
        macs: Multiply-accumulates per sample, as far as they can be counted.
        reason: Why it is not quantized.
        is_excluded: Whether the user wished it so.
    """

    name: str
    kind: str
    macs: int
    reason: str
    is_excluded: bool = False


class NetworkStructure(Protocol):
    """What cost, posterior and configuration need of a quantized network, or of a snapshot of one."""

    @property
    def layout(self) -> GateLayout:
        """Names and order of the gates."""

    @property
    def layers(self) -> Sequence[LayerInfo]:
        """The quantized layers in the order of their calls."""

    @property
    def float_layers(self) -> Sequence[FloatLayer]:
        """What multiplies in float."""

    @property
    def quantizers(self) -> Quantizers:
        """Ranges and signs."""


@dataclass(frozen=True)
class StructureSnapshot:
    """The structure of a network at one moment, on the CPU and independent of it.

    Attributes:
        layout: Names and order of the gates.
        layers: The quantized layers.
        float_layers: What multiplies in float.
        quantizers: A copy of ranges and signs.
    """

    layout: GateLayout
    layers: tuple[LayerInfo, ...]
    float_layers: tuple[FloatLayer, ...]
    quantizers: Quantizers

    @classmethod
    def of(cls, network: NetworkStructure) -> "StructureSnapshot":
        """Copy what is known of a network."""
        quantizers = _quantizers(network.quantizers.log_range, network.quantizers.signed, network.quantizers.ladder)
        return cls(network.layout, tuple(network.layers), tuple(network.float_layers), quantizers)

    def to_json(self) -> str:
        """Everything but the ranges as JSON."""
        layers = [_jsonable(layer) for layer in self.layers]
        return json.dumps(
            {
                "layout": asdict(self.layout),
                "layers": layers,
                "float_layers": [asdict(layer) for layer in self.float_layers],
                "signed": self.quantizers.signed,
            }
        )

    @classmethod
    def from_json(cls, text: str, log_range: Tensor) -> "StructureSnapshot":
        """Read what :meth:`to_json` wrote.

        Arguments:
            text: The JSON.
            log_range: Logarithms of the ranges, `(T,)`.

        Raises:
            ValueError: If the text is something else, or there is not one finite range for each tensor.
        """
        try:
            content = json.loads(text)
            layout = _layout(content["layout"])
            layers = tuple(LayerInfo(**_layer_fields(layer)) for layer in content["layers"])
            left = tuple(FloatLayer(**layer) for layer in content["float_layers"])
            signed = tuple(content["signed"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this does not describe a quantized network: {error!r}") from error
        count = len(layout.tensors)
        if log_range.shape != (count,) or len(signed) != count or not log_range.isfinite().all():
            raise ValueError(f"{count} quantized tensors need as many finite ranges, and signs")
        return cls(layout, layers, left, _quantizers(log_range, signed, layout.ladder))


def _quantizers(log_range: Tensor, signed: Sequence[bool], ladder: BitLadder) -> Quantizers:
    quantizers = Quantizers([1.0] * len(signed), signed, ladder).requires_grad_(False)
    quantizers.log_range.copy_(log_range.detach())  # not by way of the ranges, which would change them by rounding
    return quantizers


def _jsonable(layer: LayerInfo) -> dict[str, Any]:
    content = vars(layer)  # asdict would copy every channel first
    return content | {key: [sorted(channel) for channel in content[key]] for key in ("inputs", "outputs")}


def _layer_fields(layer: Mapping[str, Any]) -> dict[str, Any]:
    return dict(layer) | {key: tuple(map(frozenset, layer[key])) for key in ("inputs", "outputs")}


def _layout(content: Mapping[str, Any]) -> GateLayout:
    groups = tuple(ChannelGroup(**group) for group in content["groups"])
    return GateLayout(BitLadder(tuple(content["ladder"]["bits"])), tuple(content["tensors"]), groups)
