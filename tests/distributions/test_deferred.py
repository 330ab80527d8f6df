"""Deferred tensors are worked out when they are read, and gate distributions compute nothing before."""

from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_bbits.distributions import AbstractGate, Deferred, GateBernoulli, HardConcrete, StraightThroughConcrete
from pyro_bbits.distributions.deferred import read


class Counted:
    """A computation that counts its calls."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.calls = value, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return 2 * self.value


def test_a_deferred_tensor_is_computed_once() -> None:
    compute = Counted(torch.ones(3))
    deferred = Deferred([3], compute)
    assert deferred.shape == torch.Size([3]) and compute.calls == 0
    assert deferred.read() is deferred.read() is read(deferred)
    assert compute.calls == 1
    assert read(compute.value) is compute.value


def test_a_reading_without_gradients_does_not_cut_later_ones_off() -> None:
    leaf = torch.ones(3, requires_grad=True)
    compute = Counted(leaf)
    deferred = Deferred((3,), compute)
    with torch.no_grad():
        assert not deferred.read().requires_grad
    deferred.read().sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [2, 2, 2]
    with torch.no_grad():
        deferred.read()
    assert compute.calls == 2


def refuse() -> Tensor:
    raise AssertionError("nobody may ask for this")


@pytest.mark.parametrize(
    "gate",
    [
        lambda: HardConcrete(Deferred((3,), refuse), Deferred((), refuse), Deferred((3,), refuse)),
        lambda: StraightThroughConcrete(Deferred((3,), refuse), on=Deferred((3,), refuse)),
        lambda: GateBernoulli(Deferred((3,), refuse), Deferred((3,), refuse), validate_args=False),
    ],
)
def test_sites_that_are_replayed_compute_nothing(gate: Any) -> None:
    values = {"gate": torch.ones(4, 3)}

    def program() -> Tensor:
        with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 3, dim=-1):
            drawn: Tensor = pyro.sample("gate", gate())
        return drawn

    trace: Any = poutine.trace(poutine.condition(program, data=values)).get_trace()
    assert trace.nodes["gate"]["fn"].batch_shape == (4, 3)


@pytest.mark.parametrize("parent", [torch.tensor([0.0, 0.3, 1.0]), torch.tensor([False, True, True])])
def test_deferred_parameters_mean_what_tensors_mean(parent: Tensor) -> None:
    logits, cost, reach = torch.randn(3), torch.rand(3), torch.tensor(0.3)

    def both(make: Any, *tensors: Tensor) -> tuple[AbstractGate, AbstractGate]:
        deferred = (Deferred(t.shape, Counted(t / 2)) for t in (*tensors, parent.float()))
        return make(*tensors, parent), make(*deferred)

    for pair in (both(HardConcrete, logits, reach), both(GateBernoulli, cost)):
        results = []
        for gate in pair:
            wide: Any = gate.expand([2, 3])
            pyro.set_rng_seed(1)
            results.append((wide.sample(), wide.log_prob(torch.ones(2, 3)), wide.on))
        for a, b in zip(*results, strict=True):
            assert a.shape == (2, 3) and torch.equal(a, b)
