"""Find batch norms that may do the work of ReLU, max pooling and activation quantizer behind them.

Such a norm is read by one ReLU and by nothing else, and the ReLU by quantized layers alone: no sum, no user of the
values. Before or behind the ReLU there may be a max pooling in windows of 2 x 2, and behind both another shape. Nothing
is known of the code; the network is run once, in the mode that fusing is for, and every operation on the tensors is
watched.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_bbits.insertion.finished import Step, first_argument, step_of
from pyro_bbits.insertion.inputs import Inputs, untouched
from pyro_bbits.insertion.layers import GATED_NORMS, QUANTIZED_LAYERS
from pyro_bbits.kernels.norm import has_windows

__all__ = ["Fusion", "find_fusions"]

SAMPLES = 4
"""Samples to run the network on: a batch norm needs two, and who reads what does not depend on their number."""


@dataclass(frozen=True)
class Fusion:
    """What lies behind a batch norm.

    Attributes:
        readers: The layers that read the last tensor, by module path.
        pooled: Whether there is a max pooling besides the ReLU.
    """

    readers: frozenset[str]
    pooled: bool = False


class _Use:
    """What happens to the output of one batch norm.

    Attributes:
        steps: What it has gone through.
        readers: Layers that have read what came out.
        is_clean: Whether nothing else has touched any of it.
        tensors: Identities of what it has been on the way.
        unpooled: Those of what it was before a pooling.
        asked: Those of what has been asked for its shape, or anything else that is no operation.
    """

    def __init__(self) -> None:
        self.steps: set[Step] = set()
        self.readers: set[str] = set()
        self.is_clean = True
        self.tensors: set[int] = set()
        self.unpooled: set[int] = set()
        self.asked: set[int] = set()

    @property
    def can_be_fused(self) -> bool:
        """Whether the norm can do it all, and nobody notices."""
        return self.is_clean and bool(self.readers) and not self.asked & self.unpooled

    def takes(self, step: Step, x: Tensor) -> bool:
        """Whether the norm can do that as well."""
        if self.readers:
            return False
        if step == "reshape":
            return "relu" in self.steps
        return not {step, "reshape"} & self.steps and (step == "relu" or has_windows(x))


class _Watch(TorchFunctionMode):
    """Follows the outputs of batch norms: through functions, which can be skipped, and through all operations below."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[str, _Use] = {}
        self.ends: dict[int, tuple[Tensor, _Use]] = {}  # the tensors are kept, so that no identity is used twice
        self.passed: dict[int, tuple[Tensor, _Use]] = {}
        self.layers: list[tuple[str, Any]] = []
        self.passing: Any = None
        self.operations = _Operations(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = first_argument(args, kwargs)
        _, use = self.ends.get(id(x), self.passed.get(id(x), (None, None)))
        if use is None:
            return func(*args, **kwargs)
        step = step_of(func, args, kwargs)
        if id(x) not in self.ends or step is None or not use.takes(step, x):
            use.asked.add(id(x))
            return func(*args, **kwargs)
        if step == "pool":
            use.unpooled |= use.tensors
        use.steps.add(step)
        self.passing = x
        result = func(*args, **kwargs)
        self.passing = None
        self.passed[id(x)] = self.ends.pop(id(x))
        self._ends_with(result, use)
        return result

    def _ends_with(self, x: Tensor, use: _Use) -> None:
        self.ends[id(x)] = x, use
        use.tensors.add(id(x))

    def operate(self, x: Any) -> None:
        """An operation reads or changes a tensor."""
        if x is self.passing:
            return
        if id(x) in self.ends:
            name, given = self.layers[-1] if self.layers else ("", None)
            use = self.ends[id(x)][1]
            if given is x and "relu" in use.steps:
                use.readers.add(name)
            else:
                use.is_clean = False
        elif id(x) in self.passed:
            self.passed[id(x)][1].is_clean = False

    def enter(self, module: nn.Module, args: Any, kwargs: Any, name: str) -> None:
        self.layers.append((name, first_argument(args, kwargs)))

    def leave(self, module: nn.Module, args: Any, output: Any, name: str) -> None:
        self.layers.pop()

    def normalized(self, module: nn.Module, args: Any, output: Tensor, name: str) -> None:
        use = _Use()
        use.is_clean = name not in self.uses  # called twice: one tensor of many
        self.uses[name] = use
        self._ends_with(output, use)

    def drop_kept(self) -> None:
        """Give up tensors that are still held by someone, be it the caller, to read them in a way of his own."""
        held = [(weakref.ref(x), use) for x, use in (*self.ends.values(), *self.passed.values())]
        self.ends.clear()
        self.passed.clear()
        for x, use in held:
            use.is_clean = use.is_clean and x() is None


class _Operations(TorchDispatchMode):
    """Reports every tensor that an operation is done on, whatever language it is called from."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            self.watch.operate(x)
        return func(*args, **(kwargs or {}))


@contextmanager
def _training(net: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in net.modules()}
    try:
        net.train()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _attach(net: nn.Module, watch: _Watch) -> Iterator[Any]:
    for name, module in net.named_modules():
        if type(module) in QUANTIZED_LAYERS:
            yield module.register_forward_pre_hook(partial(watch.enter, name=name), with_kwargs=True)
            yield module.register_forward_hook(partial(watch.leave, name=name), prepend=True, always_call=True)
        elif type(module) in GATED_NORMS:
            yield module.register_forward_hook(partial(watch.normalized, name=name), prepend=True)


def find_fusions(net: nn.Module, inputs: Inputs) -> Mapping[str, Fusion]:
    """Find the batch norms whose output only ReLU and pooling read, and what comes out only multiplying layers.

    Buffers, modes and the random state are left as they were. A network that does not run in training mode on a few of
    the inputs has none.

    Arguments:
        net: The float network.
        inputs: Example inputs, batch in dimension 0.

    Returns:
        What is behind each such norm, by module path.
    """
    watch = _Watch()
    hooks = list(_attach(net, watch))
    try:
        with _training(net), untouched(net), watch, watch.operations:
            result = inputs.map(lambda x: x[:SAMPLES]).run(net)
    except Exception:  # what it does in training mode, or with few samples, is not our business here
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    watch.drop_kept()
    del result
    found = {name: use for name, use in watch.uses.items() if use.can_be_fused}
    return {name: Fusion(frozenset(use.readers), "pool" in use.steps) for name, use in found.items()}
