"""Coordinate ascent for the best factorized posterior over an enumerated set of configurations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IMPOSSIBLE", "Factor", "coordinate_ascent"]

IMPOSSIBLE = -1e4
"""Log-probability in place of minus infinity: its exponential is 0, and 0 times it is no NaN."""


@dataclass(frozen=True)
class Factor:
    """One factor of the guides' family: the gate of a channel, or the whole chain of a tensor.

    A factor has a table of log-probabilities, one for each of its `S` states (off and on, or the widths), so it can be
    any distribution over them.

    Attributes:
        gates: Columns of its `n` gates, coarse to fine.
        states: `(S, n)` booleans, the open gates of each state.
        members: For each state, the configurations that have it; those in which the factor does not exist are in none.
        size: Number `K` of configurations.
    """

    gates: list[int]
    states: Tensor
    members: list[Tensor]
    size: int

    @classmethod
    def of(cls, gates: list[int], opened: Tensor, exists: Tensor) -> "Factor":
        """Find the states of some gates among `(K, G)` open gates and gates whose parent is open."""
        present = exists[:, gates[0]].nonzero().flatten()
        states, index = opened[present][:, gates].unique(dim=0, return_inverse=True)
        return cls(gates, states, [present[index == s] for s in range(len(states))], len(opened))

    def table(self, probabilities: Tensor) -> Tensor:
        """Log-probabilities of the states, from the probability of each gate given its parent, `(G,)`."""
        p = probabilities[self.gates]
        on, off = p.log().clamp(min=IMPOSSIBLE), torch.log1p(-p).clamp(min=IMPOSSIBLE)
        return torch.where(self.states, on, torch.where(self._parents, off, 0.0)).sum(1)

    def conditional(self, table: Tensor) -> Tensor:
        """Probability of each gate given its parent, `(n,)`; 0 where the parent is never open."""
        weights = table.exp()
        opened, reached = weights @ self.states.double(), weights @ self._parents.double()
        return (opened / reached).nan_to_num(0.0).clamp(0, 1)

    def spread(self, table: Tensor) -> Tensor:
        """The log-probability that this factor gives to each configuration, `(K,)`; 0 where it does not exist."""
        values = torch.zeros(self.size, dtype=torch.double)
        for members, value in zip(self.members, table, strict=True):
            values[members] = value
        return values

    def optimum(self, others: Tensor, log_joint: Tensor) -> Tensor:
        r"""The table with the largest ELBO, the other factors given: :math:`\log q(s) = E[\log p - \log q_{-}] + c`.

        Arguments:
            others: `(K,)` summed log-probabilities of the other factors.
            log_joint: `(K,)` log-probabilities of configuration and data.
        """
        means = [others[m].softmax(0) @ (log_joint[m] - others[m]) for m in self.members]
        return torch.stack(means).log_softmax(0).clamp(min=IMPOSSIBLE)

    @property
    def _parents(self) -> Tensor:
        return torch.cat([torch.ones_like(self.states[:, :1]), self.states[:, :-1]], 1)


def coordinate_ascent(factors: Sequence[Factor], log_joint: Tensor, start: Tensor, sweeps: int) -> Tensor:
    """Set one factor after the other to its optimum until the ELBO stands still.

    Arguments:
        factors: The factors.
        log_joint: `(K,)` log-probabilities of configuration and data in nats.
        start: `(G,)` probability of each gate given its parent.
        sweeps: Most rounds through the factors.

    Returns:
        Probabilities as `start`, at a point where no factor can be improved alone; gates of no factor are unchanged.

    References:
        Bishop, Pattern Recognition and Machine Learning, 2006, section 10.1.
    """
    tables, last = [factor.table(start) for factor in factors], -math.inf
    total = sum((f.spread(t) for f, t in zip(factors, tables, strict=True)), torch.zeros_like(log_joint))
    for _ in range(sweeps):
        for i, factor in enumerate(factors):
            others = total - factor.spread(tables[i])
            tables[i] = factor.optimum(others, log_joint)
            total = others + factor.spread(tables[i])
        q = total.exp()
        value = torch.where(q > 0, q * (log_joint - total), 0.0).sum().item()
        if value - last < 1e-10:
            break
        last = value
    result = start.clone()
    for factor, table in zip(factors, tables, strict=True):
        result[factor.gates] = factor.conditional(table)
    return result
