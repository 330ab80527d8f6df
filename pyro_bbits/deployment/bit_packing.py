"""Integer codes in as few bits as they need, in the layout of ONNX."""

import torch
from torch import Tensor

from pyro_bbits.deployment.frozen import code_dtype

__all__ = ["container_bits", "pack_codes", "unpack_codes"]

CONTAINERS = (2, 4, 8, 16, 32)


def container_bits(bits: int) -> int:
    """The smallest of 2, 4, 8, 16 and 32 bits that holds codes of a width.

    Example:
        >>> container_bits(3)
        4
    """
    return next(width for width in CONTAINERS if width >= bits)


def pack_codes(codes: Tensor, width: int) -> Tensor:
    """Pack integer codes in two's complement, the first code in the lowest bits.

    The bytes are those that ONNX has as raw data of INT2, INT4, INT8, ... tensors: four or two codes in a byte, zeros
    behind the last; wider ones little-endian.

    Arguments:
        codes: Integers of any shape.
        width: Bits for each, one of 2, 4, 8, 16 and 32.

    Returns:
        Bytes, uint8, flat.

    Example:
        >>> pack_codes(torch.tensor([1, -1, 0, 1, -1]), 2)
        tensor([77,  3], dtype=torch.uint8)
    """
    flat = codes.reshape(-1).long() & (2**width - 1)
    if width >= 8:
        return torch.stack([(flat >> shift) & 255 for shift in range(0, width, 8)], 1).flatten().to(torch.uint8)
    count = 8 // width
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % count)).reshape(-1, count)
    return (rows << torch.arange(0, 8, width, device=rows.device)).sum(1).to(torch.uint8)


def unpack_codes(packed: Tensor, shape: tuple[int, ...], width: int, bits: int, signed: bool) -> Tensor:
    """Codes from what :func:`pack_codes` made.

    Arguments:
        packed: Bytes, uint8.
        shape: Shape of the codes.
        width: Bits that each takes.
        bits: Width of the codes, which says what type they have in memory.
        signed: Whether they are in two's complement.

    Raises:
        ValueError: If the number of bytes does not fit the shape.
    """
    count = torch.Size(shape).numel()
    if packed.dtype != torch.uint8 or packed.shape != (-(-count * width // 8),):
        raise ValueError(f"{count} codes of {width} bits do not lie in a tensor of shape {tuple(packed.shape)}")
    values = packed.long()
    if width >= 8:
        parts = values.reshape(-1, width // 8)
        flat = (parts << torch.arange(0, width, 8, device=parts.device)).sum(1)
    else:
        flat = (values[:, None] >> torch.arange(0, 8, width, device=values.device)).flatten()[:count] & (2**width - 1)
    if signed:
        flat = torch.where(flat >= 2 ** (width - 1), flat - 2**width, flat)
    return flat.to(code_dtype(bits, signed)).reshape(shape)
