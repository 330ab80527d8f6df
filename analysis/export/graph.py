"""The master graph: a frozen network as ONNX with a QONNX `Quant` node for each quantized tensor."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
from torch import Tensor, nn

from pyro_bbits.deployment import code_range, frozen_layers
from pyro_bbits.deployment.quant_node import QONNX_DOMAIN

__all__ = ["INPUT", "OUTPUT", "Quant", "constant", "initializer", "master_graph", "quants", "tidy"]

INPUT, OUTPUT = "input", "output"
"""Names of what goes into a file's network and what comes out."""

OLDEST_OPSET, OPSET_2_BITS = 18, 25
SCOPES = "pkg.torch.onnx.name_scopes"
IR_VERSIONS = {OPSET_2_BITS: 13, 0: 10}
"""IR version from an opset on: 2-bit types came with 13; 10 is what runtimes have read for years."""


@dataclass(frozen=True)
class Quant:
    """A quantized tensor of a graph.

    Attributes:
        node: Its `Quant` node.
        name: Module path and role: `conv1.weight`, `conv2.input`.
        bits: Width in bits.
        signed: Whether codes are symmetric around zero, else they start there.
        scale: Step, float32, a scalar or broadcast against the tensor.
        weight: The float weight, on its grid; None for an activation.
    """

    node: ir.Node
    name: str
    bits: int
    signed: bool
    scale: np.ndarray[Any, np.dtype[np.float32]]
    weight: np.ndarray[Any, np.dtype[np.float32]] | None

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return code_range(self.bits, self.signed)

    @property
    def codes(self) -> np.ndarray[Any, Any]:
        """Integer codes of a weight."""
        assert self.weight is not None
        return np.clip(np.rint(self.weight / self.scale), *self.range).astype(np.int64)

    @property
    def axis(self) -> int | None:
        """Axis along which the scale changes; None for a scalar, -1 if there are several."""
        axes = [axis for axis, size in enumerate(self.scale.shape) if size > 1]
        if self.scale.size == 1:
            return None
        assert self.weight is not None
        return axes[0] + self.weight.ndim - self.scale.ndim if len(axes) == 1 else -1


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """What a value is, if it is constant."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def quants(model: ir.Model) -> Iterator[Quant]:
    """The quantized tensors of a graph in order; nodes may be replaced on the way."""
    for node in [node for node in model.graph if node.domain == QONNX_DOMAIN and node.op_type == "Quant"]:
        scale, bits, signed = constant(node.inputs[1]), constant(node.inputs[3]), node.attributes["signed"].as_int()
        assert scale is not None and bits is not None
        name, weight = str(node.name), constant(node.inputs[0])
        yield Quant(node, name, int(bits.item()), bool(signed), scale.astype(np.float32), weight)


def master_graph(
    net: nn.Module, example_inputs: Tensor, *, opset: int = 21, batch: int | Literal["any"] = "any"
) -> ir.Model:
    """A frozen network as an ONNX graph with a `Quant` node for each quantized tensor.

    Tensors and nodes are called by module paths. Equal quantizers of one tensor are one node, and a weight that the
    graph would transpose is stored transposed.

    Arguments:
        net: What :func:`~pyro_bbits.freeze` returns, perhaps with channels removed.
        example_inputs: At least one row.
        opset: Version of ONNX's operators.
        batch: Rows of a call; `"any"` leaves them open.

    Raises:
        TypeError: If the network is not frozen.
        ValueError: If there is no row, the opset is too old, or the ONNX exporter refuses the network.
    """
    if not frozen_layers(net):
        raise TypeError(f"an export needs a frozen network, bb.freeze(net, configuration); got {type(net).__name__}.")
    return traced(net, example_inputs, opset=opset, batch=batch)


def traced(net: nn.Module, example_inputs: Tensor, *, opset: int, batch: int | Literal["any"]) -> ir.Model:
    """Any network as an ONNX graph in the names of its modules; arguments and errors as :func:`master_graph`."""
    if opset < OLDEST_OPSET:
        raise ValueError(f"opset must be at least {OLDEST_OPSET}; got {opset}.")
    if not len(example_inputs):
        raise ValueError("an export needs at least one row of example inputs; got none.")
    net = copy.deepcopy(net).cpu().eval()
    model = _exported(net, example_inputs.detach().cpu(), opset, batch)
    _take_names(model)
    _merge(model)
    _fold_transposes(model)
    return tidy(model)


def _exported(net: nn.Module, example_inputs: Tensor, opset: int, batch: int | Literal["any"]) -> ir.Model:
    rows = 2 if batch == "any" else batch  # one row would be taken for a size that never changes
    example = example_inputs.repeat(-(-rows // len(example_inputs)), *[1] * (example_inputs.dim() - 1))[:rows]
    shapes = ({0: torch.export.Dim("batch")},) if batch == "any" else None
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                net,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip(" ()")), type(error).__name__)
        raise ValueError(f"PyTorch's ONNX exporter refuses this network: {_root(error) or reason}.") from error
    assert program is not None
    if len(program.model.graph.inputs) != 1 or len(program.model.graph.outputs) != 1:
        raise ValueError("an export is for networks with one input and one output.")
    if batch == "any" and _fixes_batch(program.model):
        raise ValueError(
            "the network's code fixes the number of rows when it is exported: len(x) does, x.shape[0] does not. "
            "Change it, or export for a fixed number (batch=1)."
        )
    return program.model


def _fixes_batch(model: ir.Model) -> bool:
    """PyTorch's exporter falls back to fixed shapes without a word."""
    shape = model.graph.inputs[0].shape
    return shape is not None and isinstance(shape[0], int)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of libraries that are not there, and of its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _root(error: BaseException) -> str:
    """First line of what went wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [""])[0].rstrip(".")


def _take_names(model: ir.Model) -> None:
    """Name nodes and their outputs by the module that makes them: `layer1.0/relu`, and `conv2.input` if quantized."""
    taken = {INPUT: 0, OUTPUT: 0}
    outputs = set(model.graph.outputs)
    for node in model.graph:
        scopes = _scopes(node)
        if node.domain == QONNX_DOMAIN:
            role = "weight" if constant(node.inputs[0]) is not None else "input"
            name = _quant_name(scopes[-2], role) if len(scopes) > 1 else role
        else:
            name = "/".join([*[s for s in scopes[-2:-1] if s], str(node.name).removeprefix("node_")])
        taken[name] = taken.get(name, -1) + 1
        node.name = f"{name}_{taken[name]}" if taken[name] else name
        for index, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = _value_name(node, index)


def _value_name(node: ir.Node, index: int) -> str:
    """The float weight has the parameter's name, so its quantized form needs another."""
    if node.domain == QONNX_DOMAIN and constant(node.inputs[0]) is not None:
        return f"{node.name}.quantized"
    return f"{node.name}_{index}" if index else str(node.name)


def _scopes(node: ir.Node) -> list[str]:
    text = node.metadata_props.get(SCOPES, "")
    return [part.strip(" '\"") for part in text.strip("[]").split(",")] if text else []


def _quant_name(path: str, role: str) -> str:
    """`conv2.input_quantizer` as `conv2.input`, `attention.matmul0_left` as `attention.matmul0.left`."""
    if role == "weight" and not path.endswith(("_left", "_right", "_quantizer")):
        return f"{path}.weight" if path else "weight"
    for ending, name in (("_quantizer", ""), ("_left", ".left"), ("_right", ".right")):
        if path.endswith(ending):
            return path.removesuffix(ending) + name
    return f"{path}.{role}" if path else role


def _merge(model: ir.Model) -> None:
    """One node for equal quantizers of one tensor."""
    seen: dict[tuple[Any, ...], ir.Value] = {}
    for quant in list(quants(model)):
        x, y = quant.node.inputs[0], quant.node.outputs[0]
        first = seen.setdefault((x, quant.scale.tobytes(), quant.bits, quant.signed), y)
        if first is not y:
            y.replace_all_uses_with(first, replace_graph_outputs=True)
            model.graph.remove(quant.node, safe=True)


def _fold_transposes(model: ir.Model) -> None:
    """Store a weight as its only reader, a transposition, makes it."""
    for quant in list(quants(model)):
        y = quant.node.outputs[0]
        readers = [node for node, _ in y.uses()]
        if quant.weight is None or len(readers) != 1 or readers[0].op_type != "Transpose":
            continue
        order = list(readers[0].attributes["perm"].as_ints())
        scale = quant.scale if quant.scale.ndim != len(order) else quant.scale.transpose(order)
        node = quant.node
        name = str(node.inputs[0].name)  # type: ignore[union-attr]
        node.replace_input_with(0, initializer(model, f"{name}.transposed", quant.weight.transpose(order)))
        node.replace_input_with(1, initializer(model, f"{quant.name}.scale.transposed", scale))
        y.shape = ir.Shape(quant.weight.transpose(order).shape)
        readers[0].outputs[0].replace_all_uses_with(y, replace_graph_outputs=True)
        model.graph.remove(readers[0], safe=True)


def initializer(model: ir.Model, name: str, array: Any, dtype: ir.DataType | None = None) -> ir.Value:
    """A new constant of a graph."""
    kind = ir.DataType.FLOAT if dtype is None else dtype
    content = np.ascontiguousarray(array).astype(kind.numpy()).reshape(np.shape(array))
    value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(content.shape))
    value.const_value = ir.Tensor(content, dtype=kind, name=name)
    model.graph.register_initializer(value)
    return value


def tidy(model: ir.Model) -> ir.Model:
    """Drop what nothing reads, and what the exporter says of the source code; set producer and IR version."""
    for one in (RemoveUnusedNodesPass(), ClearMetadataAndDocStringPass(), RemoveUnusedOpsetsPass()):
        one(model)
    model.producer_name, model.producer_version = "pyro-bbits", None
    model.graph.name = "network"
    opset = model.opset_imports[""]
    model.ir_version = next(ir_version for first, ir_version in IR_VERSIONS.items() if opset >= first)
    return model
