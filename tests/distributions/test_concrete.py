"""Relaxed posteriors: atoms, density, samples and gradients agree with one another and with the paper's table."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_bbits.distributions import AbstractRelaxedGate, HardConcrete, LogitBernoulli, StraightThroughConcrete
from pyro_bbits.gates import GateProbabilities, decide

GAMMA, ZETA, TAU = -0.1, 1.1, 2 / 3

posteriors = pytest.mark.parametrize("posterior", [HardConcrete, StraightThroughConcrete])
shapes = pytest.mark.parametrize("temperature", [1 / 3, TAU, 1.5])

# logit, P(z = 0), P(z = 1), mean of z, gate by the paper's threshold (whose boundary is the fourth row)
TABLE: list[tuple[float, float, float, float, int | None]] = [
    (6.0, 0.0005, 0.9879, 0.997, 1),
    (2.0, 0.0266, 0.5990, 0.857, 1),
    (0.0, 0.168, 0.168, 0.500, 1),
    (-0.9353, 0.340, 0.0735, 0.305, None),
    (-2.0, 0.599, 0.0266, 0.143, 0),
    (-6.0, 0.9879, 0.0005, 0.003, 0),
]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def integrate(f: Callable[[Tensor], Tensor], low: float, high: float) -> Tensor:
    """Gauss-Legendre with 64 nodes: exact to the last digits for the smooth functions here."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(64))
    return (f(low + (high - low) * (nodes + 1) / 2) * weights).sum() * (high - low) / 2


def mass(gate: AbstractRelaxedGate, low: float, high: float) -> float:
    return integrate(lambda z: gate.log_prob(z).exp(), low, high).item()


def atom(gate: AbstractRelaxedGate, value: float) -> float:
    return gate.log_prob(torch.tensor(value, dtype=torch.float64)).exp().item()


# --- hard concrete --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("logit", "zero", "one", "mean", "hard"), TABLE)
def test_hard_concrete_has_the_papers_probabilities(
    logit: float, zero: float, one: float, mean: float, hard: int | None
) -> None:
    """All printed digits, the mean by quadrature."""
    gate = HardConcrete(torch.tensor(logit, dtype=torch.float64))
    for value, printed in ((0.0, zero), (1.0, one)):
        digits = 3 if round(printed, 3) == printed and printed > 0.1 else 4
        assert atom(gate, value) == pytest.approx(printed, abs=0.6 * 10**-digits)
    exact_mean = atom(gate, 1.0) + integrate(lambda z: z * gate.log_prob(z).exp(), 0, 1).item()
    assert exact_mean == pytest.approx(mean, abs=0.0006)
    probabilities = GateProbabilities(gate.prob_on[None], torch.zeros(0, 4))
    assert hard is None or decide(probabilities, "threshold").channels.tolist() == [hard]


def test_hard_concrete_samples_have_the_papers_moments() -> None:
    """Frequencies of the atoms and the mean, 5 standard errors for 18 numbers: fails once in 90 000 seeds."""
    logit, zero, one, mean = (double(*column) for column in zip(*(row[:4] for row in TABLE), strict=True))
    n, digits = 200_000, 0.0006
    z = HardConcrete(logit).sample(torch.Size([n]))
    assert (z >= 0).all() and (z <= 1).all()
    for values, expected in (((z == 0).double(), zero), ((z == 1).double(), one), (z, mean)):
        assert ((values.mean(0) - expected).abs() <= digits + 5 * values.std(0) / math.sqrt(n)).all()


def test_hard_concrete_is_on_by_a_shifted_sigmoid() -> None:
    """P(z > 0) = sigmoid(phi - tau log(-gamma / zeta)), and by symmetry P(z = 1 | phi) = P(z = 0 | -phi)."""
    phi = torch.linspace(-8, 8, 33, dtype=torch.float64)
    gate = HardConcrete(phi)
    torch.testing.assert_close(gate.prob_on, torch.sigmoid(phi + 1.59860), rtol=0, atol=1e-6)
    torch.testing.assert_close(gate.prob_on, 1 - gate.log_prob(torch.zeros(33)).exp(), rtol=0, atol=1e-14)
    torch.testing.assert_close(gate.logit_on, torch.logit(gate.prob_on), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        gate.log_prob(torch.ones(33)), HardConcrete(-phi).log_prob(torch.zeros(33)), rtol=1e-12, atol=0
    )


@shapes
@pytest.mark.parametrize("logit", [-4.0, -0.5, 0.0, 2.0])
def test_hard_concrete_mass_below_a_value_is_its_distribution_function(logit: float, temperature: float) -> None:
    """z <= c is s <= (c - gamma) / (zeta - gamma), which is logistic noise below tau logit(.) - phi."""
    gate = HardConcrete(torch.tensor(logit, dtype=torch.float64), temperature=temperature)
    for c in (0.2, 0.5, 0.9, 1.0):
        s = (c - GAMMA) / (ZETA - GAMMA)
        below = 1 / (1 + math.exp(logit - temperature * math.log(s / (1 - s))))
        assert atom(gate, 0.0) + mass(gate, 0, c) == pytest.approx(below, abs=1e-10)
    assert atom(gate, 0.0) + mass(gate, 0, 1) + atom(gate, 1.0) == pytest.approx(1, abs=1e-10)


@shapes
@pytest.mark.parametrize("logit", [-1.5, 0.0, 1.5])
def test_hard_concrete_samples_follow_log_prob(logit: float, temperature: float) -> None:
    """Chi-square over both atoms and 20 bins between them; each fails for one seed in 50 000."""
    gate, n, bins = HardConcrete(torch.tensor(logit, dtype=torch.float64), temperature=temperature), 100_000, 20
    z = gate.sample(torch.Size([n]))
    inside = torch.histc(z[(z > 0) & (z < 1)], bins, 0, 1)
    counts = torch.cat([(z == 0).sum()[None], inside, (z == 1).sum()[None]])
    expected = n * double(
        atom(gate, 0.0), *(mass(gate, i / bins, (i + 1) / bins) for i in range(bins)), atom(gate, 1.0)
    )
    assert counts.sum() == n
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((bins + 1) / 2), statistic / 2) > 2e-5


@shapes
def test_hard_concrete_gradient_is_the_derivative_at_the_same_noise(temperature: float) -> None:
    """Central differences; a clipped gate has derivative 0."""
    phi, n, h = double(-2.0, 0.0, 1.0), 2000, 1e-6

    def draw(logits: Tensor) -> Tensor:
        pyro.set_rng_seed(5)
        return HardConcrete(logits, temperature=temperature).rsample(torch.Size([n]))

    leaf = phi.expand(n, 3).clone().requires_grad_()
    pyro.set_rng_seed(5)
    z = HardConcrete(leaf, temperature=temperature).rsample()
    (grad,) = torch.autograd.grad(z.sum(), leaf)
    difference = (draw(phi + h) - draw(phi - h)) / (2 * h)
    smooth = ((z > 1e-4) & (z < 1 - 1e-4)) | (draw(phi + h) == draw(phi - h))  # off the two kinks
    assert smooth.double().mean() > 0.99
    torch.testing.assert_close(grad[smooth], difference[smooth], rtol=1e-6, atol=1e-8)
    assert ((z == 0) | (z == 1)).any() and (grad[(z == 0) | (z == 1)] == 0).all()


# --- straight through -----------------------------------------------------------------------------------------------


@shapes
def test_straight_through_gates_are_bernoulli(temperature: float) -> None:
    """Whatever the temperature. Values are 0 or 1 to the bit; 5 standard errors for 5 logits: one seed in 300 000."""
    logits, n = double(-6.0, -2.0, 0.0, 0.7, 3.0), 200_000
    gate = StraightThroughConcrete(logits.clone().requires_grad_(), temperature=temperature)
    z = gate.rsample(torch.Size([n]))
    assert z.requires_grad and set(z.unique().tolist()) == {0, 1}
    p = torch.sigmoid(logits)
    assert ((z.mean(0) - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()
    torch.testing.assert_close(gate.prob_on, p)


def test_straight_through_log_prob_is_bernoullis() -> None:
    logits = double(-3.0, 0.0, 2.0)
    gate, reference = StraightThroughConcrete(logits), torch.distributions.Bernoulli(logits=logits)
    for value in (torch.zeros(3), torch.ones(3)):
        torch.testing.assert_close(gate.log_prob(value), reference.log_prob(value.double()), rtol=1e-14, atol=0)


@shapes
def test_straight_through_gradient_is_the_relaxations(temperature: float) -> None:
    """The same noise through the hard concrete shows s; the gate is 1[s > 1/2] with derivative s (1 - s) / tau."""
    n = 5000
    logits = torch.linspace(-2, 2, n, dtype=torch.float64).requires_grad_()
    pyro.set_rng_seed(3)
    stretched = HardConcrete(logits, temperature=temperature).rsample().detach()
    pyro.set_rng_seed(3)
    z = StraightThroughConcrete(logits, temperature=temperature).rsample()
    (grad,) = torch.autograd.grad(z.sum(), logits)
    s, inside = (stretched - GAMMA) / (ZETA - GAMMA), (stretched > 0) & (stretched < 1)
    assert inside.sum() > 1000
    assert torch.equal(z, (s > 0.5).double())
    torch.testing.assert_close(grad[inside], (s * (1 - s) / temperature)[inside], rtol=1e-9, atol=0)
    assert (grad > 0).all()  # unlike the hard concrete, no gate is without a gradient


# --- what both share ------------------------------------------------------------------------------------------------


@posteriors
def test_gate_of_an_off_parent_is_zero_at_no_charge(posterior: type[AbstractRelaxedGate]) -> None:
    logits = torch.full((3, 500), 4.0, requires_grad=True)
    gate = posterior(logits, on=torch.tensor([[0.0], [0.3], [1.0]]))
    z = gate.rsample()
    (grad,) = torch.autograd.grad(z.sum(), logits)
    assert (z[0] == 0).all() and (grad[0] == 0).all()
    assert (z[1:] > 0).any() and (grad[1:] != 0).any()
    for value in (0.0, 0.5, 1.0):
        assert (gate.log_prob(torch.tensor(value))[0] == 0).all()
        assert (gate.log_prob(torch.tensor(value))[1:] != 0).all()


@posteriors
def test_parent_value_does_not_scale_the_gate(posterior: type[AbstractRelaxedGate]) -> None:
    """A parent at 0.3 is on: products of gates are the quantizer's business."""
    logits = torch.randn(1000)
    pyro.set_rng_seed(1)
    root = posterior(logits).rsample()
    pyro.set_rng_seed(1)
    child = posterior(logits, on=torch.tensor(0.3)).rsample()
    assert torch.equal(root, child)


@posteriors
def test_infinite_logits_pin_the_gate(posterior: type[AbstractRelaxedGate]) -> None:
    logits = torch.tensor([math.inf, -math.inf], requires_grad=True)
    gate = posterior(logits)
    z = gate.rsample(torch.Size([1000]))
    assert (z == torch.tensor([1.0, 0.0])).all()
    assert gate.prob_on.tolist() == [1, 0]
    assert gate.log_prob(torch.tensor([1.0, 0.0])).tolist() == [0, 0]
    assert gate.log_prob(torch.tensor([0.0, 1.0])).tolist() == [-math.inf, -math.inf]
    (grad,) = torch.autograd.grad(z.sum(), logits)
    assert grad.tolist() == [0, 0]


@posteriors
def test_noise_at_its_end_unpins_no_gate(posterior: type[AbstractRelaxedGate], monkeypatch: pytest.MonkeyPatch) -> None:
    """A uniform draw is exactly 0 once in 16 million: minus infinity must not meet the infinite logit of a pin."""
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape, **options))
    logits = torch.tensor([math.inf, -math.inf, 3.0], requires_grad=True)
    z = posterior(logits).rsample()
    (grad,) = torch.autograd.grad(z.sum(), logits)
    assert z.tolist() == [1, 0, 0] and grad.isfinite().all()


@posteriors
@pytest.mark.parametrize("on", [None, torch.tensor(1.0), torch.tensor(0.0)])
def test_plate_keeps_type_and_options(posterior: type[AbstractRelaxedGate], on: Tensor | None) -> None:
    def program() -> None:
        with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("gate", posterior(torch.tensor(0.7), 0.25, on, temperature=0.4))

    site: Any = poutine.trace(program).get_trace().nodes["gate"]
    gate = site["fn"]
    assert type(gate) is posterior and gate.temperature == 0.4
    assert gate.batch_shape == gate.logits.shape == gate.reach.shape == site["value"].shape == (4, 3)
    assert (gate.logits == 0.7).all() and (gate.reach == 0.25).all()
    parent: Any = gate.on
    assert parent is None if on is None else torch.equal(parent, (on > 0).expand(4, 3))
    assert gate.sample(torch.Size([7])).shape == (7, 4, 3)


@posteriors
def test_expanded_gates_have_noise_of_their_own(posterior: type[AbstractRelaxedGate]) -> None:
    assert len(posterior(torch.tensor(0.7)).expand([100]).sample().unique()) > 1


@posteriors
def test_parameters_broadcast(posterior: type[AbstractRelaxedGate]) -> None:
    gate = posterior(torch.zeros(3), torch.rand(2, 1), torch.ones(4, 1, 1))
    assert gate.batch_shape == gate.reach.shape == (4, 2, 3) and gate.event_shape == ()


@posteriors
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_have_the_type_of_the_logits(posterior: type[AbstractRelaxedGate], dtype: torch.dtype) -> None:
    gate = posterior(torch.zeros(3, dtype=dtype, requires_grad=True), on=torch.ones(3, dtype=dtype))
    assert gate.rsample().dtype == gate.log_prob(torch.zeros(3, dtype=dtype)).dtype == dtype
    assert gate.has_rsample and gate.rsample().requires_grad and not gate.sample().requires_grad


@posteriors
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(posterior: type[AbstractRelaxedGate], temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0; got"):
        posterior(torch.zeros(3), temperature=temperature)


def test_plain_bernoulli_is_exact_and_passes_no_gradient() -> None:
    """Frequencies within 4.5 standard errors of 20 000 draws; behind a closed parent the gate is closed for certain."""
    logits = torch.tensor([-2.0, 0.0, 1.5], requires_grad=True)
    gate = LogitBernoulli(logits)
    draws = gate.sample(torch.Size([20_000]))
    p = torch.sigmoid(logits).detach()
    assert not gate.has_rsample and not draws.requires_grad and set(draws.unique().tolist()) == {0.0, 1.0}
    assert ((draws.mean(0) - p).abs() < 4.5 * (p * (1 - p) / 20_000).sqrt()).all()
    total = gate.log_prob(torch.zeros(3)).exp() + gate.log_prob(torch.ones(3)).exp()
    torch.testing.assert_close(total, torch.ones(3))
    torch.testing.assert_close(gate.prob_on, torch.sigmoid(logits))
    closed = LogitBernoulli(logits, on=torch.tensor([0.0, 1.0, 0.0]))
    assert closed.sample(torch.Size([50]))[:, [0, 2]].sum() == 0
    assert closed.log_prob(torch.zeros(3))[[0, 2]].tolist() == [0, 0]
