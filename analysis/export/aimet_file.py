"""Encodings of AIMET 2 beside a float graph, for Qualcomm's tools; verified by quantizing as the encodings say."""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from pyro_bbits.analysis.export.graph import Quant, constant, initializer, master_graph, quants, tidy
from pyro_bbits.analysis.export.lowering import BOXES, TO_INPUT, oldest_opset, widths_of
from pyro_bbits.analysis.export.onnx_file import DEFAULT_OPSET, FileCheck, save_checked
from pyro_bbits.analysis.export.place import check_place, scratch
from pyro_bbits.analysis.export.report import ExportReport
from pyro_bbits.analysis.export.runtime import runtime_version
from pyro_bbits.analysis.export.verification import HeldOut
from pyro_bbits.files import write_text_atomically

__all__ = ["export_aimet"]

VERSION = "2.0.0"
ENCODINGS = ".encodings"


def export_aimet(
    frozen: nn.Module, path: str | Path, example_inputs: Tensor, *, held_out: HeldOut | None = None
) -> ExportReport:
    """Write a float ONNX graph and its AIMET encodings (version 2.0.0), and keep them only if they fit the network.

    The encodings name tensors of the graph; weights lie on their grids, for the format knows no symmetric integers. A
    `Clip` stands before activations that are signed, or that something reads unquantized too, so that the tensor of the
    encoding holds what the network quantizes and no more. 32-bit tensors have no encoding. The files are read again,
    quantized as the encodings say, and compared with the network in ONNX Runtime as by :func:`export_onnx`.

    Arguments:
        frozen: What :func:`~pyro_bbits.freeze` returns, perhaps with channels removed.
        path: The graph, e.g. `model.onnx`; the encodings are written as `model.encodings`, the report beside.
        example_inputs: A few rows of input.
        held_out: Rows to verify with; None takes the example inputs.

    Returns:
        The report.

    Raises:
        TypeError: If the network is not frozen.
        ValueError: If a width is none of the format's, the exporter refuses the network, a file cannot be written or
            does not compute what the network does.
    """
    path, rows = check_place(path), held_out or HeldOut(example_inputs)
    beside = check_place(path.with_suffix(ENCODINGS))
    for name, bits, _ in widths_of(frozen):
        if bits not in BOXES:
            raise ValueError(
                f"AIMET's encodings hold {', '.join(map(str, BOXES))} bits; {name!r} has {bits}. Choose other widths "
                "with BitConfiguration.with_bits, or another format."
            )
    opset = max(oldest_opset(frozen, "size"), DEFAULT_OPSET)
    model, encodings, moved = _encode(master_graph(frozen, example_inputs, opset=opset))
    net = copy.deepcopy(frozen).cpu().eval()
    with scratch(path, beside) as (graph_file, encodings_file):
        save_checked(model, graph_file)
        write_text_atomically(encodings_file, json.dumps(encodings, indent=1) + "\n")
        read = json.loads(encodings_file.read_text(encoding="utf-8"))
        quantized = ir.to_proto(_quantized(ir.load(graph_file), read["encodings"])).SerializeToString()
        check = FileCheck(net, rows, str(path))
        figures = {
            "format": "aimet",
            "version": VERSION,
            "size_bytes": graph_file.stat().st_size + encodings_file.stat().st_size,
            "runtime": runtime_version(),
            "encodings": len(read["encodings"]),
            "rounding": asdict(check.rounding),
            "exact": check.exact(quantized, moved),
        }
        report = ExportReport(path, figures)
    report.save()
    return report


def _encode(model: ir.Model) -> tuple[ir.Model, dict[str, Any], set[str]]:
    """Take the `Quant` nodes out of a master graph, in place, and into encodings; which of them are earlier now."""
    entries, moved = [], set[str]()
    for quant in list(quants(model)):
        if quant.axis == -1 or (quant.scale <= 0).any():
            raise ValueError(
                f"AIMET's encodings hold positive scales along one axis; those of {quant.name!r} are of shape "
                f"{quant.scale.shape}, the smallest {quant.scale.min():.3g}. Choose another format."
            )
        entries.append(_activation(model, quant, moved) if quant.weight is None else _weight(model, quant))
    return tidy(model), {"version": VERSION, "encodings": entries}, moved


def _entry(name: str, quant: Quant) -> dict[str, Any]:
    scale: dict[str, Any] = {"y_scale": float(quant.scale.reshape(-1)[0])}
    if quant.axis is not None:
        scale = {"y_scale": quant.scale.reshape(-1).tolist(), "axis": quant.axis}
    return {"name": name, **scale, "output_dtype": f"{'' if quant.signed else 'u'}int{quant.bits}"}


def _weight(model: ir.Model, quant: Quant) -> dict[str, Any]:
    value = initializer(model, f"{quant.name}.on_grid", (quant.codes * quant.scale).astype(np.float32))
    old = quant.node.inputs[0]
    assert old is not None
    quant.node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    model.graph.remove(quant.node, safe=True)
    if not old.uses():
        del model.graph.initializers[str(old.name)]
        value.name = quant.name
    return _entry(str(value.name), quant)


def _activation(model: ir.Model, quant: Quant, moved: set[str]) -> dict[str, Any]:
    """Name the tensor that is quantized, in front of what only moves it, for AIMET has no quantizers behind that."""
    x, y, reader = quant.node.inputs[0], quant.node.outputs[0], quant.node
    assert x is not None
    while len(x.uses()) == 1 and (maker := x.producer()) is not None and maker.op_type in TO_INPUT:
        assert maker.inputs[0] is not None
        moved.add(quant.name)
        x, reader = maker.inputs[0], maker
    if quant.signed or len(x.uses()) > 1 or x.is_graph_input():
        x = _clipped(model, quant, x, reader)
    y.name, result = f"{y.name}.replaced", quant.node.inputs[0]
    assert result is not None
    y.replace_all_uses_with(result, replace_graph_outputs=True)
    model.graph.remove(quant.node, safe=True)
    x.name = quant.name
    return _entry(quant.name, quant)


def _clipped(model: ir.Model, quant: Quant, x: ir.Value, reader: ir.Node) -> ir.Value:
    """The values that codes stand for, for one reader alone."""
    ends = [np.float32(end) * quant.scale.reshape(()) for end in quant.range]
    names = (f"{quant.name}.{role}" for role in ("low", "high"))
    clip = ir.node(
        "Clip",
        [x, *(initializer(model, name, end) for name, end in zip(names, ends, strict=True))],
        name=f"{quant.name}/Clip",
    )
    result = clip.outputs[0]
    result.type, result.shape = x.type, x.shape
    model.graph.insert_before(reader, clip)
    reader.replace_input_with(0, result)
    return result


def _quantized(model: ir.Model, encodings: list[Mapping[str, Any]]) -> ir.Model:
    """The float graph with the quantizers that its encodings ask for, in place."""
    values = {value.name: value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}
    for entry in encodings:
        value, scale = values[entry["name"]], np.asarray(entry["y_scale"], np.float32)
        weight = constant(value)
        if weight is None:
            _quantize(model, value, entry, scale)
        else:
            codes, shape = _ends(entry), [-1 if axis == entry.get("axis") else 1 for axis in range(weight.ndim)]
            scale = scale.reshape(shape) if scale.ndim else scale
            on_grid = (np.clip(np.rint(weight / scale), *codes) * scale).astype(np.float32)
            value.const_value = ir.Tensor(on_grid, name=value.name)
    return model


def _ends(entry: Mapping[str, Any]) -> tuple[int, int]:
    """All codes of an integer type, as AIMET takes them."""
    unsigned, bits = entry["output_dtype"].startswith("u"), int(entry["output_dtype"].partition("int")[2])
    return (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _quantize(model: ir.Model, value: ir.Value, entry: Mapping[str, Any], scale: Any) -> None:
    """Quantizer of an activation, narrow codes in a box of 8 bits, for the runtime quantizes to no smaller ones."""
    name, (low, high), unsigned = entry["name"], _ends(entry), entry["output_dtype"].startswith("u")
    box: ir.DataType = getattr(ir.DataType, f"{'U' if unsigned else ''}INT{16 if high > 2**8 else 8}")
    step, zero = initializer(model, f"{name}.scale", scale), initializer(model, f"{name}.zero_point", 0, box)
    ends = [initializer(model, f"{name}.{role}", end, box) for role, end in (("least", low), ("most", high))]
    maker, readers = value.producer(), list(value.uses())
    assert maker is not None
    first = ir.node("QuantizeLinear", [value, step, zero])
    second = ir.node("Clip", [first.outputs[0], *ends])
    third = ir.node("DequantizeLinear", [second.outputs[0], step, zero])
    made = ((first, "unclipped", box), (second, "codes", box), (third, "value", ir.DataType.FLOAT))
    for node, role, kind in made:
        y = node.outputs[0]
        y.name, y.type, y.shape = f"{name}.{role}", ir.TensorType(kind), value.shape
    model.graph.insert_after(maker, [node for node, *_ in made])
    for node, index in readers:
        node.replace_input_with(index, third.outputs[0])
