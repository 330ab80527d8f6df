"""Score-function gradients agree with the gradient of the enumerated ELBO."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyro.infer import SVI, TraceGraph_ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_bbits.analysis import ExactPosterior
from pyro_bbits.inference import BernoulliGuide, HardConcreteGuide, elbo_module, fit, svi_pair
from pyro_bbits.inference.score_function import ScoreFunctionELBO
from pyro_bbits.models import GatedModel

Batch = tuple[Tensor, Tensor]


@pytest.fixture
def model(make_model: Callable[..., GatedModel]) -> GatedModel:
    """Three tensors of 2 or 4 bits, two channels that can go."""
    return make_model(0.01, hidden=2, bits=(2, 4))


def exact_gradient(exact: ExactPosterior, guide: BernoulliGuide) -> Tensor:
    """Of the negative ELBO in the logits, all configurations summed."""
    logits = torch.cat([guide.channel_logits, guide.tensor_logits.flatten()]).detach().double().requires_grad_()
    opened = torch.cat([g.flatten(1) for g in exact.configurations], 1).double()
    alive = torch.ones_like(opened)
    weight = exact.layout.tensors.index(exact.layout.groups[0].layer + ".weight")
    alive[:, exact.layout.num_channels + weight] = exact.layout.any_channel(exact.configurations.channels)[:, weight]
    sign = 2 * opened - 1
    log_q = (alive * torch.nn.functional.logsigmoid(sign * logits)).sum(1)
    (log_q.exp() * (log_q - exact.log_joint)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def test_gradients_are_unbiased(model: GatedModel, data: Batch) -> None:
    """Each of 5 within 4.5 standard errors of the mean of 30 estimates."""
    guide = BernoulliGuide(model.prior, init={2: 1.0, 4: 0.5})
    expected = exact_gradient(ExactPosterior.from_model(model, [data]), guide)
    elbo, estimates = elbo_module(model.requires_grad_(False), guide, 30), []
    for _ in range(30):
        guide.zero_grad()
        elbo(*data).backward()
        assert guide.channel_logits.grad is not None and guide.tensor_logits.grad is not None
        estimates.append(torch.cat([guide.channel_logits.grad, guide.tensor_logits.grad.flatten()]).double())
    found = torch.stack(estimates)
    error = found.std(0) / len(found) ** 0.5
    assert (error > 0).all() and ((found.mean(0) - expected).abs() < 4.5 * error).all()
    assert (error < 0.5 * expected.abs()).any(), "some gradients stand out from the noise"


def test_loss_is_the_negative_elbo(model: GatedModel, data: Batch) -> None:
    """Of a guide that is certain: nothing is left to chance."""
    for parameter in (guide := BernoulliGuide(model.prior)).parameters():
        parameter.data.fill_(60.0)
    exact = ExactPosterior.from_model(model, [data])
    loss = elbo_module(model, guide)(*data).item()
    assert loss == pytest.approx(-exact.elbo(guide.probabilities()), abs=1e-4)


def test_fit_trains_gates_without_a_relaxation(model: GatedModel, data: Batch) -> None:
    """At 120 nats a gate, more than the data can be worth, all close."""
    model.prior.pin_channels().strength.fill_(5.0)
    guide = BernoulliGuide(model.prior, init=1.0)
    fit(model, guide, [data], epochs=150, progress=False, seed=0)
    assert (guide.probabilities().tensors < 0.2).all()


def test_stock_pyro_takes_the_guide(model: GatedModel, data: Batch) -> None:
    guide = BernoulliGuide(model.prior, init=1.0)
    svi = SVI(*svi_pair(model, guide, "score"), PyroOptim(torch.optim.Adam, {"lr": 0.01}), loss=TraceGraph_ELBO())
    before = guide.tensor_logits.detach().clone()
    assert svi.step(*data) > 0
    assert not torch.equal(guide.tensor_logits, before)


def test_one_particle_has_no_baseline(model: GatedModel) -> None:
    with pytest.raises(ValueError, match="needs num_particles of at least 2; got 1"):
        ScoreFunctionELBO(1)
    chosen: Any = elbo_module(model, BernoulliGuide(model.prior), 1)
    assert isinstance(chosen.elbo, ScoreFunctionELBO) and chosen.elbo.num_particles == 2
    chosen = elbo_module(model, HardConcreteGuide(model.prior))
    assert not isinstance(chosen.elbo, ScoreFunctionELBO)
