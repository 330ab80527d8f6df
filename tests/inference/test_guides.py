"""Guides follow the chain and the pins of the prior, whatever their relaxation."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor, nn

from pyro_bbits import GatePrior, GateValues, quantize
from pyro_bbits.inference import AbstractGateGuide, BernoulliGuide, HardConcreteGuide, StraightThroughGuide, elbo_module
from pyro_bbits.models import GatedModel

MakeModel = Callable[..., GatedModel]
Draw = Callable[[nn.Module], GateValues]
Batch = tuple[Tensor, Tensor]

GUIDES = [HardConcreteGuide, StraightThroughGuide]

HARD_CONCRETE_SHIFT = 2 / 3 * math.log(11)  # temperature * log(-zeta / gamma)


@pytest.fixture(params=GUIDES)
def guide_class(request: pytest.FixtureRequest) -> type[AbstractGateGuide]:
    kind: type[AbstractGateGuide] = request.param
    return kind


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        (3, [3, 3, 3, 3, 3]),
        ({2: 1, 4: 2.5, 16: -6}, [1, 2.5, 6, -6, 6]),
        ({}, [6, 6, 6, 6, 6]),
    ],
)
def test_initial_logits_are_a_number_or_one_per_width(
    make_model: MakeModel, guide_class: type[AbstractGateGuide], init: Any, expected: list[float]
) -> None:
    guide = guide_class(make_model().prior, init=init)
    assert guide.channel_logits.tolist() == [expected[0]] * 4
    assert guide.tensor_logits.tolist() == [expected[1:]] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"init": {4: 1.0, 5: 2.0, 3: 1.0}},
            r"init names widths \[3, 5\] that the ladder \(2, 4, 8, 16, 32\) does not",
        ),
        ({"init": math.inf}, "initial logits must be finite .*got inf"),
        ({"init": {2: math.nan}}, "initial logits must be finite .*nan"),
        ({"temperature": 0.0}, "temperature must be above 0; got 0.0"),
        ({"temperature": -1.0}, "temperature must be above 0; got -1.0"),
    ],
)
def test_impossible_settings_are_refused(
    make_model: MakeModel, guide_class: type[AbstractGateGuide], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        guide_class(make_model().prior, **options)


def test_probabilities_are_those_of_an_open_gate_given_its_parent(make_model: MakeModel) -> None:
    prior = make_model().prior
    hard, soft = HardConcreteGuide(prior, init=0.5), StraightThroughGuide(prior, init=0.5)
    expected = torch.tensor([0.5 + HARD_CONCRETE_SHIFT, 0.5]).sigmoid()
    for guide, probability in zip((hard, soft), expected, strict=True):
        probabilities = guide.probabilities()
        torch.testing.assert_close(probabilities.channels, probability.expand(4))
        torch.testing.assert_close(probabilities.tensors, probability.expand(3, 4))
        assert not probabilities.tensors.requires_grad
    colder = HardConcreteGuide(prior, init=0.5, temperature=0.2).probabilities()
    torch.testing.assert_close(colder.channels, torch.tensor(0.5 + 0.2 * math.log(11)).sigmoid().expand(4))


def test_expected_gates_are_the_same_but_differentiable(
    make_model: MakeModel, guide_class: type[AbstractGateGuide]
) -> None:
    guide = guide_class(make_model().prior, init=-0.3)
    expected, probabilities = guide.expected_gates(), guide.probabilities()
    assert torch.equal(expected.tensors, probabilities.tensors)
    (expected.tensors.sum() + expected.channels.sum()).backward()
    for logits, p in ((guide.tensor_logits, expected.tensors), (guide.channel_logits, expected.channels)):
        torch.testing.assert_close(logits.grad, (p * (1 - p)).detach())


def test_guide_and_model_sample_the_same_sites_in_the_same_plates(
    make_model: MakeModel, guide_class: type[AbstractGateGuide], data: Batch
) -> None:
    model = make_model()

    def latent(program: nn.Module) -> dict[str, list[str]]:
        trace: Any = poutine.trace(program).get_trace(*data)
        sites = [name for name in trace.stochastic_nodes if name.startswith("z")]
        return {site: [frame.name for frame in trace.nodes[site]["cond_indep_stack"]] for site in sites}

    assert latent(guide_class(model.prior)) == latent(model)
    assert list(latent(model)) == ["z2", "z4", "z8", "z16", "z32"]


def test_samples_are_open_as_often_as_the_chain_says(
    make_model: MakeModel, guide_class: type[AbstractGateGuide], draw: Draw
) -> None:
    """3000 draws: 5 standard deviations of a share near 1/2 are 0.046."""
    guide = guide_class(make_model(bits=(2, 4, 8)).prior)
    with torch.no_grad():
        guide.channel_logits.normal_(-3, 0.2)
        guide.tensor_logits.normal_(0, 1)
        draws = [draw(guide) for _ in range(3000)]
    channels = torch.stack([d.channels for d in draws])
    tensors = torch.stack([d.tensors for d in draws])
    q = guide.probabilities()
    reach = torch.stack([1 - (1 - q.channels).prod(), torch.tensor(1.0), torch.tensor(1.0)])
    assert ((channels > 0).float().mean(0) - q.channels).abs().max() < 0.046
    expected = reach[:, None] * q.tensors.cumprod(1)
    assert ((tensors > 0).float().mean(0) - expected).abs().max() < 0.046
    assert 0.1 < reach[0] < 0.9  # else the test says nothing about pruned weights
    assert (tensors[(channels > 0).logical_not().all(1), 0] == 0).all()
    assert (tensors[..., 1][tensors[..., 0] == 0] == 0).all()


def test_straight_through_gates_are_binary_and_hard_concrete_ones_are_relaxed(
    make_model: MakeModel, draw: Draw
) -> None:
    prior = make_model(hidden=300).prior
    binary = draw(StraightThroughGuide(prior, init=0.0)).channels.detach()
    relaxed = draw(HardConcreteGuide(prior, init=0.0)).channels.detach()
    assert (binary - binary.round()).abs().max() < 1e-6
    assert relaxed.min() == 0
    assert relaxed.max() == 1
    # a third of hard concrete mass is at the ends (paper: 0.664 between); 5 standard deviations are 0.14
    assert ((relaxed > 0) & (relaxed < 1)).float().mean().item() == pytest.approx(0.664, abs=0.14)


def set_probabilities(guide: AbstractGateGuide, channels: list[float], tensors: list[list[float]]) -> None:
    shift = HARD_CONCRETE_SHIFT if isinstance(guide, HardConcreteGuide) else 0.0
    with torch.no_grad():
        guide.channel_logits.copy_(torch.tensor(channels).logit() - shift)
        guide.tensor_logits.copy_(torch.tensor(tensors).logit() - shift)


def test_hard_gates_are_the_mode_or_the_paper_s_threshold(
    make_model: MakeModel, guide_class: type[AbstractGateGuide]
) -> None:
    guide = guide_class(make_model(bits=(2, 4, 8)).prior)
    # widths 2, 4, 8 have probabilities (.4, .24, .36), (.2, .48, .32) and (.3, .21, .49)
    set_probabilities(guide, [0.4, 0.55, 0.65, 0.67], [[0.6, 0.6], [0.8, 0.4], [0.7, 0.7]])
    mode, threshold = guide.hard_gates(), guide.hard_gates("threshold")
    assert mode.channels.tolist() == [0, 1, 1, 1]
    assert mode.tensors.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert threshold.channels.tolist() == [0, 0, 0, 1]
    assert threshold.tensors.tolist() == [[0, 0], [1, 0], [1, 1]]
    set_probabilities(guide, [0.4] * 4, [[0.65, 0.99], [0.67, 0.67], [0.99, 0.1]])
    assert guide.hard_gates("threshold").tensors.tolist() == [[0, 0], [1, 1], [1, 0]]
    assert guide.hard_gates("map").tensors.tolist() == [[1, 1], [1, 1], [1, 0]]


def test_the_paper_s_threshold_is_a_logit_of_minus_0_935(make_model: MakeModel) -> None:
    guide = HardConcreteGuide(make_model().prior, init={2: -0.93, 4: -0.94})
    gates = guide.hard_gates("threshold")
    assert gates.channels.tolist() == [1, 1, 1, 1]
    assert gates.tensors[:, 0].tolist() == [0, 0, 0]


def test_unknown_rules_are_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="rule must be 'map' or 'threshold'; got 'mode'"):
        HardConcreteGuide(make_model().prior).hard_gates("mode")  # type: ignore[arg-type]


def test_pins_hold_in_every_sample_and_decision(
    make_model: MakeModel, guide_class: type[AbstractGateGuide], draw: Draw, data: Batch
) -> None:
    model = make_model()
    model.prior.pin("0.weight", bits=8).pin("2.input", bits=2)
    model.prior.channel_strength[:] = torch.tensor([0.0, math.inf, 0.1, 0.1])
    guide = guide_class(model.prior, init=0.0)
    samples = Predictive(model, guide=guide, num_samples=40)(data[0])
    draws = [draw(guide) for _ in range(5)] + [guide.hard_gates(), guide.hard_gates("threshold")]
    channels = torch.cat([samples["z2"], *(d.channels[None] for d in draws)]).detach()
    stacked = torch.stack([samples[f"z{b}"] for b in (4, 8, 16, 32)], -1)
    tensors = torch.cat([stacked, *(d.tensors[None] for d in draws)]).detach()
    assert (channels[:, :2] == torch.tensor([1.0, 0.0])).all()
    assert (tensors[:, 0] == torch.tensor([1.0, 1, 0, 0])).all()
    assert (tensors[:, 2] == 0).all()
    assert len(channels[:, 2].unique()) > 1  # the others stay random
    assert len(tensors[:, 1, 0].unique()) > 1
    assert guide.probabilities().channels[:2].tolist() == [1, 0]
    assert guide.probabilities().tensors[0].tolist() == [1, 1, 0, 0]


def test_pinned_gates_pass_no_gradient_and_free_ones_a_finite_one(
    make_model: MakeModel, guide_class: type[AbstractGateGuide], data: Batch
) -> None:
    model = make_model()
    model.prior.pin("0.weight", bits=8)
    model.prior.channel_strength[:2] = torch.tensor([0.0, math.inf])
    guide = guide_class(model.prior, init=0.5)
    elbo_module(model, guide)(*data).backward()
    assert guide.channel_logits.grad is not None
    assert guide.tensor_logits.grad is not None
    assert (guide.channel_logits.grad[:2] == 0).all()
    assert (guide.tensor_logits.grad[0] == 0).all()
    for gradient in (guide.channel_logits.grad[2:], guide.tensor_logits.grad[1:]):
        assert gradient.isfinite().all()
        assert (gradient != 0).all()


def test_state_dict_restores_logits_and_pins(make_model: MakeModel, guide_class: type[AbstractGateGuide]) -> None:
    saved, loaded = (guide_class(make_model(mu).prior, init=init) for mu, init in ((0.1, 1.0), (0.5, 6.0)))
    saved.prior.pin("2.weight", bits=4)
    with torch.no_grad():
        saved.tensor_logits.normal_()
    loaded.load_state_dict(saved.state_dict())
    for a, b in zip(saved.probabilities(), loaded.probabilities(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(saved.prior.strength, loaded.prior.strength)
    assert loaded.probabilities().tensors[1].tolist() == [1, 0, 0, 0]


def test_networks_without_prunable_channels_have_no_channel_gates(guide_class: type[AbstractGateGuide]) -> None:
    network = quantize(nn.Linear(3, 2), torch.rand(8, 3))
    guide = guide_class(GatePrior(network, mu=0.1))
    trace: Any = poutine.trace(guide).get_trace()
    assert list(trace.stochastic_nodes) == ["tensors", "z4", "z8", "z16", "z32"]
    assert guide.hard_gates().channels.shape == (0,)
    assert guide.hard_gates().tensors.shape == (1, 4)


def test_a_ladder_of_one_width_leaves_only_channel_gates(
    make_model: MakeModel, guide_class: type[AbstractGateGuide], data: Batch
) -> None:
    model = make_model(bits=(8,))
    guide = guide_class(model.prior, init=0.5)
    elbo_module(model, guide)(*data).backward()
    assert guide.channel_logits.grad is not None
    assert (guide.channel_logits.grad != 0).all()
    assert guide.probabilities().tensors.shape == (3, 0)
    assert model.net.layout.bits(guide.hard_gates()) == (8, 8, 8)


def test_posterior_predictive_samples_come_from_the_guide(make_model: MakeModel, data: Batch) -> None:
    model = make_model(mu=50.0)  # a priori every gate is closed
    guide = StraightThroughGuide(model.prior, init=20.0)
    pyro.set_rng_seed(0)
    samples = Predictive(model, guide=guide, num_samples=5)(data[0])
    assert (samples["z2"] == 1).all()
    assert (samples["z32"] == 1).all()
    assert samples["obs"].shape == (5, 24)
    assert (Predictive(model, num_samples=5)(data[0])["z2"] == 0).all()


@pytest.mark.parametrize("guide_class", [*GUIDES, BernoulliGuide])
def test_log_odds_can_be_set_and_read_back(make_model: MakeModel, guide_class: type[AbstractGateGuide]) -> None:
    """Pinned gates keep theirs; infinite ones become finite logits, with a certain gate."""
    prior = make_model(bits=(2, 4, 8)).prior.pin("2.input", bits=4)
    guide, channels = guide_class(prior), torch.tensor([0.5, -3.0, math.inf, -math.inf])
    guide.set_log_odds(channels, torch.tensor([[1.0, -2.0], [3.0, 0.0], [7.0, 7.0]]))
    found = guide.log_odds()
    torch.testing.assert_close(found[0].clamp(-999, 999), channels.clamp(-999, 999))
    torch.testing.assert_close(found[1], torch.tensor([[1.0, -2.0], [3.0, 0.0], [math.inf, -math.inf]]))
    expected = torch.sigmoid(channels)
    torch.testing.assert_close(guide.probabilities().channels, expected)
    assert all(p.isfinite().all() and p.requires_grad for p in guide.parameters())
