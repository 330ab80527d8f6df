"""From the master graph to operators that ONNX Runtime has: integer codes, `QuantizeLinear` and `DequantizeLinear`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from torch import nn

from pyro_bbits.analysis.export.graph import Quant, constant, initializer, quants, tidy
from pyro_bbits.deployment import FrozenLayer, FrozenQuantizer, code_range

__all__ = ["BOXES", "Lowered", "headroom", "lower", "oldest_opset", "widths_of"]

FUSED_LAYERS = ("Conv", "Gemm", "MatMul")
"""Layers that ONNX Runtime has integer operators for; that of a convolution has an integer output as well."""

BIASED_LAYERS = {"Conv": 2, "Gemm": 2}
"""Those whose bias is added to the integer sums, and where they take it."""

TO_INPUT = ("Reshape", "Flatten", "Transpose", "MaxPool")
TO_OUTPUT = (*TO_INPUT, "Relu", "Clip")
"""What the runtime moves quantizers across, from a layer's input and to its output."""

BOXES = (2, 4, 8, 16)
"""Widths of ONNX's integers that codes are stored in."""

WIDEST_BOX, WIDEST_FUSED = 16, 8
SAFE_SUM = 2**15 - 1
"""Processors without VNNI add two products of bytes in 16 bits, and saturate beyond."""

INT32_TOP = 2**31 - 1
Box = Literal["speed", "size"]


@dataclass
class Lowered:
    """A graph of plain ONNX operators, and what became of its numbers.

    Attributes:
        model: The graph.
        biases: Float biases as the integers in the file make them, by the name of the bias.
        may_saturate: Layers whose sums of two products may leave 16 bits.
    """

    model: ir.Model
    biases: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    may_saturate: list[str] = field(default_factory=list)


def box_bits(bits: int, *, packed: bool = False) -> int:
    """Width of the smallest ONNX integer that holds codes of a width."""
    return next(b for b in (BOXES if packed else BOXES[2:]) if bits <= b)


def oldest_opset(frozen: nn.Module, optimize_for: Box) -> int:
    """The oldest opset whose types hold the codes of a network: 18, 21 for 4- and 16-bit types, 25 for 2-bit ones."""
    packed = optimize_for == "size"
    boxes = {box_bits(bits, packed=packed and weight) for _, bits, weight in widths_of(frozen) if bits <= WIDEST_BOX}
    if min(BOXES) in boxes:
        return 25
    return 21 if boxes - {8} else 18


def widths_of(frozen: nn.Module) -> Iterator[tuple[str, int, bool]]:
    """Module path, bits and whether it is a weight, of all integer tensors of a frozen network."""
    for path, module in frozen.named_modules():
        if isinstance(module, FrozenQuantizer) and module.is_integer:
            yield path, module.bits, False
        if isinstance(module, FrozenLayer) and module.codes is not None:
            yield f"{path}.weight", module.bits, True


def headroom(weight: tuple[int, int], activation: tuple[int, int]) -> int:
    """Binary digits that narrow weight codes can be moved up by, which makes the grid of the bias so much finer.

    The codes stay int8, and two products with activation codes stay within 16 bits, so that no processor saturates.

    Arguments:
        weight: Smallest and largest code of the weight.
        activation: Smallest and largest code of the activation.

    Example:
        >>> headroom(code_range(2, True), code_range(8, False)), headroom(code_range(8, True), code_range(8, False))
        (6, 0)
    """
    top, other = max(-weight[0], weight[1]), activation[1] - min(activation[0], 0)
    digits = 0
    while 2 ** (digits + 1) * top <= 127 and 2 ** (digits + 2) * top * other <= SAFE_SUM:
        digits += 1
    return digits


def lower(model: ir.Model, optimize_for: Box = "speed", *, integers: bool = True) -> Lowered:
    """Replace the `Quant` nodes of a master graph, in place.

    Activations up to 16 bits become `QuantizeLinear`, `Clip` of the codes and `DequantizeLinear`, always on unsigned
    integers: with zero point 0, or in the middle if they are signed. Weights that meet such activations of at most 8
    bits become int8 codes behind `DequantizeLinear`, narrow ones moved up by :func:`headroom`; biases behind them
    become int32. All other weights are codes that are multiplied out when the file is loaded. Above 16 bits a quantizer
    is float arithmetic.

    Arguments:
        model: The graph.
        optimize_for: `size` packs weight codes of 2 and 4 bits; a runtime unpacks them when it loads the file.
        integers: Otherwise all weights are multiplied out and biases stay as they are.
    """
    result = Lowered(model)
    _rectify_before_pooling(model)
    quantized = list(quants(model))
    by_output = {quant.node.outputs[0]: quant for quant in quantized}
    layers = _integer_layers(quantized, by_output) if integers else {}
    for quant in quantized:
        if quant.weight is not None and quant.name in layers:
            _bias(result, quant, by_output, layers[quant.name])
    for quant in quantized:
        graph = _Replacement(model, quant)
        if quant.weight is None:
            y = _activation(graph, quant)
        elif quant.name in layers:
            y = _integer_weight(graph, quant, optimize_for, layers[quant.name])
        else:
            y = _float_weight(graph, quant, optimize_for)
        graph.finish(y)
    tidy(model)
    return result


def _rectify_before_pooling(model: ir.Model) -> None:
    """Exchange a ReLU with the pooling before it: the values are the same, and the runtime joins it with the layer."""
    for relu in [node for node in model.graph if node.op_type == "Relu"]:
        pool = relu.inputs[0].producer() if relu.inputs[0] is not None else None
        if pool is None or pool.op_type != "MaxPool" or len(pool.outputs[0].uses()) > 1 or len(pool.outputs) > 1:
            continue
        x, y = pool.inputs[0], relu.outputs[0]
        assert x is not None
        readers = list(y.uses())
        if y in model.graph.outputs:
            continue
        model.graph.remove(relu)
        relu.replace_input_with(0, x)
        y.shape, y.type = x.shape, x.type
        model.graph.insert_before(pool, relu)
        pool.replace_input_with(0, y)
        for node, index in readers:
            node.replace_input_with(index, pool.outputs[0])


def _integer_layers(quantized: list[Quant], by_output: Mapping[ir.Value, Quant]) -> dict[str, int]:
    """Headroom of the weights that meet integer activations, by name."""
    found = {}
    for quant in quantized:
        if quant.weight is None or quant.bits > WIDEST_FUSED or quant.axis == -1 or (quant.scale < 0).any():
            continue
        inputs = [_partner(node, index, by_output) for node, index in quant.node.outputs[0].uses()]
        if inputs and all(x is not None and x.bits <= WIDEST_FUSED for x in inputs):
            found[quant.name] = min(headroom(quant.range, _box_range(x)) for x in inputs if x is not None)
    return found


def _partner(node: ir.Node, index: int, by_output: Mapping[ir.Value, Quant]) -> Quant | None:
    """The quantized activation that a layer multiplies a weight with, if integer operators do."""
    if node.op_type not in FUSED_LAYERS or index != 1:
        return None
    if node.op_type == "Conv" and not _requantized(node.outputs[0], by_output):
        return None
    value = node.inputs[0]
    while value is not None and value not in by_output:
        maker = value.producer()
        if maker is None or maker.op_type not in TO_INPUT:
            return None
        value = maker.inputs[0]
    quant = by_output.get(value) if value is not None else None
    return quant if quant is not None and quant.weight is None else None


def _requantized(value: ir.Value, by_output: Mapping[ir.Value, Quant]) -> bool:
    """Whether all that reads a value quantizes it, perhaps after pooling and the like."""
    readers = [node for node, _ in value.uses()]
    return bool(readers) and all(
        node.outputs[0] in by_output or (node.op_type in TO_OUTPUT and _requantized(node.outputs[0], by_output))
        for node in readers
    )


def _box_range(quant: Quant) -> tuple[int, int]:
    """Smallest and largest code of an activation in its unsigned box."""
    low, high = quant.range
    return low + zero_point(quant), high + zero_point(quant)


def zero_point(quant: Quant) -> int:
    """Zero in the unsigned box of an activation: its middle if signed."""
    return 2 ** (box_bits(quant.bits) - 1) if quant.signed else 0


def _bias(result: Lowered, quant: Quant, by_output: Mapping[ir.Value, Quant], digits: int) -> None:
    """Biases of the layers that read a weight, as int32 on the grid of the sums."""
    for node, index in list(quant.node.outputs[0].uses()):
        x = _partner(node, index, by_output)
        assert x is not None
        if max(-quant.range[0], quant.range[1]) * 2**digits * _box_range(x)[1] * 2 > SAFE_SUM:
            result.may_saturate.append(quant.name.removesuffix(".weight"))
        place = BIASED_LAYERS.get(node.op_type)
        bias = constant(node.inputs[place]) if place is not None and len(node.inputs) > place else None
        if bias is None or place is None or bias.ndim != 1:
            continue
        value = node.inputs[place]
        assert value is not None
        scale = (np.float32(x.scale) * (quant.scale / np.float32(2**digits)).astype(np.float32)).astype(np.float32)
        scale = scale.reshape(-1) if scale.size > 1 else scale.reshape(())
        codes = np.rint(bias.astype(np.float64) / scale)
        if np.abs(codes).max(initial=0) > INT32_TOP:
            continue
        _replace_bias(result, node, place, value, codes, scale)


def _replace_bias(
    result: Lowered, node: ir.Node, place: int, value: ir.Value, codes: np.ndarray[Any, Any], scale: Any
) -> None:
    model, name = result.model, str(node.name).rsplit("/", 1)[0] + ".bias"
    result.biases[name] = (codes.astype(np.int32).astype(np.float32) * scale).astype(np.float32)
    axis = {} if np.ndim(scale) == 0 else {"axis": 0}
    kind, name = ir.DataType.INT32, _free(model, f"{name}.codes")
    inputs = [initializer(model, name, codes, kind), initializer(model, f"{name}.scale", scale)]
    inputs.append(initializer(model, f"{name}.zero_point", np.zeros(np.shape(scale)), kind))
    made = ir.node("DequantizeLinear", inputs, attributes=axis, name=f"{name}/DequantizeLinear")
    made.outputs[0].name, made.outputs[0].type = f"{name}.float", ir.TensorType(ir.DataType.FLOAT)
    made.outputs[0].shape = value.shape
    model.graph.insert_before(node, made)
    node.replace_input_with(place, made.outputs[0])


def _free(model: ir.Model, name: str) -> str:
    while name in model.graph.initializers:
        name += "_"
    return name


class _Replacement:
    """Nodes in the place of one `Quant` node."""

    def __init__(self, model: ir.Model, quant: Quant) -> None:
        self.model, self.quant = model, quant

    def constant(self, role: str, array: Any, dtype: ir.DataType | None = None) -> ir.Value:
        return initializer(self.model, f"{self.quant.name}.{role}", array, dtype)

    def add(self, op: str, inputs: list[ir.Value], dtype: ir.DataType, role: str, **attributes: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=f"{self.quant.name}/{op}.{role}")
        y = node.outputs[0]
        y.name, y.type, y.shape = f"{self.quant.name}.{role}", ir.TensorType(dtype), self.quant.node.outputs[0].shape
        self.model.graph.insert_before(self.quant.node, node)
        return y

    def finish(self, y: ir.Value) -> None:
        """Let the result take the place, and the name, of the quantized tensor."""
        old = self.quant.node.outputs[0]
        name, old.name = old.name, f"{old.name}.replaced"
        old.replace_all_uses_with(y, replace_graph_outputs=True)
        self.model.graph.remove(self.quant.node, safe=True)
        if self.quant.weight is None:
            y.name = name


def _dtype(bits: int, signed: bool) -> ir.DataType:
    dtype: ir.DataType = getattr(ir.DataType, f"{'' if signed else 'U'}INT{bits}")
    return dtype


def _activation(graph: _Replacement, quant: Quant) -> ir.Value:
    x = quant.node.inputs[0]
    assert x is not None
    scale, number = graph.constant("scale", quant.scale.reshape(())), ir.DataType.FLOAT
    if quant.bits > WIDEST_BOX:
        y = graph.add("Div", [x, scale], number, "quotient")
        y = graph.add("Round", [y], number, "rounded")
        y = graph.add(
            "Clip", [y, graph.constant("low", quant.range[0]), graph.constant("high", quant.range[1])], number, "codes"
        )
        return graph.add("Mul", [y, scale], number, "value")
    if _pooled_float(x):  # the runtime would move the quantizer before the pooling, which is slow on bytes
        x = graph.add(
            "Max", [x, graph.constant("least", np.float32(quant.range[0]) * quant.scale.reshape(()))], number, "floor"
        )
    box, (low, high) = box_bits(quant.bits), _box_range(quant)
    kind = _dtype(box, signed=False)
    zero = graph.constant("zero_point", zero_point(quant), kind)
    clipped = (low, high) != code_range(box, signed=False)
    y = graph.add("QuantizeLinear", [x, scale, zero], kind, "unclipped" if clipped else "codes")
    if clipped:  # of the codes: a float Clip before them would keep the layer in front in float
        y = graph.add("Clip", [y, graph.constant("low", low, kind), graph.constant("high", high, kind)], kind, "codes")
    return graph.add("DequantizeLinear", [y, scale, zero], number, "value")


def _pooled_float(value: ir.Value) -> bool:
    """Whether a value was pooled after a float layer."""
    pooled = False
    while (node := value.producer()) is not None and node.op_type in TO_OUTPUT and node.inputs[0] is not None:
        pooled, value = pooled or node.op_type == "MaxPool", node.inputs[0]
    weight = None if node is None or len(node.inputs) <= 1 or node.inputs[1] is None else node.inputs[1].producer()
    return pooled and (weight is None or weight.op_type != "DequantizeLinear")


def _stored(graph: _Replacement, quant: Quant, optimize_for: Box) -> ir.Value:
    kind = _dtype(box_bits(quant.bits, packed=optimize_for == "size"), quant.signed)
    return graph.constant("codes", quant.codes, kind)


def _integer_weight(graph: _Replacement, quant: Quant, optimize_for: Box, digits: int) -> ir.Value:
    """Codes times 2^digits in a byte; packed ones are unpacked by operators that runtimes compute when they load."""
    byte, whole = _dtype(8, quant.signed), ir.DataType.INT32
    scale = quant.scale / np.float32(2**digits)
    if optimize_for == "size" and quant.bits <= 4:
        codes = _stored(graph, quant, optimize_for)
        if digits:
            codes = graph.add("Cast", [codes], whole, "unpacked", to=int(whole))
            codes = graph.add("Mul", [codes, graph.constant("headroom", 2**digits, whole)], whole, "moved")
        codes = graph.add("Cast", [codes], byte, "bytes", to=int(byte))
    else:
        codes = graph.constant("codes", quant.codes * 2**digits, byte)
    axis = {} if quant.axis is None else {"axis": quant.axis}
    scale = scale.reshape(() if quant.axis is None else (-1,))
    zero = graph.constant("zero_point", np.zeros(scale.shape), byte)  # without one Gemm is not fused
    return graph.add(
        "DequantizeLinear", [codes, graph.constant("scale", scale), zero], ir.DataType.FLOAT, "value", **axis
    )


def _float_weight(graph: _Replacement, quant: Quant, optimize_for: Box) -> ir.Value:
    """Codes times scale: multiplied out when the file is loaded, where integers would be dequantized at each call."""
    if quant.bits > WIDEST_BOX:
        return graph.constant("value", (quant.codes * quant.scale).astype(np.float32))
    number = ir.DataType.FLOAT
    codes = graph.add("Cast", [_stored(graph, quant, optimize_for)], number, "numbers", to=int(number))
    return graph.add("Mul", [codes, graph.constant("scale", quant.scale)], number, "value")
