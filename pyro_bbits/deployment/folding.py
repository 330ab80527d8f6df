"""Which batch norms can be folded into the layer before them, and the folding."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyro_bbits.deployment.readers import Readers
from pyro_bbits.insertion.inputs import Inputs

__all__ = ["fold_factors", "unfoldable"]

READ = "something else reads its layer as well"


class _Tracer(fx.Tracer):
    """Records calls of layers and norms as they are; everything else of the user's code is followed."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        multiplies = isinstance(m, nn.modules.conv._ConvNd | nn.Linear | nn.Embedding | nn.modules.batchnorm._BatchNorm)
        return multiplies or super().is_leaf_module(m, module_qualified_name)


def unfoldable(net: nn.Module, norms: Mapping[str, str], inputs: Inputs | None = None) -> dict[str, str]:
    """Which batch norms cannot be folded into the layer before them.

    A norm can if it has running statistics, and if it alone reads the output of its layer. The network's code tells,
    followed symbolically. Where that cannot be done, because its way depends on values, it is watched on example
    inputs; without them no norm is folded then.

    Arguments:
        net: The float network.
        norms: Path of the batch norm behind a layer, by the path of the layer.
        inputs: Example inputs.

    Returns:
        The reason by the path of the layer, for those that cannot.
    """
    if not norms:
        return {}
    modules = dict(net.named_modules())
    own = {layer: _own_reason(modules[layer], modules[norm]) for layer, norm in norms.items()}
    read = _read_elsewhere(copy.deepcopy(net).eval(), norms, inputs)
    return {layer: reason for layer in norms if (reason := own[layer] or read[layer])}


def _own_reason(layer: nn.Module, norm: Any) -> str | None:
    if norm.running_mean is None:
        return "it has no running statistics, so it depends on the batch"
    if isinstance(layer, nn.Embedding):
        return "an embedding has no bias to take its shift"
    return None


def _read_elsewhere(net: nn.Module, norms: Mapping[str, str], inputs: Inputs | None) -> dict[str, str | None]:
    try:
        with warnings.catch_warnings(action="ignore"):
            graph = _Tracer().trace(net)
    except Exception as error:
        if inputs is not None:
            alone = Readers(net, norms).alone(inputs)
            return {layer: None if layer in alone else READ for layer in norms}
        first = (str(error).splitlines() or [type(error).__name__])[0]
        unknown = (
            f"the network's code cannot be followed symbolically ({first}); give example_inputs to find out what else "
            "reads its layer"
        )
        return dict.fromkeys(norms, unknown)
    return {layer: _graph_reason(graph, layer, norm) for layer, norm in norms.items()}


def _graph_reason(graph: fx.Graph, layer: str, norm: str) -> str | None:
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls, norm_calls = ([node for node in nodes if node.target == name] for name in (layer, norm))
    if len(calls) != 1 or len(norm_calls) != 1:
        return f"its layer is called {len(calls)} times and it {len(norm_calls)} times"
    if set(calls[0].users) != {norm_calls[0]}:
        return READ
    inside = tuple(f"{name}." for name in (layer, norm))
    if any(n.op == "get_attr" and str(n.target).startswith(inside) for n in graph.nodes):
        return "the network's code reads its numbers, or its layer's, beside calling them"
    return None


def fold_factors(norm: Any, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""Factor and shift of a layer's output channels that repeat its batch norm in evaluation.

    .. math::
        f = \gamma / \sqrt{v + \epsilon}, \qquad t = (b - m) f + \beta

    Arguments:
        norm: The batch norm, with running statistics.
        bias: Bias of the layer, if it has one.

    Returns:
        `f` and `t`, float64 and `(channels,)`.
    """
    mean = norm.running_mean.double()
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = ((0.0 if bias is None else bias.double()) - mean) * factor
    return factor, shift if norm.bias is None else shift + norm.bias.double()
