"""Guides, objective and training."""

from pyro_bbits.inference.capture_audit import HostReads
from pyro_bbits.inference.checkpoint import Checkpoint, Checkpoints
from pyro_bbits.inference.checks import NonFiniteError
from pyro_bbits.inference.evaluation import Evaluation, evaluate
from pyro_bbits.inference.gate_elbo import GateELBO
from pyro_bbits.inference.guides import AbstractGateGuide, BernoulliGuide, HardConcreteGuide, StraightThroughGuide
from pyro_bbits.inference.history import EpochRecord, History
from pyro_bbits.inference.norms import recalibrate_norms
from pyro_bbits.inference.objective import EmptyGuide, elbo_module, parameter_groups, svi_pair
from pyro_bbits.inference.recipe import FINE_TUNING, Recipe
from pyro_bbits.inference.refinement import refine_gates
from pyro_bbits.inference.training import fine_tune, fit

__all__ = [
    "FINE_TUNING",
    "AbstractGateGuide",
    "BernoulliGuide",
    "Checkpoint",
    "Checkpoints",
    "EmptyGuide",
    "EpochRecord",
    "Evaluation",
    "GateELBO",
    "HardConcreteGuide",
    "History",
    "HostReads",
    "NonFiniteError",
    "Recipe",
    "StraightThroughGuide",
    "elbo_module",
    "evaluate",
    "fine_tune",
    "fit",
    "parameter_groups",
    "recalibrate_norms",
    "refine_gates",
    "svi_pair",
]
