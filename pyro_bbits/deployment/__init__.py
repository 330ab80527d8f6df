"""From a trained network and its bit configuration to what is deployed: integer codes, fewer channels, a small file."""

from pyro_bbits.deployment.freeze import freeze, kept_norms
from pyro_bbits.deployment.frozen import (
    FROZEN_LAYERS,
    FrozenLayer,
    FrozenQuantizer,
    code_dtype,
    code_range,
    frozen_layers,
)

__all__ = [
    "FROZEN_LAYERS",
    "FrozenLayer",
    "FrozenQuantizer",
    "code_dtype",
    "code_range",
    "freeze",
    "frozen_layers",
    "kept_norms",
]
