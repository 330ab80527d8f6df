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
from pyro_bbits.deployment.packed import PackedSize, float_bytes, load_packed, save_packed
from pyro_bbits.deployment.removal import RemovalReport, count_macs, remove_channels
from pyro_bbits.deployment.rounding import check_channels, round_channels

__all__ = [
    "FROZEN_LAYERS",
    "FrozenLayer",
    "FrozenQuantizer",
    "PackedSize",
    "RemovalReport",
    "check_channels",
    "code_dtype",
    "code_range",
    "count_macs",
    "float_bytes",
    "freeze",
    "frozen_layers",
    "kept_norms",
    "load_packed",
    "remove_channels",
    "round_channels",
    "save_packed",
]
