"""Interchangeable bodies of the residual quantizer, the choice between them, and the draw of all gates."""

from pyro_bbits.kernels.dispatch import quantize_row, use_body

__all__ = ["quantize_row", "use_body"]
