"""The Pyro models, and the reference networks."""

from pyro_bbits.models.digits_net import DigitsNet
from pyro_bbits.models.gated import AbstractModel, GatedModel, PlainModel
from pyro_bbits.models.lenet5 import LeNet5
from pyro_bbits.models.likelihoods import Likelihood, NormalLikelihood, categorical
from pyro_bbits.models.mlp import MLP
from pyro_bbits.models.mobilenetv2 import MobileNetV2
from pyro_bbits.models.pretrained import load_pretrained, read_state_dict
from pyro_bbits.models.program import sample_gates
from pyro_bbits.models.registry import NETWORKS, build_network, default_network, fitting_networks, network_options
from pyro_bbits.models.resnet18 import ResNet18
from pyro_bbits.models.resnet20 import ResNet20
from pyro_bbits.models.taught import DistilledModel, SmoothedModel
from pyro_bbits.models.vgg7 import VGG7
from pyro_bbits.models.vit import ViT

__all__ = [
    "MLP",
    "NETWORKS",
    "VGG7",
    "AbstractModel",
    "DigitsNet",
    "DistilledModel",
    "GatedModel",
    "LeNet5",
    "Likelihood",
    "MobileNetV2",
    "NormalLikelihood",
    "PlainModel",
    "ResNet18",
    "ResNet20",
    "SmoothedModel",
    "ViT",
    "build_network",
    "categorical",
    "default_network",
    "fitting_networks",
    "load_pretrained",
    "network_options",
    "read_state_dict",
    "sample_gates",
]
