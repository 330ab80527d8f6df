"""Insertion of quantizers and channel gates into a network, without touching its source."""

from pyro_bbits.insertion.network import LayerInfo, QuantizedNetwork, quantize

__all__ = ["LayerInfo", "QuantizedNetwork", "quantize"]
