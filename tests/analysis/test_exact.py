"""The enumerated posterior is Pyro's own joint over all patterns of gates, and a sum done by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_bbits import GatePrior, GateProbabilities, GateValues, QuantizedNetwork, quantize
from pyro_bbits.analysis import ExactPosterior, GatePosterior, count_configurations
from pyro_bbits.inference import StraightThroughGuide
from pyro_bbits.inference.objective import gate_kl_nats
from pyro_bbits.models import GatedModel, NormalLikelihood

MakeNetwork = Callable[..., QuantizedNetwork]
Case = tuple[GatedModel, Tensor, Tensor]


@pytest.fixture
def case(make_network: MakeNetwork) -> Case:
    """3 - 2 - 2 perceptron with two channel gates and three tensors of two residual gates."""
    network = make_network("chain")
    x, y = torch.rand(12, 3), torch.arange(12) % 2
    return GatedModel(network, GatePrior(network, mu=0.03), num_data=12), x, y


def pyro_log_joint(model: GatedModel, gates: GateValues, x: Tensor, y: Tensor) -> float:
    """Log-probability that Pyro's trace of the model adds up with the gates conditioned on."""
    layout = model.prior.layout
    values = dict(zip(layout.residual_sites, gates.tensors.unbind(1), strict=True))
    if layout.num_channels:
        values[layout.channel_site] = gates.channels
    with torch.no_grad():
        trace: Any = poutine.trace(poutine.condition(model, data=values)).get_trace(x, y)
    return float(trace.log_prob_sum())


def possible(model: GatedModel, gates: GateValues) -> bool:
    """Whether no gate is open behind a closed one."""
    alive = model.prior.layout.any_channel(gates.channels)
    parents = torch.cat([alive[:, None].float(), gates.tensors[:, :-1]], 1)
    return bool((gates.tensors <= parents).all())


def brute_force(model: GatedModel, x: Tensor, y: Tensor) -> dict[tuple[float, ...], float]:
    """Log joint of every possible pattern among all 2^G."""
    channels, (tensors, rungs) = model.prior.layout.num_channels, model.prior.strength.shape
    found = {}
    for pattern in product((0.0, 1.0), repeat=channels + tensors * rungs):
        values = torch.tensor(pattern)
        gates = GateValues(values[:channels], values[channels:].reshape(tensors, rungs))
        if possible(model, gates):
            log_joint = pyro_log_joint(model, gates, x, y)
            if log_joint > -math.inf:
                found[pattern] = log_joint
    return found


def as_patterns(exact: ExactPosterior) -> dict[tuple[float, ...], float]:
    rows = torch.cat([g.flatten(1) for g in exact.configurations], 1).tolist()
    return dict(zip(map(tuple, rows), exact.log_joint.tolist(), strict=True))


def test_joint_is_that_of_the_pyro_model_over_every_pattern(case: Case) -> None:
    model, x, y = case
    exact, expected = ExactPosterior.from_model(model, [(x, y)]), brute_force(*case)
    found = as_patterns(exact)
    assert found.keys() == expected.keys() and len(found) == len(exact) == count_configurations(model.prior)
    for pattern, log_joint in expected.items():
        assert found[pattern] == pytest.approx(log_joint, abs=2e-4)  # Pyro adds up in float32
    values, weights = torch.tensor(list(expected)).double(), torch.tensor(list(expected.values())).double()
    assert exact.log_evidence == pytest.approx(weights.logsumexp(0).item(), abs=2e-4)
    torch.testing.assert_close(exact.inclusion, weights.softmax(0) @ values, atol=1e-4, rtol=0)


def test_pins_are_respected(case: Case) -> None:
    model, x, y = case
    model.prior.pin("0.weight", bits=4)
    model.prior.channel_strength[1] = 0.0  # always kept, so its weight always exists
    model.prior.strength[2, 1] = math.inf
    exact, expected = ExactPosterior.from_model(model, [(x, y)]), brute_force(*case)
    assert as_patterns(exact).keys() == expected.keys()
    assert len(exact) == count_configurations(model.prior) == 2 * 3 * 2
    named = dict(zip(exact.gate_names, exact.free.tolist(), strict=True))
    assert [name for name, free in named.items() if free] == ["z2[0[0]]", "z4[2.weight]", "z8[2.weight]", "z4[2.input]"]
    torch.testing.assert_close(exact.inclusion[1:4], torch.tensor([1.0, 1, 0]).double())  # z2[0[1]], z4, z8 of 0.weight


def test_everything_pinned_leaves_one_configuration(case: Case) -> None:
    model, x, y = case
    model.prior.pin_gates(model.net.open_gates())
    exact = ExactPosterior.from_model(model, [(x, y)])
    assert len(exact) == 1 and not exact.free.any()
    assert exact.log_evidence == pytest.approx(model.predict(x).log_prob(y).sum().item(), abs=1e-4)
    assert exact.gap(exact.best_mean_field()) == pytest.approx(0, abs=1e-9)


def test_posterior_of_one_gate_by_hand() -> None:
    """Weights 1 and -0.5 with range 1: at 2 bits 2/3 and -2/3, at 4 bits 14/15 and -8/15.

    The one target is 1 at x = (1, 0) with standard deviation 1/2, so the log-likelihoods differ by
    2 ((1/3)^2 - (1/15)^2) = 48/225; the cost log 2 makes the prior odds even.
    """
    layer = nn.Linear(2, 1, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[1.0, -0.5]]))
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0]])
    network = quantize(nn.Sequential(layer), torch.rand(4, 2), bits=(2, 4))
    prior = GatePrior(network, mu=math.log(2), cost="constant")
    exact = ExactPosterior.from_model(GatedModel(network, prior, 1, NormalLikelihood(0.5)), [(x, y)])
    assert len(exact) == 2 and exact.gate_names == ("z4[0.weight]",)
    assert exact.inclusion.item() == pytest.approx(1 / (1 + math.exp(-48 / 225)), abs=1e-6)
    peak = -math.log(0.5 * math.sqrt(2 * math.pi))
    evidence = math.log(0.5 * math.exp(peak - 2 / 9) + 0.5 * math.exp(peak - 2 / 225))
    assert exact.log_evidence == pytest.approx(evidence, abs=1e-6)
    assert exact.gap(exact.best_mean_field()) == pytest.approx(0, abs=1e-9)
    even = exact.gap(GateProbabilities(torch.ones(0), torch.full((1, 1), 0.5)))
    p = exact.inclusion.item()
    assert even == pytest.approx(0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p)), abs=1e-9)


def test_elbo_is_expected_likelihood_less_the_analytic_kl(case: Case) -> None:
    """The KL is the one that training adds up gate by gate; a network with channels that may all be pruned."""
    model, x, y = case
    guide = StraightThroughGuide(model.prior, init={2: 0.3, 4: -0.5, 8: 1.0})
    exact = ExactPosterior.from_model(model, [(x, y)])
    probabilities = guide.probabilities()
    q = exact.log_q(probabilities).exp()
    assert q.sum().item() == pytest.approx(1, abs=1e-6)
    expected = (q @ exact.log_likelihood).item() - gate_kl_nats(guide, model.prior, model.num_data)
    assert exact.elbo(probabilities) == pytest.approx(expected, abs=1e-4)
    inclusion = GatePosterior.from_guide(guide, model.net).inclusion()[[4, 8]].to_numpy().flatten()
    torch.testing.assert_close(
        exact.approximate_inclusion(probabilities)[2:], torch.tensor(inclusion), atol=1e-6, rtol=0
    )


def test_prior_is_normalized_and_found_by_mean_field(case: Case) -> None:
    """Without a signal from the data the posterior is the prior, which factorizes."""
    model, x, y = case
    exact = ExactPosterior.from_model(model, [(x, y)])
    prior = replace(exact, log_likelihood=torch.zeros_like(exact.log_likelihood))
    assert prior.log_evidence == pytest.approx(0, abs=1e-9)
    best = prior.best_mean_field(starts=3)
    assert prior.gap(best) == pytest.approx(0, abs=1e-9)
    cost = 12 * torch.cat([model.prior.channel_strength, model.prior.strength.flatten()]).double()
    torch.testing.assert_close(torch.cat([best.channels, best.tensors.flatten()]), torch.exp(-cost))
    torch.testing.assert_close(torch.cat([p.flatten() for p in prior.conditional()]), torch.exp(-cost))


def test_best_mean_field_beats_its_neighbours_and_the_marginals(case: Case) -> None:
    model, x, y = case
    exact = ExactPosterior.from_model(model, [(x, y)])
    best = exact.best_mean_field(starts=8)
    gap = exact.gap(best)
    assert 0 <= gap <= exact.gap(exact.conditional())
    for scale in (0.01, 0.3):
        for _ in range(20):
            near = (torch.sigmoid(torch.logit(p, 1e-12) + scale * torch.randn_like(p)) for p in best)
            assert exact.gap(GateProbabilities(*near)) >= gap - 1e-9
    again = exact.best_mean_field(starts=8)
    assert all(torch.equal(a, b) for a, b in zip(best, again, strict=True))


def test_top_configurations_come_with_widths_and_channels(case: Case) -> None:
    model, x, y = case
    exact = ExactPosterior.from_model(model, [(x, y)])
    top = exact.top(5)
    assert list(top.columns) == ["probability", "log_prior", "log_likelihood", *model.net.layout.tensors, "kept.0"]
    assert top["probability"].is_monotonic_decreasing and len(top) == 5
    assert top["probability"][0] == pytest.approx(exact.probabilities.max().item())
    row = exact.probabilities.argmax()
    gates = GateValues(*(g[row] for g in exact.configurations))
    assert tuple(top.iloc[0][list(model.net.layout.tensors)]) == model.net.layout.bits(gates)
    assert len(exact.top(10**6)) == len(exact)


def test_batches_add_up_and_the_model_stays_as_it_is(case: Case) -> None:
    model, x, y = case
    model.train()
    whole = ExactPosterior.from_model(model, [(x, y)])
    parts = ExactPosterior.from_model(model, list(zip(x.split(5), y.split(5), strict=True)))
    torch.testing.assert_close(parts.log_likelihood, whole.log_likelihood, atol=1e-5, rtol=0)
    assert model.training and not len(pyro.get_param_store())


@pytest.mark.parametrize("kind", ["chain", "unprunable", "depthwise"])
def test_count_is_the_number_of_distinct_configurations(make_network: MakeNetwork, kind: str) -> None:
    network = make_network(kind, (4, 8))
    prior = GatePrior(network, mu=0.1)
    gates = len(prior.channel_strength) + prior.strength.numel()
    model = GatedModel(network, prior, 1)
    distinct = 0
    for pattern in product((0.0, 1.0), repeat=gates):
        channels, tensors = torch.tensor(pattern).tensor_split([len(prior.channel_strength)])
        distinct += possible(model, GateValues(channels, tensors.reshape(prior.strength.shape)))
    assert count_configurations(prior) == distinct


def test_too_many_configurations_are_refused_with_their_number(make_network: MakeNetwork) -> None:
    network = make_network("deep", (2, 4, 8))
    model = GatedModel(network, GatePrior(network, mu=0.1).pin_channels(), 4)
    number = 3 ** len(network.layout.tensors)
    with pytest.raises(ValueError, match=rf"would need {number} configurations; the limit is 10000\. Pin gates"):
        ExactPosterior.from_model(model, [(torch.rand(4, 4), torch.zeros(4).long())])


def test_data_of_another_size_are_refused(case: Case) -> None:
    model, x, y = case
    with pytest.raises(ValueError, match=r"must be the 12 points .* got 7"):
        ExactPosterior.from_model(model, [(x[:7], y[:7])])


def test_probabilities_of_another_network_are_refused(case: Case) -> None:
    model, x, y = case
    exact = ExactPosterior.from_model(model, [(x, y)])
    with pytest.raises(ValueError, match=r"must have shapes \[\(2,\), \(3, 2\)\].* got \[\(2,\), \(3, 1\)\]"):
        exact.elbo(GateProbabilities(torch.ones(2), torch.ones(3, 1)))


def test_mean_field_needs_a_start(case: Case) -> None:
    model, x, y = case
    with pytest.raises(ValueError, match="starts and sweeps must be at least 1; got 0 and 500"):
        ExactPosterior.from_model(model, [(x, y)]).best_mean_field(starts=0)


def test_a_ladder_of_one_width_has_channel_gates_alone(make_network: MakeNetwork) -> None:
    network = make_network("chain", (8,))
    model = GatedModel(network, GatePrior(network, mu=0.1), 6)
    exact = ExactPosterior.from_model(model, [(torch.rand(6, 3), torch.arange(6) % 2)])
    assert len(exact) == 4 and exact.gate_names == ("z8[0[0]]", "z8[0[1]]")
    assert exact.gap(exact.best_mean_field()) >= 0
