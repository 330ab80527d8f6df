"""Guides, objective and training."""

from pyro_bbits.inference.checkpoint import Checkpoint, Checkpoints
from pyro_bbits.inference.checks import NonFiniteError
from pyro_bbits.inference.evaluation import Evaluation, evaluate
from pyro_bbits.inference.guides import AbstractGateGuide, HardConcreteGuide, StraightThroughGuide
from pyro_bbits.inference.history import EpochRecord, History
from pyro_bbits.inference.norms import recalibrate_norms
from pyro_bbits.inference.objective import EmptyGuide, elbo_module, parameter_groups, svi_pair
from pyro_bbits.inference.recipe import FINE_TUNING, Recipe
from pyro_bbits.inference.training import fine_tune, fit

__all__ = [
    "FINE_TUNING",
    "AbstractGateGuide",
    "Checkpoint",
    "Checkpoints",
    "EmptyGuide",
    "EpochRecord",
    "Evaluation",
    "HardConcreteGuide",
    "History",
    "NonFiniteError",
    "Recipe",
    "StraightThroughGuide",
    "elbo_module",
    "evaluate",
    "fine_tune",
    "fit",
    "parameter_groups",
    "recalibrate_norms",
    "svi_pair",
]
