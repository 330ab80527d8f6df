"""A prior with a price of BOPs: its expectation is exact and differentiable, in every way through the program."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from pyro_bbits import GatePrior, GateValues, NetworkCost
from pyro_bbits.analysis import ExactPosterior, GatePosterior
from pyro_bbits.inference import (
    AbstractGateGuide,
    HardConcreteGuide,
    StraightThroughGuide,
    elbo_module,
    fit,
    refine_gates,
)
from pyro_bbits.inference.capture_audit import HostReads
from pyro_bbits.inference.gate_elbo import GateELBO
from pyro_bbits.inference.objective import gate_kl_nats
from pyro_bbits.models import GatedModel

MakeModel = Callable[..., GatedModel]
Batch = tuple[Tensor, Tensor]
GUIDES = [HardConcreteGuide, StraightThroughGuide]


def undecided(guide: AbstractGateGuide) -> AbstractGateGuide:
    with torch.no_grad():
        guide.channel_logits.normal_(-1)
        guide.tensor_logits.normal_(0)
    return guide


def loss_of(model: GatedModel, guide: AbstractGateGuide, data: Batch, kind: type[TraceMeanField_ELBO]) -> Tensor:
    pyro.set_rng_seed(3)
    with pyro.validation_enabled(kind is TraceMeanField_ELBO):
        loss: Tensor = kind().differentiable_loss(model, guide, *data)
    return loss


def enumerated_bops(model: GatedModel, guide: AbstractGateGuide) -> float:
    """Sum over all gate patterns of probability times relative BOPs, in float64."""
    layout, cost, q = model.prior.layout, NetworkCost(model.net), guide.probabilities()
    probabilities = torch.cat([q.channels, q.tensors.flatten()]).double()
    total = 0.0
    for pattern in product((0.0, 1.0), repeat=len(probabilities)):
        gates = torch.tensor(pattern)
        weight = torch.where(gates > 0, probabilities, 1 - probabilities).prod().item()
        tensors = gates[layout.num_channels :].view(len(layout.tensors), -1).cumprod(1)
        total += weight * cost(GateValues(gates[: layout.num_channels], tensors)).item()
    return total


@pytest.mark.parametrize("guide_class", GUIDES)
def test_the_price_is_the_enumerated_expectation(make_model: MakeModel, guide_class: type[AbstractGateGuide]) -> None:
    model = make_model(bops=0.3, bits=(2, 4, 8), hidden=3)
    guide = undecided(guide_class(model.prior))
    plain = GatePrior(model.net, model.prior.mu)
    guide_on_plain = guide_class(plain)
    guide_on_plain.load_state_dict(guide.state_dict(), strict=False)
    priced = gate_kl_nats(guide, model.prior, 24) - gate_kl_nats(guide_on_plain, plain, 24)
    assert priced == pytest.approx(24 * 0.3 * enumerated_bops(model, guide), rel=1e-5)


@pytest.mark.parametrize("guide_class", GUIDES)
@pytest.mark.parametrize("simplified", [False, True])
def test_both_elbos_have_one_loss_and_gradient(
    make_model: MakeModel, data: Batch, guide_class: type[AbstractGateGuide], simplified: bool
) -> None:
    model = make_model(bops=0.3, simplified=simplified)
    model.prior.pin("2.weight", bits=4)
    guide = undecided(guide_class(model.prior))
    gradients = []
    for kind in (GateELBO, TraceMeanField_ELBO):
        loss = loss_of(model, guide, data, kind)
        gradients.append(torch.autograd.grad(loss, (guide.channel_logits, guide.tensor_logits)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_gradients_are_finite_differences(make_model: MakeModel) -> None:
    model = make_model(bops=0.3, bits=(2, 4, 8)).double()
    guide = undecided(HardConcreteGuide(model.prior)).double()

    def price(channels: Tensor, tensors: Tensor) -> Tensor:
        logits = {"channel_logits": channels, "tensor_logits": tensors}
        gates: Tensor = torch.func.functional_call(_Price(guide), {f"guide.{k}": v for k, v in logits.items()}, ())
        return gates

    start = [p.detach().clone().requires_grad_() for p in (guide.channel_logits, guide.tensor_logits)]
    assert torch.autograd.gradcheck(price, start)


class _Price(torch.nn.Module):
    def __init__(self, guide: AbstractGateGuide) -> None:
        super().__init__()
        self.guide = guide

    def forward(self) -> Tensor:
        return self.guide.prior.bops_nats(self.guide.expected_gates())


def test_without_a_guide_the_program_weighs_the_gates_it_drew(make_model: MakeModel, data: Batch) -> None:
    model = make_model(bops=0.3)
    trace: Any = poutine.trace(model).get_trace(*data)
    gates = GateValues(
        trace.nodes["z2"]["value"], torch.stack([trace.nodes[f"z{b}"]["value"] for b in (4, 8, 16, 32)], 1)
    )
    trace.compute_log_prob()
    expected = -24 * 0.3 * NetworkCost(model.net)(gates).item()
    assert trace.nodes["bops"]["log_prob_sum"].item() == pytest.approx(expected, rel=1e-6)
    assert "bops" not in poutine.trace(make_model()).get_trace(*data).nodes


def test_a_priced_step_reads_nothing_on_the_host(make_model: MakeModel, data: Batch) -> None:
    model = make_model(bops=0.3)
    guide = HardConcreteGuide(model.prior)
    elbo = elbo_module(model, guide)
    with pyro.validation_enabled(False):
        elbo(*data).backward()  # sizes and caches
        with HostReads() as reads:
            elbo(*data).backward()
    assert not reads.found


def test_the_exact_posterior_knows_the_price(make_model: MakeModel, data: Batch) -> None:
    options = {"bits": (2, 4), "hidden": 2}
    priced, plain = (ExactPosterior.from_model(make_model(bops=b, **options), [data]) for b in (0.5, 0.0))
    cost = NetworkCost(make_model(**options).net)
    bops = torch.vmap(cost.relative_bops)(plain.configurations)
    torch.testing.assert_close(priced.log_prior, plain.log_prior - 24 * 0.5 * bops.double(), rtol=1e-6, atol=1e-5)


def test_a_high_price_makes_the_network_cheap(make_model: MakeModel, batches: list[Batch]) -> None:
    bops = []
    for price in (0.0, 3.0):
        model = make_model(mu=1e-6, simplified=True, bops=price, bits=(2, 4, 8))
        model.prior.pin_channels()
        guide = HardConcreteGuide(model.prior, init=1.0)
        fit(model, guide, batches, epochs=15, progress=False, seed=0)
        bops.append(GatePosterior.from_guide(guide, model.net).map_configuration().relative_bops)
    assert bops[1] < 0.5 * bops[0]


def test_refinement_weighs_the_price(make_model: MakeModel, data: Batch) -> None:
    for price, expected in ((0.0, {8}), (1e3, {2})):  # nothing but the price against opening is left
        model = make_model(mu=1e-9, bops=price, bits=(2, 4, 8))
        model.prior.pin_channels()
        guide = HardConcreteGuide(model.prior, init=0.0)
        refine_gates(model, guide, [data], progress=False)
        assert set(model.net.layout.bits(guide.hard_gates())) == expected


@pytest.mark.parametrize("bops", [-0.1, float("inf")])
def test_a_price_is_finite_and_not_negative(make_model: MakeModel, bops: float) -> None:
    with pytest.raises(ValueError, match="bops must be"):
        make_model(bops=bops)
