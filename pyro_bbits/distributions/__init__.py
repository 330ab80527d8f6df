"""Distributions over gates: the autoregressive prior, its relaxed posteriors and their KL."""

from pyro_bbits.distributions.concrete import AbstractRelaxedGate, HardConcrete, LogitBernoulli, StraightThroughConcrete
from pyro_bbits.distributions.gate import AbstractGate, GateBernoulli
from pyro_bbits.distributions.kl import gate_kl

__all__ = [
    "AbstractGate",
    "AbstractRelaxedGate",
    "GateBernoulli",
    "HardConcrete",
    "LogitBernoulli",
    "StraightThroughConcrete",
    "gate_kl",
]
