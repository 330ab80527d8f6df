"""Insertion of quantizers and channel gates into a network, without touching its source."""

from pyro_bbits.insertion.network import QuantizedNetwork
from pyro_bbits.insertion.products import MATMUL
from pyro_bbits.insertion.quantizing import Ranges, quantize
from pyro_bbits.insertion.rule import QuantizationRule
from pyro_bbits.insertion.structure import FloatLayer, LayerInfo, NetworkStructure, StructureSnapshot

__all__ = [
    "MATMUL",
    "FloatLayer",
    "LayerInfo",
    "NetworkStructure",
    "QuantizationRule",
    "QuantizedNetwork",
    "Ranges",
    "StructureSnapshot",
    "quantize",
]
