"""Find batch norms that may do the work of the ReLU and of the activation quantizer behind them.

Such a norm is read by one ReLU and by nothing else, and the ReLU by quantized layers alone: no sum, no pooling, no user
of the values. Nothing is known of the code; the network is run once, in the mode that fusing is for, and every
operation on the two tensors is watched.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_bbits.insertion.inputs import Inputs, untouched
from pyro_bbits.insertion.layers import GATED_NORMS, QUANTIZED_LAYERS

__all__ = ["SkipReLU", "find_fusions"]

RELUS = frozenset({F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})
"""Functions that can be told to return their input as it is."""

MULTIPLIERS = frozenset(
    {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.pad}
)
"""Functions that quantized layers call on their inputs."""

SAMPLES = 4
"""Samples to run the network on: a batch norm needs two, and who reads what does not depend on their number."""


class SkipReLU(TorchFunctionMode):
    """While active, a ReLU returns what a batch norm has finished as it is.

    Arguments:
        is_finished: Tells these tensors.
    """

    def __init__(self, is_finished: Callable[[Any], bool]) -> None:
        super().__init__()
        self.is_finished = is_finished

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RELUS:
            x = args[0] if args else kwargs["input"]
            return x if self.is_finished(x) else func(*args, **kwargs)
        result = func(*args, **kwargs)
        if func not in MULTIPLIERS:
            self._check(func, args, kwargs, result)
        return result

    def _check(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Raise if a function makes a tensor of one that only quantized layers were seen to read."""
        given = [x for arg in (*args, *kwargs.values()) for x in (arg if isinstance(arg, list | tuple) else (arg,))]
        finished = [x for x in given if self.is_finished(x)]
        made = result if isinstance(result, list | tuple) else (result,)
        if finished and any(isinstance(x, Tensor) and x is not finished[0] for x in made):
            raise RuntimeError(
                f"{func.__name__} reads an activation that only quantized layers read on the example inputs, so that "
                "the batch norm before it has quantized it already. The network took another path; switch this off, "
                "network.fused = False."
            )


class _Use:
    """What happens to the output of one batch norm.

    Attributes:
        relus: How many ReLUs have read it.
        readers: Layers that have read the ReLU's output.
        is_clean: Whether nothing else has touched either.
    """

    def __init__(self) -> None:
        self.relus = 0
        self.readers: set[str] = set()
        self.is_clean = True


class _Watch(TorchFunctionMode):
    """Follows the outputs of batch norms: through functions, which can be skipped, and through all operations below."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[str, _Use] = {}
        self.norms: dict[int, tuple[Tensor, _Use]] = {}  # the tensors are kept, so that no identity is used twice
        self.relus: dict[int, tuple[Tensor, _Use]] = {}
        self.layers: list[tuple[str, Any]] = []
        self.relu: Any = None
        self.operations = _Operations(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in RELUS:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        _, use = self.norms.get(id(x), (None, None))
        if use is None or use.relus:
            return func(*args, **kwargs)
        use.relus, self.relu = 1, x
        result = func(*args, **kwargs)
        self.relu = None
        self.relus[id(result)] = result, use
        return result

    def operate(self, x: Any) -> None:
        """An operation reads or changes a tensor."""
        if x is self.relu:
            return
        if id(x) in self.relus:
            name, given = self.layers[-1] if self.layers else ("", None)
            use = self.relus[id(x)][1]
            if given is x:
                use.readers.add(name)
            else:
                use.is_clean = False
        elif id(x) in self.norms:
            self.norms[id(x)][1].is_clean = False

    def enter(self, module: nn.Module, args: Any, kwargs: Any, name: str) -> None:
        self.layers.append((name, args[0] if args else kwargs.get("input")))

    def leave(self, module: nn.Module, args: Any, output: Any, name: str) -> None:
        self.layers.pop()

    def normalized(self, module: nn.Module, args: Any, output: Tensor, name: str) -> None:
        use = _Use()
        use.is_clean = name not in self.uses  # called twice: one tensor of many
        self.uses[name] = use
        self.norms[id(output)] = output, use

    def drop_kept(self) -> None:
        """Give up tensors that are still held by someone, be it the caller, to read them in a way of his own."""
        held = [(weakref.ref(x), use) for x, use in (*self.norms.values(), *self.relus.values())]
        self.norms.clear()
        self.relus.clear()
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


def find_fusions(net: nn.Module, inputs: Inputs) -> Mapping[str, frozenset[str]]:
    """Find the batch norms whose output only a ReLU reads, and its output only multiplying layers.

    Buffers, modes and the random state are left as they were. A network that does not run in training mode on a few of
    the inputs has none.

    Arguments:
        net: The float network.
        inputs: Example inputs, batch in dimension 0.

    Returns:
        For each such norm the layers that read the ReLU's output, all by module path.
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
    return {name: frozenset(use.readers) for name, use in watch.uses.items() if use.is_clean and use.readers}
