"""The methods that Bayesian Bits is compared with, on the same parts and in the same training loop."""

from collections.abc import Callable
from types import MappingProxyType

from pyro_bbits.inference.baselines.baseline import Baseline, RuleModel
from pyro_bbits.inference.baselines.bfloat16 import bfloat16
from pyro_bbits.inference.baselines.binary import binary
from pyro_bbits.inference.baselines.dq import dq
from pyro_bbits.inference.baselines.float32 import float32
from pyro_bbits.inference.baselines.l0 import l0
from pyro_bbits.inference.baselines.lsq import lsq
from pyro_bbits.inference.baselines.pact import pact
from pyro_bbits.inference.baselines.pruning_only import pruning_only
from pyro_bbits.inference.baselines.quantization_only import quantization_only
from pyro_bbits.inference.baselines.straight_through import straight_through
from pyro_bbits.inference.baselines.ternary import ternary
from pyro_bbits.inference.baselines.uniform import uniform

__all__ = [
    "BASELINES",
    "Baseline",
    "RuleModel",
    "bfloat16",
    "binary",
    "dq",
    "float32",
    "l0",
    "lsq",
    "pact",
    "pruning_only",
    "quantization_only",
    "straight_through",
    "ternary",
    "uniform",
]

BASELINES: MappingProxyType[str, Callable[..., Baseline]] = MappingProxyType(
    {
        "float32": float32,
        "bfloat16": bfloat16,
        "uniform": uniform,
        "lsq": lsq,
        "pact": pact,
        "dq": dq,
        "ternary": ternary,
        "binary": binary,
        "l0": l0,
        "quantization-only": quantization_only,
        "pruning-only": pruning_only,
        "straight-through": straight_through,
    }
)
"""All methods by name, each called as `BASELINES[name](net, example_inputs, num_data)`."""
