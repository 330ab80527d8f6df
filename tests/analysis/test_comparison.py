"""Estimators beside the exact posterior: the good ones end near it, and the penalty does not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pyro_bbits import GatePrior, QuantizedNetwork, quantize
from pyro_bbits.analysis import ExactPosterior, compare_estimators
from pyro_bbits.inference import EmptyGuide, Recipe, fit
from pyro_bbits.models import GatedModel, PlainModel

Case = tuple[GatedModel, list[tuple[Tensor, Tensor]]]


@pytest.fixture
def case(make_network: Callable[..., QuantizedNetwork]) -> Case:
    """Three tensors of 2, 4 or 8 bits, and data worth a few nats."""
    network = make_network("chain", (2, 4, 8))
    prior = GatePrior(network, mu=1.0, cost="constant").pin_channels()
    prior.strength.fill_(1 / 40)
    x = torch.rand(40, 3)
    with torch.no_grad():
        y = (4 * network(x, gates=network.open_gates())).softmax(1).multinomial(1).flatten()
    return GatedModel(network, prior, 40), [(x, y)]


def run(case: Case, **options: Any) -> Any:
    options = {"steps": 150, "particles": 2, "lr": 0.1, "progress": False} | options
    return compare_estimators(*case, **options)


def test_relaxed_guides_come_near_and_the_penalty_does_not(case: Case) -> None:
    comparison = run(case, estimators=("hard concrete", "simplified penalty"))
    table: Any = comparison.table()
    assert list(table.index) == ["hard concrete", "simplified penalty", "best mean field"]
    assert list(table.columns) == ["max_error", "mean_error", "gap", "relative_time", "seed"]
    assert table.loc["hard concrete", "mean_error"] < 0.05 < 0.1 < table.loc["simplified penalty", "mean_error"]
    assert 0 <= table.loc["best mean field", "gap"] <= table["gap"].min()
    assert table.loc["hard concrete", "gap"] < 0.2
    assert table.loc["hard concrete", "relative_time"] == 1


def test_table_is_worked_out_from_the_probabilities(case: Case) -> None:
    comparison, (model, data) = run(case, estimators=["straight-through"], steps=5), case
    exact = ExactPosterior.from_model(model, data)
    found = comparison.probabilities["straight-through"]
    difference = (found.tensors.double().cumprod(1).flatten() - exact.inclusion[2:]).abs()
    row: Any = comparison.table().loc["straight-through"]
    assert row["max_error"] == pytest.approx(difference.max().item(), abs=1e-6)
    assert row["mean_error"] == pytest.approx(difference.mean().item(), abs=1e-6)
    assert row["gap"] == pytest.approx(exact.log_evidence - exact.elbo(found))
    inclusion = comparison.inclusion()
    assert list(inclusion.index) == [name for name in exact.gate_names if name.startswith(("z4", "z8"))]
    assert inclusion["exact"].tolist() == exact.inclusion[2:].tolist()


def test_model_and_its_gradients_stay_as_they_are(case: Case) -> None:
    model, _ = case
    before, modes = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    run(case, steps=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert [p.requires_grad for p in model.parameters()] == modes and not model.prior.simplified


def test_fits_are_reproducible(case: Case) -> None:
    first, again, other = (
        run(case, estimators=["score function"], steps=5, seed=seed).probabilities["score function"].tensors
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimators": ["concrete"]}, "estimators must be some of hard concrete, .*; got concrete"),
        ({"estimators": []}, "got none"),
        ({"steps": 0}, r"steps, particles and lr must be above 0; got 0, 2 and 0\.1"),
        ({"lr": float("nan")}, "above 0; got 150, 2 and nan"),
        ({"limit": 5}, "would need 27 configurations; the limit is 5"),
    ],
)
def test_wrong_settings_are_refused(case: Case, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(case, **options)


@pytest.fixture(scope="module")
def digits() -> Callable[[tuple[float, ...]], Case]:
    """A 64-16-10 perceptron trained on digits, and 100 digits it has not seen: 64 configurations."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    recipe = Recipe(weight_lr=0.01)
    fit(PlainModel(net, 1000), EmptyGuide(), [(x[:1000], y[:1000])], epochs=150, recipe=recipe, progress=False)

    def build(nats: tuple[float, ...]) -> Case:
        network = quantize(net, x[:1000], bits=(2, 4, 8, 16))
        prior = GatePrior(network, mu=1.0, cost="constant").pin_channels()
        prior.strength.copy_(torch.tensor(nats).expand_as(prior.strength) / 100)
        return GatedModel(network, prior, 100), [(x[1000:1100], y[1000:1100])]

    return build


@pytest.mark.slow
@pytest.mark.parametrize("nats", [(1.0, 1.0, 1.0), (4.0, 1.0, 0.5)])
def test_estimators_on_digits(digits: Callable[..., Case], nats: tuple[float, ...]) -> None:
    """Mean errors seen: hard concrete 0.01 (gap 0.1 nats), straight-through 0.02, score function 0.06, penalty 0.17."""
    table: Any = compare_estimators(*digits(nats), steps=400, particles=4, lr=0.05, progress=False).table()
    assert table.loc["hard concrete", "mean_error"] < 0.08 and table.loc["hard concrete", "gap"] < 0.4
    refined = table.loc["hard concrete, refined"]
    assert refined["gap"] < 0.04 < table.loc["hard concrete", "gap"]
    assert table.loc["straight-through", "mean_error"] < 0.05
    assert table.loc["score function", "mean_error"] < 0.12
    assert table.loc["simplified penalty", "mean_error"] > 0.12
    assert table.loc["best mean field", "mean_error"] < 0.01 and table.loc["best mean field", "gap"] < 0.05
