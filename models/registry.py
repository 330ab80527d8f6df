"""Networks by name."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from pyro_bbits.models.digits_net import DigitsNet
from pyro_bbits.models.lenet5 import LeNet5
from pyro_bbits.models.mlp import MLP
from pyro_bbits.models.mobilenetv2 import MobileNetV2
from pyro_bbits.models.resnet18 import ResNet18
from pyro_bbits.models.resnet20 import ResNet20
from pyro_bbits.models.vgg7 import VGG7
from pyro_bbits.models.vit import ViT

__all__ = ["NETWORKS", "build_network", "default_network", "fitting_networks", "network_options"]

Value = TypeVar("Value")

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "digits-net": DigitsNet,
    "lenet5": LeNet5,
    "vgg7": VGG7,
    "resnet20": ResNet20,
    "resnet18": ResNet18,
    "mobilenetv2": MobileNetV2,
    "vit": ViT,
    "mlp": MLP,
}

_DEFAULTS: dict[str, str] = {"digits": "digits-net", "mnist": "lenet5", "cifar10": "vgg7"}

# arguments that follow from the data
_FROM_DATA = ("in_channels", "in_features", "image_size", "num_classes", "num_outputs")


def build_network(name: str, input_shape: tuple[int, ...], num_outputs: int, **options: Any) -> nn.Module:
    """Build a network of `NETWORKS` that fits a data set.

    Arguments:
        name: A key of `NETWORKS`.
        input_shape: Shape of one sample: channels, height and width of an image, or the number of features.
        num_outputs: Number of classes, or of regression outputs.
        **options: What else the network can be given, e.g. `width`; see :func:`network_options`.

    Returns:
        The network with its initial weights, drawn from the global generator.

    Raises:
        ValueError: If the name or an option is unknown, or the network cannot take inputs of this shape.

    Example:
        >>> build_network("lenet5", (1, 28, 28), 10).fc1
        Linear(in_features=1024, out_features=512, bias=True)
        >>> build_network("mlp", (13,), 1, widths=(32,)).head
        Linear(in_features=32, out_features=1, bias=True)
    """
    network = _look_up(NETWORKS, name, "network")
    known = network_options(name)
    for option in options:
        if option not in known:
            choice = f"its options are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{name} has no option {option!r}; {choice}.")
    if len(input_shape) not in (1, 3):
        raise ValueError(f"input_shape must be (features,) or (channels, height, width); got {input_shape}.")
    if "in_features" in inspect.signature(network).parameters:
        return network(in_features=math.prod(input_shape), num_outputs=num_outputs, **options)
    if len(input_shape) != 3:
        raise ValueError(
            f"{name} needs images, (channels, height, width); got samples of shape {input_shape}. "
            "A network for features is 'mlp'."
        )
    size = _image_size(name, network, *input_shape[1:])
    return network(in_channels=input_shape[0], num_classes=num_outputs, **size, **options)


def network_options(name: str) -> dict[str, Any]:
    """Options of a network with their defaults: what :func:`build_network` takes beside the shapes.

    Arguments:
        name: A key of `NETWORKS`.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> network_options("resnet18")
        {'width': 64, 'stem': 'imagenet'}
    """
    parameters = inspect.signature(_look_up(NETWORKS, name, "network")).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key not in _FROM_DATA}


def default_network(data_name: str) -> str:
    """Name the network that a data set is trained with unless another is asked for.

    Arguments:
        data_name: A name that `pyro_bbits.data.load_data` knows.

    Returns:
        A key of `NETWORKS`.

    Raises:
        ValueError: If there is none for this data set.
    """
    return _look_up(_DEFAULTS, data_name, "default network for data")


def _image_size(name: str, network: Callable[..., nn.Module], height: int, width: int) -> dict[str, int]:
    """Hand the size of images to a network that asks for it; one that averages over all pixels takes any."""
    only = getattr(network, "image_size", None)
    asks = "image_size" in inspect.signature(network).parameters
    if height != width and (asks or only is not None):
        raise ValueError(f"{name} needs square images; got {height}x{width}.")
    if only not in (None, height):
        raise ValueError(f"{name} takes {only}x{only} images only; got {height}x{width}.")
    return {"image_size": height} if asks else {}


def fitting_networks(input_shape: tuple[int, ...], num_outputs: int) -> list[str]:
    """Names of the networks of `NETWORKS` that can be built for a data set; none of them is given memory.

    Arguments:
        input_shape: Shape of one sample.
        num_outputs: Number of classes or outputs.
    """
    names = []
    for name in NETWORKS:
        with torch.device("meta"), contextlib.suppress(ValueError):
            build_network(name, input_shape, num_outputs)
            names.append(name)
    return names


def _look_up(known: Mapping[str, Value], name: str, what: str) -> Value:
    if name not in known:
        raise ValueError(f"no {what} is called {name!r}; choose one of {', '.join(known)}.")
    return known[name]
