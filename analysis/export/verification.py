"""Whether a file computes what the frozen network computes: found by running it on held-out rows."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_bbits.deployment import FrozenQuantizer

__all__ = [
    "Agreement",
    "HeldOut",
    "Rounding",
    "agreement",
    "codes_of",
    "compare_codes",
    "outputs_of",
    "rounding_of",
    "with_biases",
]

Array = np.ndarray[Any, Any]

EXACT_SHARE = 0.999
"""Rows on which a file must choose the class of the network, in exact mode."""

FUSED_SHARE = 0.99
"""The same with integer operators, against the network with the biases of the file."""

CODES_APART = 1e-4
"""Share of codes that may differ by more than one; twice as many as the network has itself between float32 and float64,
if that is more: sums in another order move a value over a rounding tie, and so the ones behind it."""

CLOSE = 1e-3
"""Difference, of the largest output, up to which outputs of a regression agree."""

TIE = 1e-5
"""Difference, of the largest output, up to which two classes are equally good."""

ROWS_OF_CODES = 128
BATCH = 64


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Rows that a file is verified with.

    Attributes:
        inputs: Network inputs, already normalized.
        targets: Class numbers, or real numbers; None if they are not known.
    """

    inputs: Tensor
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.inputs):
            raise ValueError("a file is verified with held-out rows; got none.")
        if self.targets is not None and len(self.targets) != len(self.inputs):
            raise ValueError(f"every row needs its target; got {len(self.inputs)} rows, {len(self.targets)} targets.")

    def score(self, outputs: Array) -> dict[str, float]:
        """`accuracy` in percent, or `rmse` in the targets' units; empty without targets."""
        if self.targets is None:
            return {}
        targets = self.targets.cpu().numpy()
        if np.issubdtype(targets.dtype, np.integer):
            return {"accuracy": 100 * float((outputs.argmax(-1) == targets).mean())}
        return {"rmse": float(np.sqrt(np.square(outputs[:, : targets.shape[1]] - targets).mean()))}

    @property
    def regression(self) -> bool:
        """Whether outputs are numbers rather than scores of classes."""
        return self.targets is not None and self.targets.is_floating_point()

    def first(self, rows: int) -> "HeldOut":
        """The first rows alone."""
        return HeldOut(self.inputs[:rows], None if self.targets is None else self.targets[:rows])


@dataclass(frozen=True)
class Rounding:
    """How far a network is from itself in float64: no file can be expected to be closer.

    Attributes:
        max_difference: Largest difference of an output.
        max_code_difference: Largest difference of an activation code.
        codes_apart: Share of activation codes that differ by more than one.
    """

    max_difference: float = 0.0
    max_code_difference: int = 0
    codes_apart: float = 0.0


@dataclass(frozen=True)
class Agreement:
    """How far two networks agree.

    Attributes:
        rows: Rows compared.
        top1: Share of rows with the same class (equally good ones are the same), or of a single output, close numbers.
        decided: The same, where classes are equally good that rounding could exchange (:class:`Rounding`).
        max_difference: Largest difference of an output.
        codes: Activation codes compared; 0 if none were.
        max_code_difference: Largest difference of an activation code.
        codes_apart: Share of codes that differ by more than one, of 16 bits and more by more than two.
    """

    rows: int
    top1: float
    decided: float
    max_difference: float
    codes: int = 0
    max_code_difference: int = 0
    codes_apart: float = 0.0

    def check(self, what: str, share: float, rounding: Rounding) -> None:
        """Raise unless the file may be kept.

        Raises:
            ValueError: If too many rows or codes differ.
        """
        allowed = max(CODES_APART, 2 * rounding.codes_apart)
        if self.decided < share or self.codes_apart > allowed:
            raise ValueError(
                f"{what} was not written: in the runtime it agrees with the frozen network on "
                f"{100 * self.decided:.2f} % of {self.rows} rows ({100 * share:.1f} % are needed), and "
                f"{100 * self.codes_apart:.4f} % of its activation codes are more than one apart "
                f"({100 * allowed:.4f} % are allowed). Please report this with the network."
            )

    def figures(self) -> dict[str, Any]:
        """For a JSON file; what was not compared is left out."""
        return {k: v for k, v in asdict(self).items() if self.codes or not k.startswith(("codes", "max_code"))}


def agreement(
    actual: Array,
    expected: Array,
    rounding: Rounding | None = None,
    codes: tuple[int, int, float] = (0, 0, 0.0),
    *,
    regression: bool = False,
) -> Agreement:
    """Compare outputs, and what :func:`compare_codes` found."""
    largest = float(np.abs(expected).max(initial=0.0))
    difference = np.abs(actual.astype(np.float64) - expected)
    if not regression and expected.ndim == 2 and expected.shape[1] > 1:
        lost, bound = expected.max(1) - np.take_along_axis(expected, actual.argmax(1)[:, None], 1)[:, 0], TIE
    else:
        lost, bound = difference.reshape(len(expected), -1).max(1), CLOSE
    bound *= largest
    noise = 0.0 if rounding is None else 2 * rounding.max_difference
    top1, decided = (float((lost <= limit).mean()) for limit in (bound, max(bound, noise)))
    return Agreement(len(expected), top1, decided, float(difference.max(initial=0.0)), *codes)


def rounding_of(net: nn.Module, rows: HeldOut) -> Rounding:
    """Compare a network with itself in float64, on the first rows."""
    inputs, double = rows.first(ROWS_OF_CODES).inputs, copy.deepcopy(net).double()
    outputs, codes = codes_of(net, inputs)
    exact, exact_codes = codes_of(double, inputs.double())
    return Rounding(agreement(outputs, exact).max_difference, *compare_codes(codes, exact_codes)[1:])


def outputs_of(net: nn.Module, inputs: Tensor) -> Array:
    """Outputs of a network for all rows."""
    with torch.no_grad():
        return np.concatenate([net(part).numpy() for part in inputs.cpu().split(BATCH)])


def codes_of(net: nn.Module, inputs: Tensor) -> tuple[Array, dict[str, Array]]:
    """Outputs of a frozen network for all rows at once, and its activation codes by the path of the quantizer.

    A quantizer that is called again has the number of the call in its name.
    """
    found: dict[str, Array] = {}
    handles = []

    def keep(path: str) -> Any:
        def hook(quantizer: FrozenQuantizer, args: Any, output: Tensor) -> None:
            name, number = path, 0
            while name in found:
                number += 1
                name = f"{path}_{number}"
            found[name] = (output / quantizer.scale).round().to(torch.int64).numpy()

        return hook

    for path, module in net.named_modules():
        if isinstance(module, FrozenQuantizer) and module.is_integer:
            handles.append(module.register_forward_hook(keep(path)))
    try:
        with torch.no_grad():
            return net(inputs.cpu()).numpy(), found
    finally:
        for handle in handles:
            handle.remove()


def compare_codes(actual: Mapping[str, Array], expected: Mapping[str, Array]) -> tuple[int, int, float]:
    """Number of codes in both, their largest difference, and the share that is further apart than rounding explains."""
    count = largest = apart = 0
    for name in actual.keys() & expected.keys():
        difference = np.abs(actual[name].astype(np.int64).reshape(expected[name].shape) - expected[name])
        wide = np.abs(expected[name]).max(initial=0) > 2**8
        count, apart = count + difference.size, apart + int((difference > (2 if wide else 1)).sum())
        largest = max(largest, int(difference.max(initial=0)))
    return count, largest, apart / max(1, count)


def with_biases(net: nn.Module, biases: Mapping[str, Array]) -> nn.Module:
    """A network that computes with the biases of a file, in place."""
    for name, bias in biases.items():
        path, _, attribute = name.rpartition(".")
        module = net.get_submodule(path)
        setattr(module, attribute, nn.Parameter(torch.tensor(bias), requires_grad=False))
    return net
