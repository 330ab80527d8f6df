r"""MACs and BOPs of a quantized network, realized and expected.

.. math::
    \mathrm{BOPs} = \sum_{\text{layers}} b_\text{weight} \, b_\text{input} \, \kappa \, \mathrm{MACs}, \qquad
    \kappa = \text{fraction of multiply-accumulates between kept channels}

The network's own input counts as 8 bit, what stays in float as 32 x 32 bit; biases, norms, pooling and sums cost
nothing. A product of two activations (attention's) counts with the widths of both. Relative BOPs are in percent of the
same network at 32 x 32 bits without pruning.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from pyro_bbits.gates import GateProbabilities, GateValues, Liveness
from pyro_bbits.insertion import LayerInfo, NetworkStructure
from pyro_bbits.sums import WeightedSums

__all__ = ["NetworkCost", "tensor_macs"]

Channels = tuple[frozenset[int], ...]

INPUT_BITS = 8
FLOAT_BITS = 32

CONFIGURATIONS = 64
"""Configurations that are counted together; each takes memory for all channels of all layers."""


class _KeptMacs(nn.Module):
    r"""Fraction of each layer's multiply-accumulates whose input and output channels are both alive.

    Within a group of a convolution every output reads every input, so the fraction is the mean over groups of
    (kept inputs) x (kept outputs). In a depthwise layer an output is alive exactly when its one input is.

    A block is the channels of one group; those of all layers are counted at once.
    """

    sizes: Tensor
    always: Tensor
    groups: Tensor

    def __init__(self, layers: Sequence[LayerInfo], num_gates: int) -> None:
        super().__init__()
        blocks: list[tuple[Channels, Channels]] = []
        of_layer: list[dict[int, float]] = []
        for layer in layers:
            own = _blocks(layer)
            of_layer.append({len(blocks) + i: 1.0 for i in range(len(own))})
            blocks += own
        both = [inputs for inputs, _ in blocks] + [outputs for _, outputs in blocks]
        shared = sorted({p for channels in both for p in channels if len(p) > 1}, key=sorted)
        self.shared = Liveness(shared, num_gates) if shared else None
        place = {p: num_gates + i for i, p in enumerate(shared)}  # behind the gates
        counts = [Counter(next(iter(p)) if len(p) == 1 else place[p] for p in channels if p) for channels in both]
        self.live = WeightedSums(counts, num_gates + len(shared)) if num_gates else None
        always = torch.tensor([float(sum(not p for p in channels)) for channels in both]).reshape(2, -1)
        self.register_buffer("always", always, persistent=False)
        self.joined = WeightedSums(of_layer, len(blocks)) if len(blocks) > len(layers) else None
        sizes = torch.tensor([float(len(channels)) for channels in both]).reshape(2, -1)
        self.register_buffer("sizes", sizes, persistent=False)
        groups = torch.tensor([float(len(places)) for places in of_layer])
        self.register_buffer("groups", groups, persistent=False)

    def _live(self, gates: Tensor) -> Tensor:
        """Live channels of all blocks, of inputs and of outputs, `(2, blocks)`."""
        if self.live is None:
            return self.always
        live: Tensor = self.live(gates if self.shared is None else torch.cat([gates, self.shared(gates)]))
        return live.view(2, -1) + self.always

    def forward(self, gates: Tensor) -> Tensor:
        inputs, outputs = (self._live(gates) / self.sizes).unbind()
        kept = inputs * outputs
        return kept if self.joined is None else self.joined(kept) / self.groups

    def outputs(self, gates: Tensor) -> Tensor:
        """Live output channels of each layer."""
        outputs = self._live(gates)[1]
        return outputs if self.joined is None else self.joined(outputs)


def _blocks(layer: LayerInfo) -> list[tuple[Channels, Channels]]:
    """Input and output channels of each group; those of a depthwise layer count as outputs alone."""
    alive = (frozenset[int](),)
    if layer.depthwise:
        return [(alive, layer.outputs)]
    inputs, outputs = layer.inputs or alive, layer.outputs or alive
    reads, writes = len(inputs) // layer.groups, len(outputs) // layer.groups
    return [(inputs[g * reads : (g + 1) * reads], outputs[g * writes : (g + 1) * writes]) for g in range(layer.groups)]


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
    steps: Tensor
    same: Tensor

    def __init__(self, network: NetworkStructure) -> None:
        super().__init__()
        layers, bits = network.layers, torch.tensor([float(b) for b in network.layout.ladder.bits])
        self.names, self.base = tuple(layer.name for layer in layers), float(bits[0])
        self.kept = _KeptMacs(layers, network.layout.num_channels)
        fixed = len(network.layout.tensors)  # one row behind the tensors stands for the network's input
        inputs = [fixed if layer.input is None else layer.input for layer in layers]
        weights = [fixed if layer.weight is None else layer.weight for layer in layers]
        self.operands = WeightedSums([{row: 1.0} for row in weights + inputs], fixed + 1)
        same = torch.tensor([weight == read for weight, read in zip(weights, inputs, strict=True)])
        self.has_squares = bool(same.any())
        self.float_macs = sum(layer.macs for layer in network.float_layers)
        self.register_buffer("macs", torch.tensor([float(layer.macs) for layer in layers]), persistent=False)
        self.register_buffer("steps", torch.stack([bits.diff(), (bits**2).diff()]), persistent=False)
        self.register_buffer("same", same, persistent=False)
        self._total_macs = float(self.macs.double().sum()) + self.float_macs  # known now, and never read from a GPU
        self.to(network.quantizers.log_range.device)

    @property
    def float_bops(self) -> float:
        """BOPs per sample of the unpruned network at 32 x 32 bits, its input included."""
        return FLOAT_BITS**2 * max(1.0, self._total_macs)

    def expected_bits(self, tensors: Tensor) -> Tensor:
        """Expected width of each tensor in bits, given that it is not pruned away; `(T, R)` to `(T,)`."""
        return self._expected_power(_reached(tensors), 1)

    def _expected_power(self, reached: Tensor, power: int) -> Tensor:
        # a sum, and no product of matrices, which autocast would round to 8 bits
        return self.base**power + (reached * self.steps[power - 1]).sum(-1)

    def kept_macs(self, channels: Tensor) -> Tensor:
        """Expected fraction of each layer's multiply-accumulates that remain, `(C,)` to `(L,)`."""
        kept: Tensor = self.kept(channels)
        return kept

    def kept_outputs(self, channels: Tensor) -> Tensor:
        """Expected number of live output channels of each layer, `(C,)` to `(L,)`."""
        return self.kept.outputs(channels)

    def layer_bops(self, gates: GateValues | GateProbabilities) -> Tensor:
        """BOPs per sample of each layer, `(L,)`: exact for hard gates, expected for probabilities."""
        reached = _reached(gates.tensors)
        squares = self._expected_power(reached, 2) if self.has_squares else None
        return self._layer_bops(self._expected_power(reached, 1), squares, gates.channels)

    def _layer_bops(self, bits: Tensor, squares: Tensor | None, channels: Tensor) -> Tensor:
        weights, inputs = self._operands(bits, INPUT_BITS)
        widths = weights * inputs
        if squares is not None:
            # a product of a tensor with itself has one width, not two independent ones
            widths = torch.where(self.same, self._operands(squares, INPUT_BITS**2)[1], widths)
        return widths * self.kept_macs(channels) * self.macs

    def _operands(self, values: Tensor, of_input: float) -> tuple[Tensor, ...]:
        """Values of tensors, and one of the network's input, to those of each layer's weight and input."""
        operands: Tensor = self.operands(nn.functional.pad(values, (0, 1), value=of_input))
        return operands.view(2, -1).unbind()

    def relative_bops(self, gates: GateValues | GateProbabilities) -> Tensor:
        """BOPs in percent of the unpruned network at 32 x 32 bits; a differentiable scalar."""
        return self._relative(self.layer_bops(gates))

    def relative_bops_at(self, widths: Tensor, channels: Tensor) -> Tensor:
        """The same for widths that need not be on the ladder, nor integers; differentiable in both.

        Arguments:
            widths: `(T,)` widths of the tensors in bits.
            channels: `(C,)` channel gates.
        """
        return self._relative(self._layer_bops(widths, widths**2 if self.has_squares else None, channels))

    def relative_bops_of_each(self, gates: GateValues) -> Tensor:
        """The same for configurations side by side, `(D, C)` and `(D, T, R)` to `(D,)`; some of them at a time."""
        relative: Tensor = torch.vmap(self.relative_bops, chunk_size=CONFIGURATIONS)(gates)
        return relative

    def _relative(self, layer_bops: Tensor) -> Tensor:
        return 100 * (layer_bops.sum() + FLOAT_BITS**2 * self.float_macs) / self.float_bops

    def forward(self, gates: GateValues | GateProbabilities) -> Tensor:
        """The same as :meth:`relative_bops`."""
        return self.relative_bops(gates)


def _reached(conditional: Tensor) -> Tensor:
    """Probability that each rung above the first is reached, `(..., R)`, from those given the rung below."""
    # not by cumprod, whose gradient asks the host whether there are zeros
    columns = list(accumulate(conditional.unbind(-1), torch.mul))
    return torch.stack(columns, -1) if columns else conditional


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
