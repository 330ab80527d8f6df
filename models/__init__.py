"""The Pyro models, and the reference networks."""

from pyro_bbits.models.digits_net import DigitsNet
from pyro_bbits.models.gated import AbstractModel, GatedModel, PlainModel
from pyro_bbits.models.lenet5 import LeNet5
from pyro_bbits.models.likelihoods import Likelihood, NormalLikelihood, categorical
from pyro_bbits.models.program import sample_gates
from pyro_bbits.models.registry import NETWORKS, build_network, default_network, fitting_networks
from pyro_bbits.models.vgg7 import VGG7

__all__ = [
    "NETWORKS",
    "VGG7",
    "AbstractModel",
    "DigitsNet",
    "GatedModel",
    "LeNet5",
    "Likelihood",
    "NormalLikelihood",
    "PlainModel",
    "build_network",
    "categorical",
    "default_network",
    "fitting_networks",
    "sample_gates",
]
