"""Bayesian Bits as a probabilistic program: learn bit widths and pruning of a PyTorch network with Pyro.

Four objects, one direction: a quantized network, a prior (with its model), a guide, a posterior.

    import pyro_bbits as bb
    from pyro_bbits.models import GatedModel
    from pyro_bbits.inference import HardConcreteGuide, fit
    from pyro_bbits.analysis import GatePosterior, plot_gates

    net = bb.quantize(my_network, example_inputs=images[:64])
    prior = bb.GatePrior(net, mu=0.1)
    model = GatedModel(net, prior, num_data=60_000)
    guide = HardConcreteGuide(prior)
    history = fit(model, guide, train_loader, validation_loader, epochs=20)

    posterior = GatePosterior.from_guide(guide, net)
    posterior.table()
    posterior.map_configuration().save("bits.json")
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_bbits.configuration import BitConfiguration
    from pyro_bbits.cost import NetworkCost
    from pyro_bbits.deployment import freeze
    from pyro_bbits.gates import GateLayout, GateProbabilities, GateValues
    from pyro_bbits.insertion import QuantizedNetwork, quantize
    from pyro_bbits.ladder import BitLadder
    from pyro_bbits.prior import GatePrior
    from pyro_bbits.quantizer import residual_quantize

__all__ = [
    "BitConfiguration",
    "BitLadder",
    "GateLayout",
    "GatePrior",
    "GateProbabilities",
    "GateValues",
    "NetworkCost",
    "QuantizedNetwork",
    "freeze",
    "quantize",
    "residual_quantize",
]

__version__ = version("pyro-bbits")

_HOMES = {
    "BitConfiguration": "configuration",
    "BitLadder": "ladder",
    "GateLayout": "gates",
    "GatePrior": "prior",
    "GateProbabilities": "gates",
    "GateValues": "gates",
    "NetworkCost": "cost",
    "QuantizedNetwork": "insertion",
    "freeze": "deployment",
    "quantize": "insertion",
    "residual_quantize": "quantizer",
}


def __getattr__(name: str) -> Any:
    # loaded on first use, so that `bbits --help` does not wait for torch
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
