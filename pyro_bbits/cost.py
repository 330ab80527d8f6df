r"""MACs and BOPs of a quantized network, realized and expected.

.. math::
    \mathrm{BOPs} = \sum_{\text{layers}} b_\text{weight} \, b_\text{input} \, \kappa \, \mathrm{MACs}, \qquad
    \kappa = \text{fraction of multiply-accumulates between kept channels}

The network's own input counts as 8 bit, what stays in float as 32 x 32 bit; biases, norms, pooling and sums cost
nothing. A product of two activations (attention's) counts with the widths of both. Relative BOPs are in percent of the
same network at 32 x 32 bits without pruning.
"""

from typing import cast

import torch
from torch import Tensor, nn

from pyro_bbits.gates import GateProbabilities, GateValues, Liveness, rung_probabilities
from pyro_bbits.insertion import LayerInfo, NetworkStructure

__all__ = ["NetworkCost", "tensor_macs"]

INPUT_BITS = 8
FLOAT_BITS = 32


class _KeptMacs(nn.Module):
    r"""Fraction of a layer's multiply-accumulates whose input and output channels are both alive.

    Within a group of a convolution every output reads every input, so the fraction is the mean over groups of
    (kept inputs) x (kept outputs). In a depthwise layer an output is alive exactly when its one input is.
    """

    def __init__(self, layer: LayerInfo, num_gates: int) -> None:
        super().__init__()
        self.inputs, self.outputs = Liveness(layer.inputs, num_gates), Liveness(layer.outputs, num_gates)
        self.groups, self.depthwise = layer.groups, layer.depthwise

    def forward(self, gates: Tensor) -> Tensor:
        outputs: Tensor = self.outputs(gates)
        if self.depthwise:
            return outputs.mean()
        inputs: Tensor = self.inputs(gates)
        return (inputs.reshape(self.groups, -1).mean(1) * outputs.reshape(self.groups, -1).mean(1)).mean()


class NetworkCost(nn.Module):
    r"""Counts the BOPs of a network from its gates, or their expectation from gate probabilities.

    Weight gates, input gates and channel gates are independent under a factorized posterior, so the expectation of each
    layer's product is the product of expectations: one formula serves hard gates (probabilities of 0 and 1) and
    beliefs, and is differentiable. It is exact but for a layer that reads its own output channels (one module called
    twice in a row), where it is an approximation.

    Arguments:
        network: The quantized network, or a snapshot of its structure.

    Attributes:
        macs: `(L,)` multiply-accumulates per sample of each layer.
        float_macs: Those of all that stays in float.

    References:
        van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), section 2.3 and appendix B; widths and kept fractions
        as the authors' published code counts them.
    """

    macs: Tensor
    bits: Tensor
    weight_rows: Tensor
    input_rows: Tensor

    def __init__(self, network: NetworkStructure) -> None:
        super().__init__()
        layers, ladder = network.layers, network.layout.ladder
        self.names = tuple(layer.name for layer in layers)
        self.kept = nn.ModuleList(_KeptMacs(layer, network.layout.num_channels) for layer in layers)
        fixed = len(network.layout.tensors)  # one row behind the tensors stands for the network's input
        inputs = [fixed if layer.input is None else layer.input for layer in layers]
        weights = [fixed if layer.weight is None else layer.weight for layer in layers]
        self.float_macs = sum(layer.macs for layer in network.float_layers)
        self.register_buffer("macs", torch.tensor([float(layer.macs) for layer in layers]), persistent=False)
        self.register_buffer("bits", torch.tensor([float(b) for b in ladder.bits]), persistent=False)
        self.register_buffer("weight_rows", torch.tensor(weights), persistent=False)
        self.register_buffer("input_rows", torch.tensor(inputs), persistent=False)
        self._total_macs = float(self.macs.double().sum()) + self.float_macs  # known now, and never read from a GPU
        self.to(network.quantizers.log_range.device)

    @property
    def float_bops(self) -> float:
        """BOPs per sample of the unpruned network at 32 x 32 bits, its input included."""
        return FLOAT_BITS**2 * max(1.0, self._total_macs)

    def expected_bits(self, tensors: Tensor) -> Tensor:
        """Expected width of each tensor in bits, given that it is not pruned away; `(T, R)` to `(T,)`."""
        return rung_probabilities(tensors) @ self.bits

    def kept_macs(self, channels: Tensor) -> Tensor:
        """Expected fraction of each layer's multiply-accumulates that remain, `(C,)` to `(L,)`."""
        return torch.stack([kept(channels) for kept in self.kept])

    def kept_outputs(self, channels: Tensor) -> list[Tensor]:
        """Expected number of live output channels of each layer."""
        return [cast(_KeptMacs, kept).outputs(channels).sum() for kept in self.kept]

    def layer_bops(self, gates: GateValues | GateProbabilities) -> Tensor:
        """BOPs per sample of each layer, `(L,)`: exact for hard gates, expected for probabilities."""
        rungs = rung_probabilities(gates.tensors)
        return self._layer_bops(rungs @ self.bits, rungs @ self.bits**2, gates.channels)

    def _layer_bops(self, bits: Tensor, squares: Tensor, channels: Tensor) -> Tensor:
        bits = torch.cat([bits, bits.new_full((1,), INPUT_BITS)])
        squares = torch.cat([squares, squares.new_full((1,), INPUT_BITS**2)])
        # a product of a tensor with itself has one width, not two independent ones
        same = self.weight_rows == self.input_rows
        widths = torch.where(same, squares[self.input_rows], bits[self.weight_rows] * bits[self.input_rows])
        return widths * self.kept_macs(channels) * self.macs

    def relative_bops(self, gates: GateValues | GateProbabilities) -> Tensor:
        """BOPs in percent of the unpruned network at 32 x 32 bits; a differentiable scalar."""
        return self._relative(self.layer_bops(gates))

    def relative_bops_at(self, widths: Tensor, channels: Tensor) -> Tensor:
        """The same for widths that need not be on the ladder, nor integers; differentiable in both.

        Arguments:
            widths: `(T,)` widths of the tensors in bits.
            channels: `(C,)` channel gates.
        """
        return self._relative(self._layer_bops(widths, widths**2, channels))

    def _relative(self, layer_bops: Tensor) -> Tensor:
        return 100 * (layer_bops.sum() + FLOAT_BITS**2 * self.float_macs) / self.float_bops

    def forward(self, gates: GateValues | GateProbabilities) -> Tensor:
        """The same as :meth:`relative_bops`."""
        return self.relative_bops(gates)


def tensor_macs(network: NetworkStructure) -> Tensor:
    r"""Weight :math:`m_k` of each quantized tensor in the paper's BOP-aware prior, `(T,)`.

    The MACs of all layers that multiply with the tensor, over the MACs of the largest layer: those of its layer for a
    weight, the sum over its consumers for an activation. An embedding multiplies nothing; each number that it looks up
    is priced as one MAC, so that its width has a price at all.

    References:
        van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), section 2.3.
    """
    macs = [0.0] * len(network.layout.tensors)
    for layer in network.layers:
        for row in (layer.weight, layer.input):
            if row is not None:
                macs[row] += layer.macs or layer.lookups
    return torch.tensor(macs) / max(1, *(layer.macs or layer.lookups for layer in network.layers))
