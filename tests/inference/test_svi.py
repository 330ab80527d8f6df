"""Stock Pyro on our models: SVI, its parameter store, and two models in one process."""

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_bbits.inference import EmptyGuide, HardConcreteGuide, StraightThroughGuide, elbo_module, svi_pair
from pyro_bbits.inference.guides import AbstractGateGuide
from pyro_bbits.models import GatedModel, PlainModel

MakeModel = Callable[..., GatedModel]
Batch = tuple[Tensor, Tensor]
State = dict[str, Tensor]


def make_svi(model: GatedModel, guide: AbstractGateGuide, name: str) -> SVI:
    return SVI(*svi_pair(model, guide, name), PyroOptim(torch.optim.Adam, {"lr": 0.02}), loss=TraceMeanField_ELBO())


def state(model: GatedModel, guide: AbstractGateGuide) -> State:
    """Copies of all trainable parameters."""
    modules = {"model": model, "guide": guide}
    return {f"{k}.{n}": p.detach().clone() for k, m in modules.items() for n, p in m.named_parameters()}


@pytest.mark.parametrize("guide_class", [HardConcreteGuide, StraightThroughGuide])
def test_svi_s_loss_is_the_elbo_per_sample(
    make_model: MakeModel, batches: list[Batch], guide_class: type[AbstractGateGuide]
) -> None:
    model = make_model()
    guide = guide_class(model.prior, init=0.0)
    svi = make_svi(model, guide, "one")
    for x, y in batches:
        pyro.set_rng_seed(2)
        loss = svi.evaluate_loss(x, y)
        pyro.set_rng_seed(2)
        assert loss == pytest.approx(elbo_module(model, guide)(x, y).item() / 24, rel=1e-5)


def test_svi_steps_are_those_of_the_elbo_module(make_model: MakeModel, data: Batch) -> None:
    models = [make_model(), make_model()]
    guides = [HardConcreteGuide(model.prior, init=0.5) for model in models]
    before = state(models[0], guides[0])
    svi, elbo = make_svi(models[0], guides[0], "one"), elbo_module(models[1], guides[1])
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.02)
    pyro.set_rng_seed(4)
    for _ in range(5):
        svi.step(*data)
    pyro.set_rng_seed(4)
    for _ in range(5):
        optimizer.zero_grad()
        (elbo(*data) / 24).backward()
        optimizer.step()
    by_svi, by_hand = state(models[0], guides[0]), state(models[1], guides[1])
    for name, value in by_svi.items():
        torch.testing.assert_close(value, by_hand[name], rtol=1e-4, atol=1e-5)
        assert not torch.equal(value, before[name]), name


def test_two_models_of_one_process_train_as_each_does_alone(make_model: MakeModel, data: Batch) -> None:
    def train(*names: str) -> list[State]:
        models = [make_model(0.05 if name == "a" else 0.5) for name in names]
        guides = [HardConcreteGuide(model.prior, init=0.5) for model in models]
        runs = [make_svi(model, guide, name) for name, model, guide in zip(names, models, guides, strict=True)]
        for step in range(5):
            for run in runs:
                pyro.set_rng_seed(step)
                run.step(*data)
        return [state(model, guide) for model, guide in zip(models, guides, strict=True)]

    together = train("a", "b")
    pyro.clear_param_store()
    alone = train("a")
    pyro.clear_param_store()
    alone += train("b")
    for one, other in zip(together, alone, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not torch.equal(together[0]["guide.tensor_logits"], together[1]["guide.tensor_logits"])


@pytest.mark.parametrize("steps", [0, 1])
def test_a_taken_name_is_refused_from_the_moment_it_is_given(make_model: MakeModel, data: Batch, steps: int) -> None:
    model = make_model()
    svi = make_svi(model, HardConcreteGuide(model.prior), "mine")
    for _ in range(steps):
        svi.step(*data)
    other = make_model()
    with pytest.raises(ValueError, match="the name 'mine' is taken in Pyro's parameter store; choose another"):
        svi_pair(other, HardConcreteGuide(other.prior), "mine")
    svi_pair(other, HardConcreteGuide(other.prior), "mine.too")


def test_a_cleared_store_frees_the_name_and_loses_no_parameter(make_model: MakeModel, data: Batch) -> None:
    model = make_model()
    guide = HardConcreteGuide(model.prior)
    svi = make_svi(model, guide, "mine")
    pyro.clear_param_store()
    before = state(model, guide)
    svi.step(*data)
    assert all(not torch.equal(value, before[name]) for name, value in state(model, guide).items())


def test_plain_models_train_too(data: Batch) -> None:
    net = nn.Linear(3, 2)
    before = copy.deepcopy(net.state_dict())
    pair = svi_pair(PlainModel(net, 24), EmptyGuide(), "plain")
    svi: Any = SVI(*pair, PyroOptim(torch.optim.Adam, {"lr": 0.1}), loss=TraceMeanField_ELBO())
    losses = [svi.step(*data) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.05
    assert all(not torch.equal(value, before[name]) for name, value in net.state_dict().items())
