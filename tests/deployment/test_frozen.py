"""The parts of a frozen layer: which codes there are, what holds them, and the quantizer of an input."""

import pytest
import torch

from pyro_bbits.deployment import FrozenQuantizer, code_dtype, code_range
from pyro_bbits.quantizer import integer_codes, quantize_fixed


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16, 24])
def test_all_codes_lie_in_their_range_and_type(bits: int, signed: bool) -> None:
    low, high = code_range(bits, signed)
    codes = integer_codes(torch.tensor([-9.0, 9.0]), torch.tensor(1.0), bits, signed=signed)
    assert codes.tolist() == [low, high]
    assert codes.to(code_dtype(bits, signed)).tolist() == [low, high], "no code overflows"


def test_codes_take_the_smallest_type() -> None:
    signed = {bits: code_dtype(bits, True) for bits in (2, 8, 9, 16, 24)}
    assert signed == {2: torch.int8, 8: torch.int8, 9: torch.int16, 16: torch.int16, 24: torch.int32}
    assert [code_dtype(bits, False) for bits in (4, 8, 16)] == [torch.int8, torch.uint8, torch.int32]
    with pytest.raises(ValueError, match="up to 24 bits; got 40"):
        code_dtype(40, True)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_a_frozen_quantizer_is_the_ordinary_one(bits: int, signed: bool) -> None:
    x, beta = torch.randn(1000), 1.3
    quantizer = FrozenQuantizer(bits, beta, signed, "conv.input")
    assert torch.equal(quantizer(x), quantize_fixed(x, torch.tensor(beta), bits, signed=signed))
    assert quantizer(x.double()).dtype == torch.double
    assert quantizer.is_integer == (bits <= 24)
    if quantizer.is_integer:
        codes = quantizer(x) / quantizer.scale
        torch.testing.assert_close(codes, codes.round(), rtol=1e-6, atol=1e-6)
        assert codes.round().min() >= quantizer.low and codes.round().max() <= quantizer.high
    assert repr(quantizer).startswith(f"FrozenQuantizer(bits={bits}, scale=")
