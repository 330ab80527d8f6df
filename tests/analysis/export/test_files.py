"""Files are what their formats say, are verified by running them, and are not there if that fails."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from pyro_bbits import freeze
from pyro_bbits.analysis.export import export_aimet, export_onnx, export_qonnx, onnx_file
from pyro_bbits.analysis.export.lowering import Lowered, lower
from pyro_bbits.analysis.export.runtime import open_session, run_rows
from pyro_bbits.deployment import frozen_layers


def test_onnx_is_verified_and_its_report_is_what_the_file_does(mixed: Any, tmp_path: Path) -> None:
    net, _, rows = mixed
    path = tmp_path / "new" / "network.onnx"
    report = export_onnx(net, path, rows.inputs[:3], optimize_for="size", held_out=rows, about={"classes": "[]"})
    assert report.path == path and report.size == path.stat().st_size
    figures = json.loads(report.file.read_text())
    assert sorted(p.name for p in path.parent.iterdir()) == ["network.onnx", "network.onnx.verification.json"]
    for mode in ("exact", "fused"):
        session = open_session(path, mode)
        accuracy = 100 * (run_rows(session, rows.inputs)[0].argmax(1) == rows.targets.numpy()).mean()
        assert figures[mode]["accuracy"] == pytest.approx(accuracy) and figures[mode]["top1"] == 1.0
    assert figures["exact"]["max_code_difference"] == 0 and figures["exact"]["codes"] > 0
    assert session.get_modelmeta().custom_metadata_map["classes"] == "[]"
    assert (figures["opset"], onnx.load(path).ir_version) == (25, 13)
    assert any("agrees on 100.00 % of 96 rows" in line for line in report.lines())


def test_a_file_that_computes_something_else_is_not_left(
    mixed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any) -> Lowered:
        lowered = lower(*args)
        value = lowered.model.graph.initializers["last.weight.scale"]
        assert value.const_value is not None
        value.const_value = ir.Tensor(-value.const_value.numpy(), name=value.name)
        return lowered

    monkeypatch.setattr(onnx_file, "lower", wrong)
    net, _, rows = mixed
    with pytest.raises(ValueError, match=r"was not written: .* agrees with the frozen network on .* of 96 rows"):
        export_onnx(net, tmp_path / "network.onnx", rows.inputs[:3], held_out=rows)
    assert not list(tmp_path.iterdir())


def test_bad_requests_are_one_error_and_leave_nothing(mixed: Any, tmp_path: Path) -> None:
    net, _, rows = mixed
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="packed 2-bit weights need opset 25 or newer; got 21"):
        export_onnx(net, tmp_path / "a.onnx", rows.inputs[:3], optimize_for="size", opset=21)
    for export in (export_onnx, export_qonnx, export_aimet):
        with pytest.raises(ValueError, match=r"cannot be written: .*file is a file"):
            export(net, tmp_path / "file" / "a.onnx", rows.inputs[:3])
    with pytest.raises(ValueError, match="is a folder"):
        export_onnx(net, tmp_path, rows.inputs[:3])
    with pytest.raises(ValueError, match="'speed' or 'size'; got 'small'"):
        export_onnx(net, tmp_path / "a.onnx", rows.inputs[:3], optimize_for="small")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="frozen network"):
        export_onnx(nn.Linear(2, 2), tmp_path / "a.onnx", torch.rand(2, 2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_found_first(mixed: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="may not be written to"):
        export_onnx(mixed[0], tmp_path / "a.onnx", mixed[2].inputs[:3])


def test_qonnx_holds_float_weights_and_quant_nodes_of_fixed_shape(mixed: Any, tmp_path: Path) -> None:
    net, configuration, rows = mixed
    report = export_qonnx(net, tmp_path / "network.onnx", rows.inputs[:3], held_out=rows)
    assert report.figures["exact"]["top1"] == 1.0
    model = onnx.load(report.path)
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 1, 14, 14]
    nodes = {node.name: node for node in model.graph.node if node.op_type == "Quant"}
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert nodes.keys() == configuration.bits().keys()
    for tensor in configuration.tensors:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[tensor.name].attribute}
        assert attributes == {"signed": tensor.signed, "narrow": tensor.signed, "rounding_mode": b"ROUND"}
        assert constants[nodes[tensor.name].input[3]] == tensor.bits and constants[nodes[tensor.name].input[2]] == 0
    for path, layer in frozen_layers(net).items():
        np.testing.assert_array_equal(constants[f"{path}.weight"], layer.weight.numpy())


def test_aimet_encodings_name_tensors_and_weights_lie_on_their_grids(mixed: Any, tmp_path: Path) -> None:
    net, configuration, rows = mixed
    report = export_aimet(net, tmp_path / "network.onnx", rows.inputs[:3], held_out=rows)
    assert report.figures["exact"]["top1"] == 1.0
    content = json.loads((tmp_path / "network.encodings").read_text())
    entries = {entry["name"]: entry for entry in content["encodings"]}
    assert content["version"] == "2.0.0" and entries.keys() == configuration.bits().keys()
    model = onnx.load(report.path)
    known = {tensor.name for tensor in model.graph.initializer} | {y for node in model.graph.node for y in node.output}
    assert entries.keys() <= known
    for tensor in configuration.tensors:
        assert entries[tensor.name]["output_dtype"] == f"{'' if tensor.signed else 'u'}int{tensor.bits}"
    layer = frozen_layers(net)["second"]
    assert entries["second.weight"]["axis"] == 0
    np.testing.assert_allclose(entries["second.weight"]["y_scale"], layer.scale.numpy(), rtol=1e-7)
    made_by = {y: node.op_type for node in model.graph.node for y in node.output}
    # the skip reads what `fourth` quantizes, and codes of `last` are signed
    assert {made_by[f"{path}.input"] for path in ("fourth", "last")} == {"Clip"}


def test_aimet_refuses_widths_that_its_format_has_not(tmp_path: Path) -> None:
    from pyro_bbits import BitConfiguration, quantize

    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(8, 3)
    network = quantize(net, x, bits=(3, 6))
    frozen = freeze(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        BitConfiguration.from_gates(network, network.open_gates()),
    )
    with pytest.raises(ValueError, match=r"hold 2, 4, 8, 16 bits; '0\.weight' has 6"):
        export_aimet(frozen, tmp_path / "network.onnx", x)
    assert not list(tmp_path.iterdir())
