"""The exact posterior over gates, by enumeration: what guides approximate, for networks with few gates."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import pandas as pd
import pyro
import torch
from torch import Tensor

from pyro_bbits.analysis.mean_field import IMPOSSIBLE, Factor, coordinate_ascent
from pyro_bbits.cost import CONFIGURATIONS
from pyro_bbits.gates import GateLayout, GateProbabilities, GateValues
from pyro_bbits.inference.evaluation import device_of, evaluation_mode, to_device
from pyro_bbits.models import GatedModel
from pyro_bbits.prior import GatePrior

__all__ = ["ExactPosterior", "count_configurations"]


@dataclass(frozen=True, eq=False)
class ExactPosterior:
    r"""The posterior over all configurations of the gates of a small network, its weights fixed.

    .. math::
        p(z \mid D) = \frac{p(z) \prod_n p(y_n \mid x_n, z)}{p(D)}, \qquad
        p(D) = \sum_z p(z) \prod_n p(y_n \mid x_n, z)

    The sum is over the `K` distinct configurations that the prior allows: a width for every tensor and a state for
    every channel, where a tensor without a channel has no residual gates. Everything is float64 and on the CPU.

    Attributes:
        layout: Names and order of the gates.
        configurations: Hard gates with a leading dimension, `(K, C)` and `(K, T, R)`.
        log_prior: `(K,)` log-probabilities in nats.
        log_likelihood: `(K,)` log-likelihoods of the data set in nats.

    Example:
        >>> from torch import nn
        >>> from pyro_bbits import GatePrior, quantize
        >>> x, y = torch.rand(16, 4), torch.randint(2, (16,))
        >>> network = quantize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), x, bits=(2, 4, 8))
        >>> model = GatedModel(network, GatePrior(network, mu=0.1).pin_channels(), num_data=16)
        >>> exact = ExactPosterior.from_model(model, [(x, y)])
        >>> len(exact)  # three widths for each of three tensors
        27
        >>> bool(exact.elbo(exact.best_mean_field()) < exact.log_evidence)
        True
    """

    layout: GateLayout
    configurations: GateValues
    log_prior: Tensor
    log_likelihood: Tensor

    @classmethod
    def from_model(cls, model: GatedModel, data: Iterable[Any], *, limit: int = 10_000) -> "ExactPosterior":
        """Enumerate the configurations of a model and run the data set through each.

        Weights, ranges and the parameters of the likelihood stay as they are; the network is in evaluation mode.

        Arguments:
            model: The model; gates that its prior pins are not enumerated.
            data: Batches `(x, y)` that make up the whole data set, `model.num_data` points.
            limit: Largest number of configurations; each costs a pass over the data.

        Returns:
            The posterior.

        Raises:
            ValueError: If there are more configurations than the limit, before any is run; or if the data set has
                another size than the model's.
        """
        count = count_configurations(model.prior)
        if count > limit:
            raise ValueError(
                f"the exact posterior would need {count} configurations; the limit is {limit}. Pin gates, "
                "e.g. prior.pin_channels() or prior.pin('*.input', bits=8), or raise the limit."
            )
        gates = _enumerate(model.prior)
        log_likelihood = _log_likelihood(model, data, gates)
        return cls(model.prior.layout, gates, _log_prior(model.prior, gates, model.num_data), log_likelihood)

    def __len__(self) -> int:
        return len(self.log_prior)

    def __repr__(self) -> str:
        return f"ExactPosterior({len(self)} configurations, log evidence {self.log_evidence:.3f} nats)"

    @cached_property
    def log_joint(self) -> Tensor:
        """`(K,)` log-probabilities of configuration and data in nats."""
        return self.log_prior + self.log_likelihood

    @cached_property
    def log_evidence(self) -> float:
        """Log-probability of the data set under the prior over gates, in nats."""
        return self.log_joint.logsumexp(0).item()

    @cached_property
    def probabilities(self) -> Tensor:
        """`(K,)` posterior probabilities of the configurations."""
        return self.log_joint.softmax(0)

    @cached_property
    def gate_names(self) -> tuple[str, ...]:
        """A name for each of the `C + TR` gates, e.g. `z2[conv1[3]]`, `z4[conv1.weight]`; tensor by tensor."""
        layout = self.layout
        chains = tuple(f"{site}[{tensor}]" for tensor in layout.tensors for site in layout.residual_sites)
        return tuple(f"{layout.channel_site}[{name}]" for name in layout.channel_names) + chains

    @cached_property
    def free(self) -> Tensor:
        """Which gates are open in some configurations and closed in others, `(C + TR,)` booleans."""
        return self._open.any(0) & ~self._open.all(0)

    @cached_property
    def inclusion(self) -> Tensor:
        """Posterior probability that each gate is open, `(C + TR,)`, in the order of `gate_names`."""
        return self.probabilities @ self._open.double()

    def conditional(self) -> GateProbabilities:
        """Posterior probability of each gate given that its parent is open; 0 where the parent never is."""
        reached = self.probabilities @ self._exists.double()
        return self._split((self.inclusion / reached).nan_to_num(0.0).clamp(0, 1))

    def log_q(self, probabilities: GateProbabilities) -> Tensor:
        """Log-probability of each configuration under a guide that factorizes, `(K,)` in nats.

        Arguments:
            probabilities: Probability of each gate given its parent, e.g. `guide.probabilities()`.
        """
        p = self._join(probabilities)
        on, off = p.log().clamp(min=IMPOSSIBLE), torch.log1p(-p).clamp(min=IMPOSSIBLE)
        return self._open.double() @ on + (self._exists & ~self._open).double() @ off

    def approximate_inclusion(self, probabilities: GateProbabilities) -> Tensor:
        """Probability that each gate is open under a guide, `(C + TR,)`, in the order of `gate_names`."""
        return self.log_q(probabilities).exp() @ self._open.double()

    def elbo(self, probabilities: GateProbabilities) -> float:
        r"""ELBO of a factorized guide over hard gates, in nats per data set, summed over all configurations.

        .. math::
            \sum_z q(z) \big(\log p(z, D) - \log q(z)\big)

        It is that of the gates a guide stands for, whatever relaxation it is trained with.

        Arguments:
            probabilities: Probability of each gate given its parent.
        """
        log_q = self.log_q(probabilities)
        q = log_q.exp()
        return torch.where(q > 0, q * (self.log_joint - log_q), 0.0).sum().item()

    def gap(self, probabilities: GateProbabilities) -> float:
        """KL of a factorized guide against the exact posterior, in nats: log evidence less ELBO."""
        return self.log_evidence - self.elbo(probabilities)

    def best_mean_field(self, *, starts: int = 32, sweeps: int = 500, seed: int = 0) -> GateProbabilities:
        """The factorized posterior with the largest ELBO that coordinate ascent finds.

        A sweep sets every channel and every tensor's chain to its optimum given the others. The ELBO has local maxima;
        the best of all starts is kept.

        Arguments:
            starts: Random starting points; the first is the marginals of the exact posterior.
            sweeps: Most sweeps per start; it ends earlier once the ELBO moves by less than 1e-10 nats.
            seed: Seed of the starting points.

        Returns:
            Probability of each gate given its parent.

        Raises:
            ValueError: If there is no start or sweep.
        """
        if starts < 1 or sweeps < 1:
            raise ValueError(f"starts and sweeps must be at least 1; got {starts} and {sweeps}.")
        generator = torch.Generator().manual_seed(seed)
        candidates = [self.conditional(), *(self._random_start(generator) for _ in range(starts - 1))]
        found = (coordinate_ascent(self._factors, self.log_joint, self._join(p), sweeps) for p in candidates)
        return max(map(self._split, found), key=self.elbo)

    def top(self, count: int = 10) -> pd.DataFrame:
        """The most probable configurations.

        Arguments:
            count: How many, at most.

        Returns:
            A row each, most probable first: `probability`, `log_prior`, `log_likelihood`, the width of every tensor,
            and `kept.<layer>` for every prunable layer.
        """
        order = self.probabilities.argsort(descending=True)[:count].tolist()
        rows = []
        for k in order:
            gates = GateValues(*(g[k] for g in self.configurations))
            row: dict[str, Any] = {"probability": self.probabilities[k].item()}
            row |= {"log_prior": self.log_prior[k].item(), "log_likelihood": self.log_likelihood[k].item()}
            row |= dict(zip(self.layout.tensors, self.layout.bits(gates), strict=True))
            row |= {f"kept.{g}": n for g, n in zip(self.layout.slices, self.layout.kept(gates), strict=True)}
            rows.append(row)
        return pd.DataFrame(rows)

    @cached_property
    def _open(self) -> Tensor:
        """Open gates of each configuration, (K, C + TR) booleans."""
        channels, tensors = self.configurations
        return torch.cat([channels, tensors.flatten(1)], 1) > 0

    @cached_property
    def _exists(self) -> Tensor:
        """Gates whose parent is open, (K, C + TR) booleans."""
        roots = torch.ones_like(self.configurations.channels, dtype=torch.bool)
        return torch.cat([roots, _parents(self.layout, self.configurations).flatten(1)], 1)

    @cached_property
    def _factors(self) -> list[Factor]:
        channels, rungs = self.layout.num_channels, len(self.layout.ladder.residuals)
        chains = [[c] for c in range(channels)]
        chains += [
            list(range(channels + rungs * t, channels + rungs * (t + 1))) for t in range(len(self.layout.tensors))
        ]
        return [Factor.of(gates, self._open, self._exists) for gates in chains if self.free[gates].any()]

    def _join(self, probabilities: GateProbabilities) -> Tensor:
        shapes = [tuple(p.shape) for p in probabilities]
        if shapes != (expected := [tuple(g.shape) for g in self.layout.open_gates()]):
            raise ValueError(f"probabilities must have shapes {expected}: (channels,), (tensors, rungs); got {shapes}.")
        return torch.cat([p.detach().cpu().double().flatten() for p in probabilities])

    def _split(self, values: Tensor) -> GateProbabilities:
        channels, tensors = values.tensor_split([self.layout.num_channels])
        return GateProbabilities(channels, tensors.reshape(self.configurations.tensors.shape[1:]))

    def _random_start(self, generator: torch.Generator) -> GateProbabilities:
        logits = 4 * torch.randn(len(self.gate_names), generator=generator, dtype=torch.double)
        fixed = torch.where(self._open.any(0), 1.0, 0.0).double()
        return self._split(torch.where(self.free, logits.sigmoid(), fixed))


def count_configurations(prior: GatePrior) -> int:
    """Number of distinct configurations that a prior allows, without listing them.

    Example:
        >>> from torch import nn
        >>> from pyro_bbits import quantize
        >>> network = quantize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(16, 4))
        >>> count_configurations(GatePrior(network, mu=0.1))  # (2^8 - 1) 5 + 1 of the first weight, 5 of each other
        31900
    """
    layout, total = prior.layout, 1
    free, kept = _free(prior.channel_strength), prior.channel_strength == 0
    for tensor, rungs in enumerate(prior.allowed_rungs()):
        mine = layout.owner == tensor
        patterns = 2 ** int(free.cpu()[mine].sum())
        empty = int(bool(layout.prunable[tensor]) and not kept.cpu()[mine].any())
        total *= (patterns - empty) * len(rungs) + empty
    return total


def _free(strength: Tensor) -> Tensor:
    return (strength > 0) & strength.isfinite()


def _enumerate(prior: GatePrior) -> GateValues:
    """All distinct configurations: channel patterns, and for each the widths of the tensors it leaves."""
    layout, rungs = prior.layout, prior.allowed_rungs()
    strength = prior.channel_strength.cpu()
    places = _free(strength).nonzero().flatten()
    column, channels, widths = torch.arange(len(layout.ladder.residuals)), [], []
    for pattern in product((1.0, 0.0), repeat=len(places)):
        gates = (strength == 0).float()
        gates[places] = torch.tensor(pattern)
        alive = layout.any_channel(gates).tolist()
        chosen = torch.tensor(list(product(*(r if on else [0] for r, on in zip(rungs, alive, strict=True)))))
        widths.append((column < chosen[..., None]).float())
        channels.append(gates.expand(len(chosen), -1))
    return GateValues(torch.cat(channels), torch.cat(widths))


def _parents(layout: GateLayout, gates: GateValues) -> Tensor:
    """Whether the parent of each residual gate is open, (K, T, R)."""
    opened = torch.cat([layout.any_channel(gates.channels)[..., None], gates.tensors > 0], 2)
    return opened[..., : gates.tensors.shape[-1]]


def _log_prior(prior: GatePrior, gates: GateValues, num_data: int) -> Tensor:
    """Log-probability of each configuration: an open gate costs lambda, a closed one after it log(1 - exp(-lambda))."""
    channel_cost, cost = (num_data * s.cpu().double() for s in (prior.channel_strength, prior.strength))
    chains = torch.where(_parents(prior.layout, gates), _log_gate(gates.tensors, cost), 0.0)
    price = torch.vmap(prior.bops_nats, chunk_size=CONFIGURATIONS)
    bops = num_data * price(GateValues(*(g.to(prior.bops) for g in gates))).double().cpu()
    return _log_gate(gates.channels, channel_cost).sum(1) + chains.sum((1, 2)) - bops


def _log_gate(gates: Tensor, cost: Tensor) -> Tensor:
    return torch.where(gates > 0, -cost, torch.log(-torch.expm1(-cost)))


def _log_likelihood(model: GatedModel, data: Iterable[Any], gates: GateValues) -> Tensor:
    """Log-likelihood of the data set under each configuration, float64."""
    device, points = device_of(model), 0
    total = torch.zeros(len(gates.tensors), dtype=torch.double)
    with evaluation_mode(model), pyro.validation_enabled(False):
        for x, y in data:
            x, y = to_device(x, device), y.to(device)
            each = [model.predict(x, one).log_prob(y).double().sum() for one in _one_by_one(gates, device)]
            total, points = total + torch.stack(each).cpu(), points + len(y)
    if points != model.num_data:
        raise ValueError(
            f"the data must be the {model.num_data} points of the model's num_data, since the posterior is that of the "
            f"whole data set; got {points}."
        )
    return total


def _one_by_one(gates: GateValues, device: torch.device) -> Iterator[GateValues]:
    for channels, tensors in zip(*(g.to(device) for g in gates), strict=True):
        yield GateValues(channels, tensors)
