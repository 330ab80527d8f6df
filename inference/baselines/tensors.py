"""One quantizer for each tensor of a network, made from what the example inputs show."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bbits.cost import FLOAT_BITS
from pyro_bbits.inference.evaluation import device_of
from pyro_bbits.inference.randomness import undisturbed
from pyro_bbits.insertion import LayerInfo, QuantizationRule, QuantizedNetwork, quantize
from pyro_bbits.insertion.inputs import Inputs

__all__ = ["FloatTensor", "TensorFacts", "TensorQuantizer", "TensorRule", "add_rule", "layer_widths"]


@dataclass(frozen=True)
class TensorFacts:
    """What a quantizer is made from.

    Attributes:
        name: Name of the tensor, e.g. `conv1.weight`.
        bits: The width it shall have.
        is_weight: Whether it is a layer's weight; if not, an activation.
        signed: Whether it takes negative values.
        numel: Numbers in the weight, or in the activation of one sample.
        mean_abs: Mean magnitude on the example inputs.
        max_abs: Largest magnitude there.
        has_rows: Whether dimension 0 are the output channels of a weight.
    """

    name: str
    bits: int
    is_weight: bool
    signed: bool
    numel: int
    mean_abs: float
    max_abs: float
    has_rows: bool


class TensorQuantizer(nn.Module):
    """The quantizer of one tensor: `forward(x)` is the quantized tensor.

    Arguments:
        bits: Its width in bits, as it is counted.
    """

    counted: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("counted", torch.tensor(float(bits)), persistent=False)

    def width(self) -> Tensor:
        """The width in bits, a scalar."""
        return self.counted

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class FloatTensor(TensorQuantizer):
    """Leaves a tensor as it is; it counts as 32 bit."""

    def __init__(self) -> None:
        super().__init__(FLOAT_BITS)

    def forward(self, x: Tensor) -> Tensor:
        """The tensor itself."""
        return x


class TensorRule(QuantizationRule):
    """A rule with a quantizer for each tensor, trained with the weights.

    Arguments:
        quantizers: One for each row.
    """

    def __init__(self, quantizers: Sequence[TensorQuantizer]) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)

    def forward(self, row: int, x: Tensor) -> Tensor:
        quantized: Tensor = self.quantizers[row](x)
        return quantized

    def widths(self) -> Tensor:
        return torch.stack([quantizer.width() for quantizer in self.quantizers])  # type: ignore[operator]


def layer_widths(network: QuantizedNetwork, bits: tuple[int, int], edge_bits: int | None) -> list[int]:
    """Width of each tensor of a network where all weights have one width and all activations another.

    Arguments:
        network: The network.
        bits: Width of weights and of activations.
        edge_bits: Width of the weights of the first and last layer, in the order of the calls, and of the last one's
            input; None makes no exception.
    """
    weights = _weight_rows(network)
    widths = [bits[0] if row in weights else bits[1] for row in range(len(network.layout.tensors))]
    if edge_bits is not None:
        for layer in (network.layers[0], network.layers[-1]):
            for row in (layer.weight, layer.input):
                if row is not None:
                    widths[row] = edge_bits
    return widths


def add_rule(
    net: nn.Module,
    example_inputs: Any,
    bits: tuple[int, int],
    edge_bits: int | None,
    make: Callable[[TensorFacts], TensorQuantizer],
) -> QuantizedNetwork:
    """Quantize a copy of a network by a rule.

    Arguments:
        net: The float network.
        example_inputs: As for :func:`~pyro_bbits.quantize`.
        bits: Width of weights and of activations; 32 leaves them in float.
        edge_bits: As for :func:`layer_widths`.
        make: Makes the quantizer of a tensor of less than 32 bits.

    Raises:
        ValueError: If a width is not between 1 and 32, or :func:`~pyro_bbits.quantize` refuses the network.
    """
    for width in (*bits, *([] if edge_bits is None else [edge_bits])):
        if not 1 <= width <= FLOAT_BITS:
            raise ValueError(f"bit widths must lie between 1 and {FLOAT_BITS}, which is float; got {width}.")
    network = quantize(net, example_inputs, bits=(FLOAT_BITS,))
    facts = _look(network, Inputs.of(example_inputs), layer_widths(network, bits, edge_bits))
    made = [FloatTensor() if fact.bits == FLOAT_BITS else make(fact) for fact in facts]
    network.rule = TensorRule(made).to(device_of(network))
    return network


def _weight_rows(network: QuantizedNetwork) -> dict[int, LayerInfo]:
    return {layer.weight: layer for layer in network.layers if layer.weight is not None and not layer.is_product}


def _look(network: QuantizedNetwork, inputs: Inputs, widths: Sequence[int]) -> list[TensorFacts]:
    """Run the network in float on the example inputs; all tensors that share a row count together."""
    count = len(widths)
    numel, total, largest, calls = [0] * count, [0.0] * count, [0.0] * count, [0] * count

    def watch(row: int, x: Tensor) -> None:
        numel[row], calls[row] = numel[row] + x.numel(), calls[row] + 1
        total[row] += x.double().abs().sum().item()
        largest[row] = max(largest[row], x.abs().max().item())

    looked_at = copy.deepcopy(network)  # batch norms shall not remember this pass
    looked_at.rule = TensorRule([FloatTensor() for _ in widths])
    with torch.no_grad(), undisturbed(device_of(network)), looked_at.watching(watch):
        looked_at(*inputs.args, gates=looked_at.open_gates(), **inputs.kwargs)
    weights = _weight_rows(network)

    def fact(row: int) -> TensorFacts:
        layer, calls_of = weights.get(row), max(calls[row], 1)
        samples = calls_of * (1 if layer is not None else inputs.batch_size)
        return TensorFacts(
            name=network.layout.tensors[row],
            bits=widths[row],
            is_weight=layer is not None,
            signed=network.quantizers.signed[row],
            numel=max(1, numel[row] // samples),
            mean_abs=total[row] / max(numel[row], 1) or 1.0,
            max_abs=largest[row] or 1.0,
            has_rows=layer is not None and not layer.kind.startswith(("ConvTranspose", "Embedding")),
        )

    return [fact(row) for row in range(count)]
