"""Which parts of a network are quantized, by name pattern, and why the others stay in float."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pyro_bbits.insertion.layers import QUANTIZED_LAYERS, unsupported_option
from pyro_bbits.insertion.structure import FloatLayer
from pyro_bbits.insertion.wires import Trace, Wire

__all__ = ["Patterns", "Selection"]

Patterns = str | Sequence[str]


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a module path or a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


@dataclass(frozen=True)
class Selection:
    """Patterns of the module paths to quantize and of those to leave in float, which win."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    @classmethod
    def of(cls, include: Patterns, exclude: Patterns) -> "Selection":
        """One pattern or several each."""
        sides = []
        for name, patterns in (("include", include), ("exclude", exclude)):
            patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise TypeError(f"{name} takes patterns of module paths, e.g. ('head',); got {patterns!r}.")
            sides.append(patterns)
        return cls(*sides)

    def excluded(self, name: str) -> str | None:
        """Why a module path stays in float by the user's wish; None if it does not."""
        for pattern in self.exclude:
            if _matches(name, pattern):
                return f"excluded by {pattern!r}"
        if not any(_matches(name, pattern) for pattern in self.include):
            return f"not included by {', '.join(map(repr, self.include)) or 'any pattern'}"
        return None

    def apply(self, net: nn.Module, traced: Trace) -> list[FloatLayer]:
        """Mark what is to be quantized among the traced layers and products.

        Returns:
            What stays in float.

        Raises:
            ValueError: If a pattern matches nothing, or nothing is left to quantize.
        """
        modules = dict(net.named_modules())
        self._check_patterns([*traced.wires, *modules], list(traced.wires))
        left = []
        for name, wire in traced.wires.items():
            reason = self.excluded(name)
            option = _obstacle(wire)
            if reason or option:
                wire.is_quantized, wire.norm = False, None
                kind = "MatMul" if wire.is_product else type(wire.module).__name__
                left.append(FloatLayer(name, kind, wire.macs, str(reason or option), bool(reason)))
        left += [self._other(name, modules[name], macs) for name, macs in traced.uncounted.items()]
        known = {*traced.wires, *traced.uncounted}
        left += [layer for name, module in modules.items() if name not in known for layer in _silent(name, module)]
        traced.name_operands()
        if not any(wire.is_quantized and not wire.is_product for wire in traced.wires.values()):
            if any(layer.is_excluded for layer in left):
                raise ValueError(f"include {self.include} and exclude {self.exclude} leave nothing to quantize.")
            supported = ", ".join(kind.__name__ for kind in QUANTIZED_LAYERS)
            raise ValueError(f"the network has no layer to quantize; supported are {supported}, used in its forward.")
        return left

    def _check_patterns(self, names: Sequence[str], layers: Sequence[str]) -> None:
        for side, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if pattern != "*" and not any(_matches(name, pattern) for name in names):
                    raise ValueError(f"{side} pattern {pattern!r} matches nothing; layers are {', '.join(layers)}.")

    def _other(self, name: str, module: nn.Module, macs: int) -> FloatLayer:
        """Code that multiplies and is no supported layer or product."""
        kind, reason = type(module).__name__, self.excluded(name)
        if reason:
            return FloatLayer(name, kind, macs, reason, True)
        if type(module).__module__.startswith("torch.nn") or isinstance(module, tuple(QUANTIZED_LAYERS)):
            return FloatLayer(name, kind, macs, f"its class {kind} is not supported")
        return FloatLayer(name, kind, macs, "its code multiplies by functions such as F.linear; modules are quantized")


def _obstacle(wire: Wire) -> str | None:
    """What keeps a layer from being quantized, whatever the user wishes."""
    if wire.is_product:
        return None
    if wire.read_by is not None:
        return f"its weight is also read by {wire.read_by}, beside the layer"
    return unsupported_option(wire.module)


def _silent(name: str, module: nn.Module) -> list[FloatLayer]:
    """Layers in which no multiplication was seen."""
    kind = type(module).__name__
    if isinstance(module, NonDynamicallyQuantizableLinear):  # inside torch's attention
        return []
    if type(module) in QUANTIZED_LAYERS:
        return [FloatLayer(name, kind, 0, "it is not called on the example inputs")]
    if isinstance(module, (*QUANTIZED_LAYERS, nn.EmbeddingBag)):
        return [FloatLayer(name, kind, 0, f"its class {kind} is not supported")]
    return []
