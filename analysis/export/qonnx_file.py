"""QONNX for FINN and hls4ml: the master graph itself, verified by lowering it again and running that."""

import copy
import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from pyro_bbits.analysis.export.graph import INPUT, OUTPUT, master_graph
from pyro_bbits.analysis.export.lowering import lower
from pyro_bbits.analysis.export.onnx_file import FileCheck
from pyro_bbits.analysis.export.place import check_place, scratch
from pyro_bbits.analysis.export.report import ExportReport
from pyro_bbits.analysis.export.runtime import runtime_version
from pyro_bbits.analysis.export.verification import EXACT_SHARE, HeldOut, agreement, outputs_of

__all__ = ["export_qonnx"]

OPSET = 18
MOST_ROWS = 1024
ROWS_OF_QONNX = 4


def export_qonnx(
    frozen: nn.Module,
    path: str | Path,
    example_inputs: Tensor,
    *,
    batch: int = 1,
    held_out: HeldOut | None = None,
) -> ExportReport:
    """Write a frozen network as QONNX, which FINN, hls4ml and Brevitas read, and keep it only if it computes the same.

    Float operators with a `Quant` node for each quantized tensor; weights are float32 on their grids. Shapes are fixed,
    since these tools need them. The file is read again, its `Quant` nodes are replaced by operators of ONNX Runtime,
    and that is compared with the network as by :func:`export_onnx`, up to 1024 rows; if the package `qonnx` is
    installed, its executor runs a few rows as well.

    Arguments:
        frozen: What :func:`~pyro_bbits.freeze` returns, perhaps with channels removed.
        path: The file; the report is written beside it.
        example_inputs: A few rows of input.
        batch: Rows of a call.
        held_out: Rows to verify with; None takes the example inputs.

    Returns:
        The report.

    Raises:
        TypeError: If the network is not frozen.
        ValueError: If the exporter refuses the network, the file cannot be written or does not compute what the network
            does.

    References:
        Pappalardo et al.: QONNX, representing arbitrary-precision quantized neural networks, 2022, arXiv:2206.07527.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1; got {batch}.")
    path, rows = check_place(path), (held_out or HeldOut(example_inputs)).first(MOST_ROWS)
    whole = len(rows.inputs) // batch * batch
    if not whole:
        raise ValueError(
            f"a file for {batch} rows at a time is verified with at least as many; got {len(rows.inputs)}."
        )
    model = master_graph(frozen, example_inputs, opset=OPSET, batch=batch)
    net = copy.deepcopy(frozen).cpu().eval()
    with scratch(path) as (draft,):
        ir.save(model, draft)
        check = FileCheck(net, rows.first(whole), str(path))
        lowered = lower(ir.load(draft), integers=False).model
        figures = {
            "format": "qonnx",
            "opset": OPSET,
            "batch": batch,
            "size_bytes": draft.stat().st_size,
            "runtime": runtime_version(),
            "rounding": asdict(check.rounding),
            "exact": check.exact(ir.to_proto(lowered).SerializeToString()),
            **_executed(draft, check, batch),
        }
        report = ExportReport(path, figures)
    report.save()
    return report


def _executed(file: Path, check: FileCheck, batch: int) -> dict[str, Any]:
    """Agreement of qonnx's own executor; nothing if it is not installed."""
    if importlib.util.find_spec("qonnx") is None:
        return {}
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    model = ModelWrapper(str(file)).transform(InferShapes())
    rows = check.rows.first(batch * ROWS_OF_QONNX)
    parts = [execute_onnx(model, {INPUT: part.numpy()})[OUTPUT] for part in rows.inputs.split(batch)]
    found = agreement(
        np.concatenate(parts), outputs_of(check.net, rows.inputs), check.rounding, regression=rows.regression
    )
    found.check(check.name, EXACT_SHARE, check.rounding)
    return {"qonnx": found.figures()}
