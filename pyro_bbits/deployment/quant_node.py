"""How a quantizer shows in an ONNX graph: one QONNX `Quant` node, from which every format is made."""

import torch
from torch import Tensor

__all__ = ["QONNX_DOMAIN", "quant_node"]

QONNX_DOMAIN = "qonnx.custom_op.general"
"""Domain of the node; QONNX is what FINN, hls4ml and Brevitas read."""


def quant_node(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    r"""Stand for :math:`s \, \mathrm{clamp}(\mathrm{round}(x / s), l, h)` in a graph that is being exported.

    Nothing is computed: call it only under `torch.onnx.is_in_onnx_export()`. `narrow` of the node is the symmetric grid
    of signed codes.

    Arguments:
        x: Any shape.
        scale: Step `s`, a scalar or broadcast against `x`.
        bits: Width in bits, at most 24.
        signed: Whether codes are symmetric around zero, else they start there.

    Returns:
        A symbolic tensor like `x`.

    References:
        Pappalardo et al.: QONNX, representing arbitrary-precision quantized neural networks, 2022, arXiv:2206.07527.
    """
    result: Tensor = torch.onnx.ops.symbolic(
        f"{QONNX_DOMAIN}::Quant",
        (x, scale, torch.tensor(0.0), torch.tensor(float(bits))),
        attrs={"signed": int(signed), "narrow": int(signed), "rounding_mode": "ROUND"},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )
    return result
