"""Packed codes are the bytes of ONNX, and come back."""

import pytest
import torch

from pyro_bbits.deployment import code_range
from pyro_bbits.deployment.bit_packing import container_bits, pack_codes, unpack_codes

WIDTHS = [2, 3, 4, 5, 8, 12, 16, 24]


def draw(bits: int, signed: bool, *shape: int) -> torch.Tensor:
    low, high = code_range(bits, signed)
    codes = torch.randint(low, high + 1, shape)
    codes.view(-1)[:2] = torch.tensor([low, high])
    return codes


@pytest.mark.parametrize("count", [3, 4, 5, 30])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_codes_come_back(bits: int, signed: bool, count: int) -> None:
    codes, width = draw(bits, signed, count, 1), container_bits(bits)
    packed = pack_codes(codes, width)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-count * width // 8),)
    restored = unpack_codes(packed, (count, 1), width, bits, signed)
    assert torch.equal(restored.long(), codes)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_the_bytes_are_those_of_onnx(width: int, signed: bool) -> None:
    ir = pytest.importorskip("onnx_ir")
    codes = draw(width, signed, 5, 3)
    dtype = ir.DataType[f"{'' if signed else 'U'}INT{width}"]
    expected = ir.Tensor(codes.numpy().astype(dtype.numpy()), dtype=dtype).tobytes()
    assert pack_codes(codes, width).numpy().tobytes() == expected


def test_the_first_code_is_in_the_lowest_bits() -> None:
    assert pack_codes(torch.tensor([1, 0, 0, -1, 1]), 2).tolist() == [0b11_00_00_01, 0b01]
    assert pack_codes(torch.tensor([-7, 3]), 4).tolist() == [0b0011_1001]
    assert pack_codes(torch.tensor([-2]), 16).tolist() == [0xFE, 0xFF]


def test_a_wrong_number_of_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"9 codes of 4 bits do not lie in a tensor of shape \(4,\)"):
        unpack_codes(torch.zeros(4, dtype=torch.uint8), (3, 3), 4, 4, True)
