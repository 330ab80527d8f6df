"""The gated model is an ordinary Pyro program around the user's network."""

from collections.abc import Callable
from typing import Any, cast

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import Predictive
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_bbits import GatePrior, GateValues, quantize
from pyro_bbits.inference import HardConcreteGuide, elbo_module
from pyro_bbits.models import AbstractModel, GatedModel, NormalLikelihood, PlainModel

SITES = ["z2", "z4", "z8", "z16", "z32", "obs"]


def build(hidden: int = 4, *, mu: float = 0.02, num_data: int = 20, blocks: int = 1) -> GatedModel:
    layers = [layer for _ in range(blocks) for layer in (nn.Linear(hidden, hidden), nn.ReLU())]
    net = nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), *layers, nn.Linear(hidden, 2))
    quantized = quantize(net, torch.rand(8, 3))
    return GatedModel(quantized, GatePrior(quantized, mu=mu), num_data)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(5, 3)


@pytest.fixture
def y() -> Tensor:
    return torch.tensor([0, 1, 1, 0, 1])


def run(model: Callable[..., object], *args: object) -> Any:
    """The trace of one run; Pyro's types are vague."""
    return poutine.trace(model).get_trace(*args)


def sample_sites(trace: Any) -> list[str]:
    return [name for name, node in trace.nodes.items() if node["type"] == "sample" and not site_is_subsample(node)]


@pytest.mark.parametrize("blocks", [1, 5])
def test_the_program_has_six_sites_in_three_plates(blocks: int, x: Tensor, y: Tensor) -> None:
    trace = run(build(blocks=blocks), x, y)
    assert sample_sites(trace) == SITES
    of = {site: [frame.name for frame in trace.nodes[site]["cond_indep_stack"]] for site in SITES}
    assert of == {"z2": ["channels"], **{site: ["tensors"] for site in SITES[1:5]}, "obs": ["data"]}
    assert trace.nodes["obs"]["is_observed"]
    assert not any(trace.nodes[site]["is_observed"] for site in SITES[:5])


def test_the_joint_probability_is_prior_times_scaled_likelihood(x: Tensor, y: Tensor) -> None:
    model = build(num_data=20)
    trace = run(model, x, y)
    gates = GateValues(trace.nodes["z2"]["value"], torch.stack([trace.nodes[s]["value"] for s in SITES[1:5]], 1))
    prior = sum(trace.nodes[site]["fn"].log_prob(trace.nodes[site]["value"]).sum() for site in SITES[:5])
    likelihood = -F.cross_entropy(model.net(x, gates=gates), y, reduction="sum") * 20 / 5
    torch.testing.assert_close(trace.log_prob_sum(), prior + likelihood)


def test_pins_hold_in_the_model_and_in_prior_predictive_samples(x: Tensor) -> None:
    model = build(mu=0.01)
    model.prior.pin("2.*", bits=4).pin_channels("0")
    row = {name: i for i, name in enumerate(model.net.layout.tensors)}
    rows, channels = [row["2.weight"], row["2.input"]], model.net.layout.slices["0"]
    samples = Predictive(model, num_samples=30)(x)
    trace = run(model, x)
    samples |= {f"trace {site}": trace.nodes[site]["value"][None] for site in SITES[:5]}
    for prefix in ("", "trace "):
        assert (samples[f"{prefix}z2"][:, channels] == 1).all()
        # channels of layer 2 itself are free, and once they are all off, so are its residual gates
        alive = samples[f"{prefix}z2"][:, model.net.layout.slices["2"]].any(1)
        assert torch.equal(samples[f"{prefix}z4"][:, rows[0]] > 0, alive)
        assert (samples[f"{prefix}z4"][:, rows[1]] == 1).all()
        assert all((samples[f"{prefix}{site}"][:, rows] == 0).all() for site in ("z8", "z16", "z32"))
    assert samples["z2"].unique().tolist() == [0, 1]


def test_prior_predictive_samples_have_a_draw_per_row(x: Tensor) -> None:
    model = build()
    samples = Predictive(model, num_samples=7)(x)
    shapes = {name: tuple(value.shape) for name, value in samples.items()}
    assert shapes == {"z2": (7, 8), **dict.fromkeys(SITES[1:5], (7, 5)), "obs": (7, 5)}
    assert samples["obs"].min() >= 0
    assert samples["obs"].max() <= 1


def test_conditioning_on_all_gates_is_prediction_with_them(x: Tensor, y: Tensor) -> None:
    model = build()
    gates = GateValues(torch.tensor([1.0, 0, 1, 1, 1, 1, 0, 1]), torch.tensor([[1.0, 0, 0, 0]] * 5))
    data = {"z2": gates.channels, **{s: gates.tensors[:, i] for i, s in enumerate(SITES[1:5])}}
    trace = run(poutine.condition(model, data), x, y)
    expected = model.predict(x, gates).log_prob(y)
    torch.testing.assert_close(trace.nodes["obs"]["fn"].log_prob(y), expected)


def test_prediction_takes_gates_and_opens_all_by_default(x: Tensor) -> None:
    model = build()
    some = GateValues(torch.tensor([1.0, 0] * 4), torch.zeros(5, 4))
    torch.testing.assert_close(model.predict(x, some).logits, _normalized(model.net(x, gates=some)))
    everything = _normalized(model.net(x, gates=model.net.open_gates()))
    torch.testing.assert_close(model.predict(x).logits, everything)
    assert not torch.allclose(model.predict(x, some).logits, everything)


def _normalized(logits: Tensor) -> Tensor:
    return logits - logits.logsumexp(1, keepdim=True)


def test_a_plain_model_is_the_float_network(x: Tensor, y: Tensor) -> None:
    net = nn.Linear(3, 2)
    model = PlainModel(net, num_data=10)
    trace = run(model, x, y)
    assert sample_sites(trace) == ["obs"]
    torch.testing.assert_close(trace.log_prob_sum(), -F.cross_entropy(net(x), y, reduction="sum") * 10 / 5)
    torch.testing.assert_close(model.predict(x).logits, _normalized(net(x)))
    assert model(x).shape == (5,)


def test_targets_are_returned_or_sampled(x: Tensor, y: Tensor) -> None:
    model = build()
    assert model(x, y) is y
    assert set(model(x).tolist()) <= {0, 1}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return cast(Tensor, self.second(self.first(x).relu() + shift))


def test_networks_of_several_inputs_run_in_the_program(x: Tensor, y: Tensor) -> None:
    shift = torch.rand(5, 4)
    net = quantize(TwoInputs(), (x, shift))
    model = GatedModel(net, GatePrior(net, mu=0.0), num_data=5)
    as_tuple = run(model, (x, shift), y).log_prob_sum()
    as_dict = run(model, {"shift": shift, "x": x}, y).log_prob_sum()
    torch.testing.assert_close(as_tuple, model.predict((x, shift)).log_prob(y).sum())
    torch.testing.assert_close(as_dict, as_tuple)


def test_a_likelihood_of_ones_own_is_observed(x: Tensor) -> None:
    model = PlainModel(nn.Linear(3, 1), 5, likelihood=lambda rate: dist.Poisson(rate.squeeze(1).exp()))
    counts = torch.tensor([0.0, 3, 1, 0, 2])
    rate = model.net(x).squeeze(1).exp()
    expected = (counts * rate.log() - rate - torch.lgamma(counts + 1)).sum()
    torch.testing.assert_close(run(model, x, counts).log_prob_sum(), expected)


def test_state_dict_holds_network_prior_and_likelihood(x: Tensor) -> None:
    net = quantize(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.rand(8, 3))
    models = [GatedModel(net, GatePrior(net, mu=0.1), 20, NormalLikelihood(0.5))]
    other = quantize(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.rand(8, 3))
    models.append(GatedModel(other, GatePrior(other, mu=0.3), 20, NormalLikelihood()))
    models[0].prior.pin("0.weight", bits=4)
    assert not torch.allclose(models[0].predict(x).mean, models[1].predict(x).mean)
    models[1].load_state_dict(models[0].state_dict())
    torch.testing.assert_close(models[0].predict(x).mean, models[1].predict(x).mean)
    torch.testing.assert_close(models[0].predict(x).stddev, models[1].predict(x).stddev)
    assert torch.equal(models[0].prior.strength, models[1].prior.strength)


def test_the_rendered_graph_is_the_chain_whatever_the_depth(x: Tensor, y: Tensor) -> None:
    pytest.importorskip("graphviz")
    sources = [pyro.render_model(build(blocks=blocks), model_args=(x, y)).source for blocks in (1, 4)]
    assert sources[0] == sources[1]
    lines = {line.strip() for line in sources[0].splitlines()}
    edges = {"z2 -> z4", "z4 -> z8", "z8 -> z16", "z16 -> z32", *(f"{site} -> obs" for site in SITES[:5])}
    assert {line for line in lines if "->" in line} == edges
    for plate, members in {"channels": ["z2"], "tensors": SITES[1:5], "data": ["obs"]}.items():
        body = sources[0].split(f"cluster_{plate} {{")[1].split("}")[0]
        assert [word for word in SITES if f"\t{word} [label={word} " in body] == members


def test_the_prior_must_be_of_the_network() -> None:
    with pytest.raises(ValueError, match=r"made for another network.*GatePrior\(net, mu="):
        GatedModel(build(hidden=4).net, build(hidden=3).prior, 10)


@pytest.mark.parametrize("num_data", [0, -5])
def test_the_number_of_data_points_must_be_positive(num_data: int) -> None:
    with pytest.raises(ValueError, match=f"num_data must be at least 1.*got {num_data}"):
        build(num_data=num_data)
    with pytest.raises(ValueError, match=f"num_data must be at least 1.*got {num_data}"):
        PlainModel(nn.Linear(1, 1), num_data)


def test_unknown_likelihoods_are_refused() -> None:
    with pytest.raises(ValueError, match="likelihood must be 'categorical', 'normal' or a callable; got 'poisson'"):
        PlainModel(nn.Linear(1, 1), 1, likelihood="poisson")  # type: ignore[arg-type]


def test_the_contract_alone_predicts_nothing(x: Tensor) -> None:
    with pytest.raises(NotImplementedError):
        AbstractModel(nn.Linear(3, 2), 1, "categorical").predict(x)


def test_outputs_may_be_any_structure() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"name": "logits", "logits": self.head(x)}

    net, x, y = Named(), torch.randn(6, 3), torch.zeros(6, dtype=torch.int64)
    losses = []
    pairs: list[tuple[nn.Module, Any]] = [(net, lambda output: dist.Categorical(logits=output["logits"]))]
    for part, likelihood in (*pairs, (net.head, "categorical")):
        network = quantize(part, x)
        model = GatedModel(network, GatePrior(network, 0.1), 6, likelihood)
        torch.manual_seed(0)
        losses.append(elbo_module(model, HardConcreteGuide(model.prior))(x, y))
    assert torch.equal(*losses)
