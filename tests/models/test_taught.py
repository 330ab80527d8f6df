"""Models that learn from labels and from an opinion of them."""

from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_bbits import GatePrior, QuantizedNetwork, quantize
from pyro_bbits.inference import HardConcreteGuide, elbo_module
from pyro_bbits.models import DistilledModel, GatedModel, SmoothedModel
from pyro_bbits.models.taught import TaughtCategorical


@pytest.fixture
def network() -> QuantizedNetwork:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return quantize(net, torch.rand(16, 3), bits=(2, 4, 8, 16))


def batch() -> tuple[Tensor, Tensor]:
    x = torch.rand(24, 3)
    return x, (x[:, 0] > x[:, 1]).long()


def test_a_teacher_s_opinion_is_weighed_by_hand() -> None:
    scores, opinion, y = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([1])
    p, t = scores.softmax(1)[0], opinion.softmax(1)[0]
    expected = 0.7 * p[1].log() + 0.3 * (t * p.log()).sum()
    torch.testing.assert_close(TaughtCategorical(scores, opinion, 0.3).log_prob(y), expected[None])


def test_a_teacher_is_no_part_of_the_student(network: QuantizedNetwork) -> None:
    teacher = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    prior = GatePrior(network, 0.1)
    model, plain = DistilledModel(network, prior, 24, teacher, 0.5), GatedModel(network, prior, 24)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.train()
    statistics = teacher[1].running_mean.clone()  # type: ignore[operator]
    elbo_module(model, HardConcreteGuide(prior))(*batch()).backward()
    assert torch.equal(teacher[1].running_mean, statistics)  # type: ignore[arg-type]
    assert all(p.grad is None for p in teacher.parameters())
    untaught = DistilledModel(network, prior, 24, teacher, 0.0)
    losses = []
    x, y = batch()
    for other in (untaught, plain):
        torch.manual_seed(1)
        losses.append(elbo_module(other, HardConcreteGuide(prior))(x, y))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_smoothed_labels_are_those_of_torch(network: QuantizedNetwork, share: float) -> None:
    model, (x, y) = SmoothedModel(network, GatePrior(network, 0.1), 24, share), batch()
    site = next(site for site in poutine.trace(model).get_trace(x, y).nodes.values() if site.get("is_observed"))
    likelihood: Any = site["fn"]
    expected = nn.functional.cross_entropy(likelihood.scores, y, label_smoothing=share, reduction="none")
    torch.testing.assert_close(likelihood.log_prob(y), -expected)


def test_a_distilled_model_is_observed_under_labels_and_opinion(network: QuantizedNetwork) -> None:
    teacher, (x, y) = nn.Linear(3, 2), batch()
    model = DistilledModel(network, GatePrior(network, 0.1), 24, teacher, 0.25)
    pyro.set_rng_seed(0)
    trace = poutine.trace(model).get_trace(x, y)
    likelihood: Any = trace.nodes["obs"]["fn"]
    logp = likelihood.scores.log_softmax(1)
    labels, opinion = logp[torch.arange(24), y], (teacher(x).softmax(1) * logp).sum(1)
    torch.testing.assert_close(likelihood.log_prob(y), 0.75 * labels + 0.25 * opinion)
    assert not likelihood.teacher.requires_grad


def test_what_cannot_teach_is_refused(network: QuantizedNetwork) -> None:
    prior, (x, y) = GatePrior(network, 0.1), batch()
    with pytest.raises(ValueError, match=r"must lie between 0 and 1; got 1\.5"):
        SmoothedModel(network, prior, 24, 1.5)
    for teacher in (None, network):
        with pytest.raises(TypeError, match="teacher must be a trained float network; got "):
            DistilledModel(network, prior, 24, teacher, 0.5)  # type: ignore[arg-type]
    stranger = DistilledModel(network, prior, 24, nn.Linear(3, 5), 0.5)
    with pytest.raises(ValueError, match=r"must score the same classes; got \(24, 5\) of the teacher and \(24, 2\)"):
        stranger(x, y)
