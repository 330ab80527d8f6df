"""Exported files in the programs that they are for; each test needs its program, see `make interop`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits import BitConfiguration, freeze, quantize
from pyro_bbits.analysis.export import HeldOut, export_aimet, export_onnx, export_qonnx
from pyro_bbits.analysis.export.graph import INPUT, OUTPUT
from pyro_bbits.analysis.export.verification import outputs_of
from pyro_bbits.cost import INPUT_BITS

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]

WIDTHS = {
    "conv.weight": 8,
    "mid.weight": 4,
    "mid.input": 4,
    "fc1.weight": 2,
    "fc1.input": 8,
    "fc2.weight": 8,
    "fc2.input": 4,
}


class Small(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mid = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3)
        self.fc1, self.fc2 = nn.Linear(8 * 4, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        x = F.max_pool2d(F.relu(self.mid(x)), 2).flatten(1)
        logits: Tensor = self.fc2(F.relu(self.fc1(x)))
        return logits


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, BitConfiguration, HeldOut]:
    torch.manual_seed(2)
    net, x = Small().eval(), torch.randn(32, 1, 14, 14)
    network = quantize(net, x)
    configuration = BitConfiguration.from_gates(network, network.open_gates()).with_bits(WIDTHS)
    fresh = Small()
    fresh.load_state_dict(network.net.state_dict())
    return freeze(fresh, configuration), configuration, HeldOut(x)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_qonnx_executes_the_file_and_counts_the_same_bops(small: Any, tmp_path: Path) -> None:
    pytest.importorskip("qonnx")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes
    from qonnx.util.inference_cost import inference_cost

    net, configuration, rows = small
    report = export_qonnx(net, tmp_path / "network.onnx", rows.inputs[:2], held_out=rows)
    assert report.figures["qonnx"]["top1"] == 1.0
    model = ModelWrapper(str(report.path)).transform(InferShapes())
    outputs = [execute_onnx(model, {INPUT: row.numpy()})[OUTPUT] for row in rows.inputs.split(1)]
    close(np.concatenate(outputs), outputs_of(net, rows.inputs))
    cost = inference_cost(str(report.path), discount_sparsity=False)["total_cost"]
    # the network's own input is float to them, 8 bit to us
    theirs = sum(count * _product(name) for name, count in cost.items() if name.startswith("op_mac"))
    assert theirs == sum(layer.bops for layer in configuration.layers)


def _product(name: str) -> int:
    """`op_mac_SCALEDINT<4>_INT8` as 32."""
    _, _, left, right = name.split("_", 3)
    bits = [INPUT_BITS if "FLOAT32" in part else int("".join(c for c in part if c.isdigit())) for part in (left, right)]
    return bits[0] * bits[1]


def test_hls4ml_parses_the_file_with_its_widths(small: Any, tmp_path: Path) -> None:
    pytest.importorskip("hls4ml")
    pytest.importorskip("qonnx")
    import hls4ml
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul
    from qonnx.util.cleanup import cleanup_model

    net, _, rows = small
    report = export_qonnx(net, tmp_path / "network.onnx", rows.inputs[:2], held_out=rows)
    model = cleanup_model(ModelWrapper(str(report.path)))
    model = cleanup_model(model.transform(ConvertToChannelsLastAndClean()).transform(GemmToMatMul()))
    config = hls4ml.utils.config_from_onnx_model(
        model, granularity="name", backend="Vitis", default_precision="fixed<40,14>"
    )
    parsed = hls4ml.converters.convert_from_onnx_model(
        model, output_dir=str(tmp_path / "hls"), io_type="io_stream", backend="Vitis", hls_config=config
    )
    widths = [
        w.type.precision.width for layer in parsed.get_layers() for n, w in layer.weights.items() if n == "weight"
    ]
    assert widths == [8, 4, 2, 8]


def test_openvino_runs_the_file_of_onnx_runtime(small: Any, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    net, _, rows = small
    report = export_onnx(net, tmp_path / "network.onnx", rows.inputs[:2], held_out=rows)
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(report.path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = next(iter(compiled(rows.inputs.numpy()).values()))
    assert (outputs.argmax(1) == outputs_of(net, rows.inputs).argmax(1)).mean() >= 0.9


def test_aimet_loads_the_encodings(small: Any, tmp_path: Path) -> None:
    pytest.importorskip("aimet_onnx")
    from aimet_onnx.quantsim import QuantizationSimModel, load_encodings_to_sim

    net, _, rows = small
    report = export_aimet(net, tmp_path / "network.onnx", rows.inputs[:2], held_out=rows)
    encodings = tmp_path / "network.encodings"
    sim = QuantizationSimModel(onnx.load(report.path), path=str(tmp_path))
    load_encodings_to_sim(sim, str(encodings), strict=False)
    entries = json.loads(encodings.read_text())["encodings"]
    for entry in entries:
        quantizer = sim.qc_quantize_op_dict[entry["name"]]
        assert quantizer.enabled and quantizer.bitwidth == int(entry["output_dtype"].partition("int")[2])
    outputs = sim.session.run(None, {INPUT: rows.inputs.numpy()})[0]
    assert (outputs.argmax(1) == outputs_of(net, rows.inputs).argmax(1)).mean() >= 0.9
