"""ONNX for ONNX Runtime: integer codes between `QuantizeLinear` and `DequantizeLinear`, verified by running it."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from torch import Tensor, nn

from pyro_bbits.analysis.export.graph import constant, master_graph
from pyro_bbits.analysis.export.lowering import Box, Lowered, lower, oldest_opset
from pyro_bbits.analysis.export.place import check_place, scratch
from pyro_bbits.analysis.export.report import ExportReport
from pyro_bbits.analysis.export.runtime import Mode, open_session, run_rows, runtime_version
from pyro_bbits.analysis.export.verification import (
    EXACT_SHARE,
    FUSED_SHARE,
    ROWS_OF_CODES,
    HeldOut,
    agreement,
    codes_of,
    compare_codes,
    outputs_of,
    rounding_of,
    with_biases,
)

__all__ = ["FileCheck", "export_onnx", "run_with_codes", "save_checked"]

DEFAULT_OPSET = 21
CODES = ".codes"


def export_onnx(
    frozen: nn.Module,
    path: str | Path,
    example_inputs: Tensor,
    *,
    optimize_for: Box = "speed",
    opset: int | None = None,
    batch: int | Literal["any"] = "any",
    held_out: HeldOut | None = None,
    about: Mapping[str, str] | None = None,
) -> ExportReport:
    r"""Write a frozen network for ONNX Runtime, and keep the file only if the runtime computes what the network does.

    Activations are unsigned bytes (zero point 0, or 128 if signed) whose codes are clipped; weights that meet them are
    int8 codes; biases are int32 on the grid of the sums, :math:`s_x s_w`, made finer by the digits that narrow weights
    leave free. What has no integer operator is float, multiplied out when the file is loaded. The file takes any number
    of rows as `input` and gives `output`; constants are called by module paths.

    The file is run twice. In exact mode, in float between the quantizers, it must choose the class of the frozen
    network with these biases on at least 99.9 % of the rows, its activation codes at most one apart. With integer
    operators it must on 99 %. What the biases change is in the report too (`biases`).

    Arguments:
        frozen: What :func:`~pyro_bbits.freeze` returns, perhaps with channels removed.
        path: The file; the report is written beside it.
        example_inputs: A few rows of input.
        optimize_for: `speed` stores weights as bytes, `size` packs those of 2 and 4 bits, which the runtime unpacks
            when it loads the file. A processor computes with both at the same speed.
        opset: Version of ONNX's operators; None takes 21, or 25 for packed 2-bit weights.
        batch: Rows of a call; `"any"` leaves them open.
        held_out: Rows to verify with; None takes the example inputs. Of more than one row a call, a multiple.
        about: Metadata of the file.

    Returns:
        The report.

    Raises:
        TypeError: If the network is not frozen.
        ValueError: If the opset is too old for the types, the exporter refuses the network, the file cannot be written
            or does not compute what the network does.
    """
    if optimize_for not in ("speed", "size"):
        raise ValueError(f"optimize_for must be 'speed' or 'size'; got {optimize_for!r}.")
    path, rows = check_place(path), held_out or HeldOut(example_inputs)
    needed = oldest_opset(frozen, optimize_for)
    if opset is not None and opset < needed:
        types = "packed 2-bit weights need" if needed > DEFAULT_OPSET else "4- and 16-bit types need"
        raise ValueError(f"{types} opset {needed} or newer; got {opset}.")
    master = master_graph(frozen, example_inputs, opset=opset or max(needed, DEFAULT_OPSET), batch=batch)
    lowered = lower(master, optimize_for)
    lowered.model.metadata_props.update(about or {})
    with scratch(path) as (draft,):
        save_checked(lowered.model, draft)
        figures = {"format": "onnx", "optimize_for": optimize_for, "opset": lowered.model.opset_imports[""]}
        report = ExportReport(path, figures | _verify(frozen, lowered, draft, rows, str(path)))
    report.save()
    return report


def save_checked(model: ir.Model, path: Path) -> None:
    """Write a model of standard operators and let ONNX check it.

    Raises:
        ValueError: If it is not valid.
    """
    ir.save(model, path)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"the exported graph is not valid ONNX: {str(error).splitlines()[0]}.") from error


def _verify(frozen: nn.Module, lowered: Lowered, draft: Path, rows: HeldOut, name: str) -> dict[str, Any]:
    """Run the file in each mode."""
    net = copy.deepcopy(frozen).cpu().eval()
    own = outputs_of(net, rows.inputs)
    net = with_biases(net, lowered.biases)
    check = FileCheck(net, rows, name)
    figures: dict[str, Any] = {
        "size_bytes": draft.stat().st_size,
        "runtime": runtime_version(),
        "frozen": rows.score(own),
        "rounding": asdict(check.rounding),
        "biases": agreement(check.expected, own, regression=rows.regression).figures() | rows.score(check.expected),
        "exact": check.exact(draft),
    }
    for mode in ("fused", "fast"):
        outputs = run_rows(_session(draft, mode), rows.inputs)[0]
        found = agreement(outputs, check.expected, check.rounding, regression=rows.regression)
        if mode == "fused":
            found.check(name, FUSED_SHARE, check.rounding)
        figures[mode] = found.figures() | rows.score(outputs)
    return figures | {"may_saturate_without_vnni": lowered.may_saturate}


class FileCheck:
    """Comparison of a file of plain operators with a network.

    Arguments:
        net: The network, on the CPU.
        rows: Held-out rows.
        name: What errors call the file.
    """

    def __init__(self, net: nn.Module, rows: HeldOut, name: str) -> None:
        self.net, self.rows, self.name = net, rows, name
        self.expected = outputs_of(net, rows.inputs)
        self.rounding = rounding_of(net, rows)

    def exact(self, model: Path | bytes, moved: Collection[str] = ()) -> dict[str, Any]:
        """Agreement and score in exact mode.

        Arguments:
            model: The file, or its content.
            moved: Tensors that are quantized at another place than in the network, so that codes cannot be compared.

        Raises:
            ValueError: If they do not agree.
        """
        outputs = run_rows(_session(model, "exact"), self.rows.inputs)[0]
        some = self.rows.first(ROWS_OF_CODES)
        _, theirs = codes_of(self.net, some.inputs)
        graph = ir.load(model) if isinstance(model, Path) else ir.from_proto(onnx.load_model_from_string(model))
        for name in map(_path, moved):
            theirs.pop(name, None)
        codes = compare_codes(run_with_codes(graph, some.inputs), theirs)
        found = agreement(outputs, self.expected, self.rounding, codes, regression=self.rows.regression)
        found.check(self.name, EXACT_SHARE, self.rounding)
        return found.figures() | self.rows.score(outputs)


def _session(model: Path | bytes, mode: Mode) -> Any:
    try:
        return open_session(model, mode)
    except Exception as error:
        raise ValueError(f"ONNX Runtime cannot load the exported file: {str(error).splitlines()[0]}.") from error


def run_with_codes(model: ir.Model, inputs: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """Activation codes of a model in exact mode, by the path of the quantizer."""
    found = {}
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and constant(node.inputs[0]) is None and node.inputs[0] is not None:
            codes = node.inputs[0]
            if str(codes.name).endswith(CODES) and codes.producer() is not None and not _from_constant(codes):
                zero = constant(node.inputs[2])
                found[_path(str(codes.name).removesuffix(CODES))] = (codes, 0 if zero is None else int(zero.item()))
    model.graph.outputs.extend(codes for codes, _ in found.values())
    results = run_rows(open_session(ir.to_proto(model).SerializeToString(), "exact"), inputs)[1:]
    return {
        name: codes.astype(np.int64) - zero for (name, (_, zero)), codes in zip(found.items(), results, strict=True)
    }


def _from_constant(value: ir.Value) -> bool:
    """Whether a value is a weight on its way out of its packing."""
    while (node := value.producer()) is not None:
        if node.inputs[0] is None or node.op_type == "QuantizeLinear":
            return False
        value = node.inputs[0]
    return constant(value) is not None


def _path(name: str) -> str:
    """`conv2.input` as `conv2.input_quantizer`, `attention.matmul0.left` as `attention.matmul0_left`."""
    if name.endswith((".left", ".right")):
        head, _, side = name.rpartition(".")
        return f"{head}_{side}"
    return f"{name}_quantizer"
