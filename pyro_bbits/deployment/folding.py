"""Which batch norms can be folded into the layer before them, and the folding."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["fold_factors", "unfoldable"]


class _Tracer(fx.Tracer):
    """Records calls of layers and norms as they are; everything else of the user's code is followed."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        multiplies = isinstance(m, nn.modules.conv._ConvNd | nn.Linear | nn.Embedding | nn.modules.batchnorm._BatchNorm)
        return multiplies or super().is_leaf_module(m, module_qualified_name)


def unfoldable(net: nn.Module, norms: Mapping[str, str]) -> dict[str, str]:
    """Which batch norms cannot be folded into the layer before them.

    A norm can if it has running statistics, and if it alone reads the output of its layer. The network's code tells,
    followed symbolically; where that cannot be done, because its way depends on values, no norm is folded.

    Arguments:
        net: The float network.
        norms: Path of the batch norm behind a layer, by the path of the layer.

    Returns:
        The reason by the path of the layer, for those that cannot.
    """
    if not norms:
        return {}
    modules = dict(net.named_modules())
    reasons = {layer: _own_reason(modules[layer], modules[norm]) for layer, norm in norms.items()}
    try:
        with warnings.catch_warnings(action="ignore"):
            graph = _Tracer().trace(copy.deepcopy(net).eval())
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        unknown = f"the network cannot be followed symbolically, so what else reads its layer is unknown ({first})"
        return {layer: reason or unknown for layer, reason in reasons.items()}
    reasons = {layer: reason or _graph_reason(graph, layer, norms[layer]) for layer, reason in reasons.items()}
    return {layer: reason for layer, reason in reasons.items() if reason}


def _own_reason(layer: nn.Module, norm: Any) -> str | None:
    if norm.running_mean is None:
        return "it has no running statistics, so it depends on the batch"
    if isinstance(layer, nn.Embedding):
        return "an embedding has no bias to take its shift"
    return None


def _graph_reason(graph: fx.Graph, layer: str, norm: str) -> str | None:
    calls, norm_calls = (
        [n for n in graph.nodes if n.op == "call_module" and n.target == name] for name in (layer, norm)
    )
    if len(calls) != 1 or len(norm_calls) != 1:
        return f"its layer is called {len(calls)} times and it {len(norm_calls)} times"
    if set(calls[0].users) != {norm_calls[0]}:
        return "something else reads its layer as well"
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
