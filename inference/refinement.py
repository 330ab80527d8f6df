"""A last sweep over the gates that sets each to the optimum that gradient steps only creep up to."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bbits.distributions import GateBernoulli
from pyro_bbits.gates import GateValues
from pyro_bbits.inference.checks import check_guide, check_loader
from pyro_bbits.inference.evaluation import device_of, evaluation_mode, to_device
from pyro_bbits.inference.guides import AbstractGateGuide
from pyro_bbits.inference.progress import report_progress
from pyro_bbits.models import GatedModel

__all__ = ["refine_gates"]


def refine_gates(
    model: GatedModel,
    guide: AbstractGateGuide,
    data: Iterable[Any],
    *,
    draws: int = 8,
    sweeps: int = 2,
    channels: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> None:
    r"""Set every factor of the guide to its optimum given the others, by coordinate ascent with hard gates.

    .. math::
        \log q(s) = E_{q(\text{other gates})} \log p(D, z) + c

    with :math:`s` the width of a tensor, or a channel on or off. The optimum is that of the ELBO over hard gates,
    whatever relaxation the guide was trained with; the expectation is an average over a few draws of the other gates,
    which are updated along the way.

    Adam forgets large gradients over a thousand steps, while the gradient of a gate dies away as it closes (or opens
    for good), so training leaves clear-cut gates at probabilities such as 0.01 or 0.99, whatever the prior. After this
    they are what the prior and the data make them, and credible intervals of the cost no longer count gates that merely
    ran out of steps. Gates that are truly in doubt get the noise of the draws: about the spread of the log-likelihood
    over configurations divided by the root of `draws`, in nats. Coordinate ascent ends in the optimum next to where
    training ended, which need not be the best one.

    Batch norms are evaluated with the statistics they have; where the decided gates change, :func:`recalibrate_norms`
    adapts these afterwards.

    Each sweep costs `draws` passes over the data per residual gate, and per channel if those are asked for. Weights
    stay as they are.

    Arguments:
        model: The trained model.
        guide: Its guide; its logits are set in place.
        data: Batches `(x, y)`; the training data, or a part of it that stands for the whole.
        draws: Configurations of the other gates that each expectation averages over.
        sweeps: Rounds through all gates.
        channels: Whether to update the channel gates too. They are many and cheap, so most are truly in doubt, and few
            draws can leave them worse than training did; if not, they are drawn as they stand.
        seed: Seed of the draws.
        progress: Show a progress bar.

    Raises:
        TypeError: If the data have no length.
        ValueError: If `draws` or `sweeps` is below 1, there are no data, the guide belongs to another prior, or the
            prior is simplified: then the guide does not maximize the ELBO.

    References:
        Bishop, Pattern Recognition and Machine Learning, 2006, section 10.1.
    """
    if draws < 1 or sweeps < 1:
        raise ValueError(f"draws and sweeps must be at least 1; got {draws} and {sweeps}.")
    if model.prior.simplified:
        raise ValueError("the simplified penalty is no KL, so there is no ELBO to refine; use simplified=False.")
    check_guide(model, guide)
    check_loader(data, "refinement")
    with evaluation_mode(model), pyro.validation_enabled(False):
        sweep = _Sweep(model, guide.log_odds(), data, draws, seed)
        updates = sweep.updates(channels)
        with report_progress(sweeps, len(updates), progress, "refining gates") as report:
            for update in updates * sweeps:
                update()
                report(None, 0.0)
        guide.set_log_odds(sweep.channel_logits, sweep.logits)


class _Sweep:
    """Draws from the current posterior, each with its log-likelihood, and the log-odds of all gates, on the CPU.

    The draws keep up with the posterior: when a factor has its new optimum, each gets a new state of that factor, whose
    log-likelihood is known already. The chain of a weight without channels is drawn too; it changes nothing.
    """

    def __init__(
        self, model: GatedModel, log_odds: tuple[Tensor, Tensor], data: Iterable[Any], draws: int, seed: int
    ) -> None:
        self.model, self.data, self.layout = model, data, model.prior.layout
        self.generator = torch.Generator().manual_seed(seed)
        cost = (model.num_data * s.cpu().double() for s in (model.prior.channel_strength, model.prior.strength))
        self.channel_prior, self.prior = (GateBernoulli(c, validate_args=False) for c in cost)
        self.channel_logits, self.logits = (logits.cpu().double() for logits in log_odds)
        self.draws = [self._draw() for _ in range(draws)]
        self.values = torch.stack([self._log_likelihood(gates) for gates in self.draws])

    def updates(self, channels: bool) -> list[Callable[[], None]]:
        """An update for every factor that the prior leaves free, tensors first: they are few, and matter more."""
        free = [(t, rungs) for t, rungs in enumerate(self.model.prior.allowed_rungs()) if len(rungs) > 1]
        found = [partial(self._update_tensor, tensor, rungs) for tensor, rungs in free]
        cost = self.channel_prior.cost
        undecided = ((cost > 0) & cost.isfinite()).nonzero().flatten().tolist() if channels else []
        return [*found, *(partial(self._update_channel, channel) for channel in undecided)]

    def _update_tensor(self, tensor: int, rungs: list[int]) -> None:
        """Set the chain of a tensor from the log-likelihood and the prior of each width."""
        alive = torch.stack([self.layout.any_channel(gates.channels)[tensor] for gates in self.draws])
        if not alive.any():
            return
        states = [[_with_rung(gates, tensor, rung) for rung in rungs] for gates in self.draws]
        values = self._values(states)
        log_q = torch.full((self.logits.shape[1] + 1,), -torch.inf, dtype=torch.double)
        log_q[rungs] = (values[alive].mean(0) + self._log_prior(tensor)[rungs]).log_softmax(0)
        finer = log_q.flip(0).logcumsumexp(0).flip(0)
        self.logits[tensor] = (finer[1:] - log_q[:-1]).nan_to_num(-torch.inf)
        self._redraw(states, values, log_q[rungs].exp())

    def _update_channel(self, channel: int) -> None:
        """Set a channel gate from its gain in log-likelihood, its prior odds and the chain that the last one brings."""
        states = [[_with_channel(gates, channel, on) for on in (0.0, 1.0)] for gates in self.draws]
        values = self._values(states)
        tensor = int(self.layout.owner[channel])
        others = self.layout.owner == tensor
        others[channel] = False
        last = F.logsigmoid(-self.channel_logits[others]).sum().exp()
        prior = -self.channel_prior.cost[channel] - self.channel_prior.log_off[channel]
        gain = (values[:, 1] - values[:, 0]).mean() + prior - last * self._chain_kl(tensor)
        self.channel_logits[channel] = gain
        self._redraw(states, values, torch.sigmoid(torch.stack([-gain, gain])))

    def _log_prior(self, tensor: int) -> Tensor:
        return _log_rungs(-self.prior.cost[tensor], self.prior.log_off[tensor])

    def _chain_kl(self, tensor: int) -> Tensor:
        log_q = _log_rungs(F.logsigmoid(self.logits[tensor]), F.logsigmoid(-self.logits[tensor]))
        q = log_q.exp()
        return torch.where(q > 0, q * (log_q - self._log_prior(tensor)), 0.0).sum()

    def _draw(self) -> GateValues:
        channels, tensors = (
            torch.bernoulli(torch.sigmoid(logits), generator=self.generator).float()
            for logits in (self.channel_logits, self.logits)
        )
        return GateValues(channels, tensors.cumprod(1))

    def _redraw(self, states: list[list[GateValues]], values: Tensor, probabilities: Tensor) -> None:
        chosen = torch.multinomial(probabilities, len(states), replacement=True, generator=self.generator).tolist()
        self.draws = [row[state] for row, state in zip(states, chosen, strict=True)]
        self.values = values[torch.arange(len(states)), chosen]

    def _values(self, states: list[list[GateValues]]) -> Tensor:
        """Log-likelihoods of the states that each draw could take, (draws, states); that of its own is known."""
        rows = [
            [value if _same(gates, state) else self._log_likelihood(state) for state in row]
            for gates, value, row in zip(self.draws, self.values, states, strict=True)
        ]
        return torch.stack([torch.stack(row) for row in rows])

    def _log_likelihood(self, gates: GateValues) -> Tensor:
        """Log-likelihood under hard gates, scaled to the whole data set, less the price of their BOPs, in nats."""
        device = device_of(self.model)
        total, points = torch.zeros((), dtype=torch.double), 0
        gates = GateValues(*(g.to(device) for g in gates))
        for x, y in self.data:
            x, y = to_device(x, device), y.to(device)
            total, points = total + self.model.predict(x, gates).log_prob(y).double().sum().cpu(), points + len(y)
        cost = self.model.num_data * self.model.prior.bops_nats(gates).double().cpu()
        return total * (self.model.num_data / points) - cost


def _same(a: GateValues, b: GateValues) -> bool:
    return torch.equal(a.channels, b.channels) and torch.equal(a.tensors, b.tensors)


def _with_channel(gates: GateValues, channel: int, on: float) -> GateValues:
    channels = gates.channels.clone()
    channels[channel] = on
    return gates._replace(channels=channels)


def _with_rung(gates: GateValues, tensor: int, rung: int) -> GateValues:
    tensors = gates.tensors.clone()
    tensors[tensor] = (torch.arange(tensors.shape[1]) < rung).float()
    return gates._replace(tensors=tensors)


def _log_rungs(log_on: Tensor, log_off: Tensor) -> Tensor:
    """Log-probabilities of the `R + 1` rungs of a chain, from those of each gate being on and off given its parent."""
    zero = log_on.new_zeros(1)
    return torch.cat([zero, log_on.cumsum(0)]) + torch.cat([log_off, zero])
