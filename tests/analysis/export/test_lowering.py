"""The lowered graph computes the same in ONNX Runtime, with integer operators where it can."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from pyro_bbits.analysis.export.graph import quants
from pyro_bbits.analysis.export.lowering import Box, headroom, lower, oldest_opset
from pyro_bbits.analysis.export.onnx_file import run_with_codes
from pyro_bbits.analysis.export.runtime import MODES, Mode, open_session, run_rows
from pyro_bbits.analysis.export.verification import codes_of, outputs_of, with_biases
from pyro_bbits.deployment import code_range

PATHS = ("second", "third", "fourth", "head", "last")


def content(model: ir.Model) -> bytes:
    serialized: bytes = ir.to_proto(model).SerializeToString()
    return serialized


@pytest.mark.parametrize("weight", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("activation", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_headroom_is_all_there_is_within_a_byte_and_16_bits(weight: int, activation: int, signed: bool) -> None:
    top, (low, high) = code_range(weight, True)[1], code_range(activation, signed)
    low, high = (low + 128, high + 128) if signed else (low, high)

    def fits(digits: int) -> bool:
        return top << digits <= 127 and 2 * (top << digits) * high <= 2**15 - 1

    digits = headroom(code_range(weight, True), (low, high))
    assert digits == 0 or fits(digits)
    assert not fits(digits + 1)


@pytest.mark.parametrize("optimize_for", ["speed", "size"])
@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_those_of_the_network_with_the_biases_of_the_file(
    mixed: Any, master: Callable[[], ir.Model], optimize_for: Box, mode: Mode
) -> None:
    net, _, rows = mixed
    lowered = lower(master(), optimize_for)
    expected = outputs_of(with_biases(copy.deepcopy(net), lowered.biases), rows.inputs)
    if mode == "fast" and lowered.may_saturate:
        pytest.skip("sums may saturate on this processor")
    outputs = run_rows(open_session(content(lowered.model), mode), rows.inputs)[0]
    np.testing.assert_allclose(outputs, expected, atol=2e-5 * np.abs(expected).max())


def test_activation_codes_are_those_of_the_quantizers(mixed: Any, master: Callable[[], ir.Model]) -> None:
    net, _, rows = mixed
    lowered = lower(master())
    changed = with_biases(copy.deepcopy(net), lowered.biases)
    _, expected = codes_of(changed, rows.inputs)
    found = run_with_codes(lowered.model, rows.inputs)
    assert found.keys() == expected.keys() == {f"{path}.input_quantizer" for path in PATHS}
    for name, codes in found.items():
        np.testing.assert_array_equal(codes, expected[name])


def test_layers_between_quantizers_have_integer_operators(master: Callable[[], ir.Model], tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(content(lower(master(), "size").model), options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    # `first` reads floats, what `third` gives is added as floats, and `fourth` has 16 bits
    assert (found["QLinearConv"], found["QGemm"], found["Conv"] + found["FusedConv"]) == (1, 2, 3)
    # nothing is unpacked or dequantized at a call
    assert found["Cast"] == 0


def test_activations_are_unsigned_bytes_around_zero_or_128(master: Callable[[], ir.Model]) -> None:
    model = lower(master()).model
    constants = {name: value.const_value for name, value in model.graph.initializers.items() if value.const_value}
    zeros = {name: t for name, t in constants.items() if name.endswith("input.zero_point")}
    assert {name: (t.dtype.name, int(t.numpy())) for name, t in zeros.items()} == {
        "second.input.zero_point": ("UINT8", 0),
        "third.input.zero_point": ("UINT8", 0),
        "fourth.input.zero_point": ("UINT8", 0),
        "head.input.zero_point": ("UINT8", 0),
        "last.input.zero_point": ("UINT8", 128),
    }
    assert [int(constants[f"last.input.{end}"].numpy()) for end in ("low", "high")] == [121, 135]
    assert constants["second.bias.codes"].dtype == ir.DataType.INT32


def test_packed_weights_hold_the_codes_in_2_and_4_bits(mixed: Any, master: Callable[[], ir.Model]) -> None:
    model, expected = master(), {quant.name: quant.codes for quant in quants(master()) if quant.weight is not None}
    assert (oldest_opset(mixed[0], "size"), oldest_opset(mixed[0], "speed")) == (25, 21)
    graph = lower(model, "size").model.graph
    types = {}
    for name, codes in expected.items():
        tensor = graph.initializers[f"{name}.codes"].const_value
        assert tensor is not None
        types[name] = tensor.dtype.name
        np.testing.assert_array_equal(tensor.numpy().astype(np.int64), codes)
    assert types["second.weight"] == "INT2" and types["last.weight"] == "INT4" and types["head.weight"] == "INT8"


def test_sums_beyond_16_bits_are_named_and_right_in_fused_mode(master: Callable[[], ir.Model]) -> None:
    """All codes at their ends: without VNNI the plain integer operator adds two products in 16 bits."""
    from pyro_bbits.analysis.export.graph import INPUT, master_graph
    from pyro_bbits.deployment.frozen import FrozenLinear, FrozenQuantizer

    layer: Any = nn.Linear(64, 8, bias=False)
    layer.__class__ = FrozenLinear
    layer.bits, layer.signed, layer.weight_tensor = 8, True, "weight"
    layer.input_quantizer = FrozenQuantizer(8, 255.0, False)
    for name, value in (
        ("dead", torch.zeros(8, dtype=torch.bool)),
        ("codes", None),
        ("scale", None),
        ("bias_codes", None),
    ):
        layer.register_buffer(name, value)
    layer.set_codes(torch.full((8, 64), 127, dtype=torch.int8), torch.tensor(0.5))
    lowered = lower(master_graph(layer, torch.rand(2, 64)))
    assert len(lowered.may_saturate) == 1
    assert lower(master()).may_saturate == ["head"]
    for mode in ("exact", "fused"):
        outputs = open_session(content(lowered.model), mode).run(None, {INPUT: np.full((3, 64), 255, np.float32)})[0]
        np.testing.assert_array_equal(outputs, np.full((3, 8), 255 * 127 * 64 * 0.5, np.float32))
