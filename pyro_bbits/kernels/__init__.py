"""The residual quantizer as interchangeable bodies, one per file, and the choice between them."""

from pyro_bbits.kernels.dispatch import quantize_row, use_body

__all__ = ["quantize_row", "use_body"]
