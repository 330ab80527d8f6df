"""Distributions over gates: the autoregressive prior, its relaxed posteriors, their KL, and draws of all gates."""

from pyro_bbits.distributions.concrete import (
    AbstractRelaxedGate,
    DrawnPart,
    HardConcrete,
    LogitBernoulli,
    StraightThroughConcrete,
)
from pyro_bbits.distributions.deferred import Deferred
from pyro_bbits.distributions.factor import CostFactor, ExpectedCost
from pyro_bbits.distributions.gate import AbstractGate, GateBernoulli, PriorSite
from pyro_bbits.distributions.kl import gate_kl

__all__ = [
    "AbstractGate",
    "AbstractRelaxedGate",
    "CostFactor",
    "Deferred",
    "DrawnPart",
    "ExpectedCost",
    "GateBernoulli",
    "HardConcrete",
    "LogitBernoulli",
    "PriorSite",
    "StraightThroughConcrete",
    "gate_kl",
]
