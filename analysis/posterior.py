"""The posterior over bit configurations: summaries, draws, and the configuration it leads to."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyro_bbits.configuration import BitConfiguration
from pyro_bbits.cost import INPUT_BITS, NetworkCost
from pyro_bbits.deployment import round_channels
from pyro_bbits.files import save_tensors_atomically
from pyro_bbits.gates import DecisionRule, GateProbabilities, GateValues, decide, rung_probabilities
from pyro_bbits.inference import AbstractGateGuide
from pyro_bbits.insertion import NetworkStructure, StructureSnapshot

__all__ = ["GatePosterior"]


@dataclass(frozen=True, eq=False, repr=False)
class GatePosterior:
    r"""The posterior over all gates of a network, at one moment of its training.

    It factorizes over channels and, given that a tensor is not pruned away, over the chains of the tensors:
    :math:`q(z) = \prod_c q(z_{2,c}) \prod_k \prod_b q(z_{b,k} \mid z_{b/2,k})`.

    With the simplified penalty (`GatePrior(..., simplified=True)`) the probabilities select a configuration but are no
    measure of doubt. The gate above 16 bits gets no signal in float32: its posterior is its prior.

    Attributes:
        structure: Layers, wiring and ranges of the network.
        probabilities: Probability of each gate given its parent.
    """

    structure: StructureSnapshot
    probabilities: GateProbabilities

    @classmethod
    def from_guide(cls, guide: AbstractGateGuide, network: NetworkStructure) -> "GatePosterior":
        """Take the posterior of a guide over the gates of its network.

        Raises:
            ValueError: If the guide belongs to another network.
        """
        if guide.prior.layout != network.layout:
            raise ValueError("the guide was made for another network; pass the one its prior was built from.")
        probabilities = guide.probabilities()
        return cls(StructureSnapshot.of(network), GateProbabilities(*(p.detach().cpu() for p in probabilities)))

    def __repr__(self) -> str:
        layout = self.structure.layout
        widths = f"{layout.ladder.bits[0]} to {layout.ladder.bits[-1]} bits"
        counts = f"{len(layout.tensors)} tensors of {widths}, {layout.num_channels} prunable channels"
        return f"GatePosterior({counts}, expected BOPs {self.expected_bops():.3g} %)"

    def __str__(self) -> str:
        return f"{self!r}\n{self.table().to_string()}"

    @cached_property
    def cost(self) -> NetworkCost:
        """MACs and BOPs of the network."""
        return NetworkCost(self.structure)

    @cached_property
    def any_channel(self) -> Tensor:
        """Probability that a tensor has a channel left, `(T,)`; 1 for activations and weights that are not pruned."""
        layout = self.structure.layout
        log_off = torch.log1p(-self.probabilities.channels.double())
        none = torch.zeros(len(layout.tensors), dtype=torch.double).index_add(0, layout.owner, log_off).exp()
        return torch.where(layout.prunable, 1 - none, torch.ones_like(none)).float()

    def inclusion(self) -> pd.DataFrame:
        """Inclusion probabilities: that each tensor has at least so many bits, the product along its chain.

        Returns:
            A row per tensor, a column per width of the ladder.
        """
        reached = torch.cat([self.any_channel[:, None], self.probabilities.tensors], 1).cumprod(1)
        return self._tensor_frame(reached, self.structure.layout.ladder.bits)

    def widths(self) -> pd.DataFrame:
        """Posterior distribution over the width of each tensor.

        Returns:
            A row per tensor, a column per width in bits, 0 (pruned away) included; rows sum to 1.
        """
        alive = self.any_channel[:, None]
        probabilities = torch.cat([1 - alive, alive * rung_probabilities(self.probabilities.tensors)], 1)
        return self._tensor_frame(probabilities, self.structure.layout.ladder.widths)

    def channels(self) -> pd.DataFrame:
        """Probability that each prunable channel is kept.

        Returns:
            A row per channel gate with `layer`, `channel` and `probability`.
        """
        groups = self.structure.layout.groups
        return pd.DataFrame(
            {
                "layer": [g.layer for g in groups for _ in range(g.channels)],
                "channel": [c for g in groups for c in range(g.channels)],
                "probability": self.probabilities.channels.tolist(),
            }
        )

    def table(self, rule: DecisionRule = "map") -> pd.DataFrame:
        """A row per layer: chosen widths with their probability, kept channels, cost, and why channels stay.

        `print(posterior)` shows it whole, however wide it is.

        Arguments:
            rule: How the configuration is decided; see :func:`~pyro_bbits.gates.decide`.

        Returns:
            Columns `weight_bits`, `weight_probability`, `input_bits`, `input_probability` (of exactly that width),
            `kept`, `channels`, `expected_kept`, `macs` (per sample, unpruned), `relative_bops` (percent of the whole
            network at 32 x 32 bits) and `note`. A network input that is not quantized has 8 bits and no probability.
            Of a product of two activations, `weight` and `input` are its right and left operand. What stays in float
            has no row: see `structure.float_layers`.
        """
        layers = self.structure.layers
        gates = decide(self.probabilities, rule)
        bits, widths = self.structure.layout.bits(gates), self.widths()
        bops = 100 * self.cost.layer_bops(gates) / self.cost.float_bops
        kept, expected = self._kept(gates.channels), self._kept(self.probabilities.channels)
        rows = []
        for i, layer in enumerate(layers):
            weight, read = layer.weight, layer.input  # of a product, its two operands
            rows.append(
                {
                    "layer": layer.name,
                    "kind": layer.kind,
                    "weight_bits": INPUT_BITS if weight is None else bits[weight],
                    "weight_probability": np.nan if weight is None else widths.iloc[weight][bits[weight]],
                    "input_bits": INPUT_BITS if read is None else bits[read],
                    "input_probability": np.nan if read is None else widths.iloc[read][bits[read]],
                    "kept": round(kept[i]),
                    "channels": len(layer.outputs),
                    "expected_kept": expected[i],
                    "macs": layer.macs,
                    "relative_bops": bops[i].item(),
                    "note": layer.refused or "",
                }
            )
        return pd.DataFrame(rows).set_index("layer")

    def expected_bops(self) -> float:
        """Expected relative BOPs in percent."""
        return float(self.cost.relative_bops(self.probabilities))

    def sample(self, draws: int = 1000, *, seed: int = 0) -> GateValues:
        """Draw configurations.

        Arguments:
            draws: Number `D` of independent draws.
            seed: Seed of a generator of their own.

        Returns:
            Hard gates with a leading dimension: `(D, C)` and `(D, T, R)`. Residual gates of a weight without channels
            are closed.

        Raises:
            ValueError: If `draws` is below 1.
        """
        if draws < 1:
            raise ValueError(f"draws must be at least 1; got {draws}.")
        generator = torch.Generator().manual_seed(seed)
        channels, tensors = (
            torch.bernoulli(p.expand(draws, *p.shape).contiguous(), generator=generator) for p in self.probabilities
        )
        alive = self.structure.layout.any_channel(channels)
        return GateValues(channels, (tensors * alive[..., None]).cumprod(-1))

    def sampled_bops(self, draws: int = 1000, *, seed: int = 0) -> Tensor:
        """Relative BOPs of drawn configurations in percent, `(D,)`."""
        return self.cost.relative_bops_of_each(self.sample(draws, seed=seed))

    def bops_interval(self, probability: float = 0.94, *, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Equal-tailed credible interval of the relative BOPs in percent.

        Training leaves closed gates open with a probability of about 0.01, whatever the prior, which lifts the upper
        end; :func:`~pyro_bbits.inference.refine_gates` sets them to what prior and data make them.

        Raises:
            ValueError: If the probability is not between 0 and 1.
        """
        if not 0 < probability < 1:
            raise ValueError(f"probability must lie between 0 and 1; got {probability}.")
        tail = (1 - probability) / 2
        low, high = self.sampled_bops(draws, seed=seed).quantile(torch.tensor([tail, 1 - tail])).tolist()
        return low, high

    def configuration(self, rule: DecisionRule = "map", *, multiple_of: int = 1) -> BitConfiguration:
        """The configuration under a rule; see :func:`~pyro_bbits.gates.decide`.

        Arguments:
            rule: How gates are decided.
            multiple_of: Open the most probable closed channels again until each layer has a multiple of so many, as
                fast kernels like it; see :func:`~pyro_bbits.deployment.round_channels`.
        """
        gates = decide(self.probabilities, rule)
        if multiple_of != 1:
            gates = round_channels(self.structure, gates, self.probabilities.channels, multiple_of)
        return BitConfiguration.from_gates(self.structure, gates)

    def map_configuration(self) -> BitConfiguration:
        """The mode of the factorized posterior: of every channel, and of every tensor's width given that it is kept."""
        return self.configuration("map")

    def save(self, path: str | Path, weights: str | None = None) -> None:
        """Write one safetensors file with probabilities, ranges and structure, atomically.

        Arguments:
            path: The file.
            weights: SHA-256 of the file of the weights it belongs to, in hexadecimal; :meth:`saved_with` gives it back.
        """
        tensors = {**self.probabilities._asdict(), "log_range": self.structure.quantizers.log_range}
        if weights is not None:  # as a tensor: several entries of the header would have no fixed order
            tensors["weights_sha256"] = torch.tensor(list(bytes.fromhex(weights)), dtype=torch.uint8)
        save_tensors_atomically(path, tensors, {"structure": self.structure.to_json()})

    @staticmethod
    def saved_with(path: str | Path) -> str | None:
        """SHA-256 of the weights that a saved posterior belongs to; None if it does not say."""
        with safe_open(path, framework="pt") as file:
            known = "weights_sha256" in file.keys()  # noqa: SIM118
            return bytes(file.get_tensor("weights_sha256").tolist()).hex() if known else None

    @classmethod
    def load(cls, path: str | Path) -> "GatePosterior":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the file is missing or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {})["structure"]
                structure = StructureSnapshot.from_json(text, file.get_tensor("log_range"))
                probabilities = GateProbabilities(*(file.get_tensor(k) for k in GateProbabilities._fields))
            _check_probabilities(probabilities, structure)
            return cls(structure, probabilities)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a saved gate posterior: {error}.") from error

    def _kept(self, channels: Tensor) -> list[float]:
        return [float(count) for count in self.cost.kept_outputs(channels)]

    def _tensor_frame(self, values: Tensor, columns: Sequence[int]) -> pd.DataFrame:
        index = pd.Index(self.structure.layout.tensors, name="tensor")
        return pd.DataFrame(values.double().numpy(), index=index, columns=pd.Index(columns, name="bits"))


def _check_probabilities(probabilities: GateProbabilities, structure: StructureSnapshot) -> None:
    for values, gates in zip(probabilities, structure.layout.open_gates(), strict=True):
        if values.shape != gates.shape or not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"probabilities must lie between 0 and 1 and have shape {tuple(gates.shape)}")
