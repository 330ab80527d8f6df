"""Evaluation is the plain mean over all samples, with the gates it is given, and leaves the model as it was."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits import GateValues
from pyro_bbits.inference import evaluate
from pyro_bbits.inference.joining import in_pairs
from pyro_bbits.models import GatedModel, NormalLikelihood, PlainModel

MakeModel = Callable[..., GatedModel]
Batch = tuple[Tensor, Tensor]


def test_means_are_over_samples_not_batches(make_model: MakeModel, batches: list[Batch], data: Batch) -> None:
    model = make_model()
    gates = GateValues(torch.tensor([1.0, 1, 0, 1]), torch.tensor([[1.0, 0, 0, 0]] * 3))
    result, (x, y) = evaluate(model, batches, gates), data
    logits = model.net(x, gates=gates)
    assert result.samples == 24
    assert result.nll == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-6)
    assert result.accuracy == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())


def test_all_gates_are_open_unless_given(make_model: MakeModel, batches: list[Batch]) -> None:
    model = make_model()
    closed = GateValues(torch.ones(4), torch.zeros(3, 4))
    assert evaluate(model, batches) == evaluate(model, batches, model.net.open_gates())
    assert evaluate(model, batches).nll != evaluate(model, batches, closed).nll


def test_several_labels_per_sample_count_one_by_one() -> None:
    net = nn.Conv1d(2, 3, 1)
    x, y = torch.randn(6, 2, 4), torch.randint(3, (6, 4))
    result = evaluate(PlainModel(net, 6), [(x[:4], y[:4]), (x[4:], y[4:])])
    assert result.samples == 6
    assert result.accuracy == pytest.approx(100 * (net(x).argmax(1) == y).float().mean().item())
    assert result.nll == pytest.approx(F.cross_entropy(net(x), y, reduction="sum").item() / 6, rel=1e-6)


def test_regression_has_no_accuracy() -> None:
    net, x, y = nn.Linear(3, 2), torch.randn(10, 3), torch.randn(10, 2)
    result = evaluate(PlainModel(net, 10, NormalLikelihood(0.5)), [(x, y)])
    assert result.accuracy is None
    expected = -torch.distributions.Normal(net(x), 0.5).log_prob(y).sum() / 10
    assert result.nll == pytest.approx(expected.item(), rel=1e-6)


def test_error_of_a_regression_is_over_all_samples_and_outputs() -> None:
    net, x, y = nn.Linear(3, 2), torch.randn(10, 3), torch.randn(10, 2)
    result = evaluate(PlainModel(net, 10, NormalLikelihood(0.5)), [(x[:7], y[:7]), (x[7:], y[7:])])
    assert result.rmse == pytest.approx(F.mse_loss(net(x), y).sqrt().item(), rel=1e-6)


def test_other_likelihoods_have_neither_accuracy_nor_error(data: Batch, batches: list[Batch]) -> None:
    assert evaluate(PlainModel(nn.Linear(3, 2), 24), batches).rmse is None
    counts = PlainModel(nn.Linear(3, 2), 24, lambda output: dist.Poisson(output.exp()).to_event(1))
    result = evaluate(counts, [(data[0], torch.ones(24, 2))])
    assert result.accuracy is None and result.rmse is None


def test_inputs_may_be_nested(data: Batch) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, *, x: Tensor) -> Tensor:
            logits: Tensor = self.layer(x)
            return logits

    model = PlainModel(Named(), 24)
    expected = F.cross_entropy(model.net(x=data[0]), data[1]).item()
    assert evaluate(model, [({"x": data[0]}, data[1])]).nll == pytest.approx(expected, rel=1e-6)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken")


@pytest.mark.parametrize("training", [True, False])
def test_every_module_keeps_its_mode(data: Batch, training: bool) -> None:
    """A batch norm that was frozen on its own stays so; nothing is updated, and an error changes nothing."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model = PlainModel(net, 24).train(training)
    net[1].train(not training)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = evaluate(model, [data]), evaluate(model, [data])
    assert first == second  # no dropout
    assert [module.training for module in model.modules()] == modes
    net.append(Fails())
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model, [data])
    assert [module.training for module in model.modules()][: len(modes)] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_models_without_parameters_are_evaluated(data: Batch) -> None:
    def fair(output: Tensor) -> Any:
        return dist.Categorical(logits=torch.zeros(len(output), 2))

    result = evaluate(PlainModel(nn.Identity(), 24, fair), [data])
    assert result.nll == pytest.approx(torch.tensor(2.0).log().item())


def test_no_data_are_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="no data to evaluate on: the loader gives no batch"):
        evaluate(make_model(), [])


def test_batches_in_pairs_are_the_same_rows_in_the_same_order() -> None:
    sizes = [4, 4, 300, 300, 4, 5, 7]
    x, y = torch.randn(sum(sizes), 3), torch.randint(5, (sum(sizes),))
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    pairs = list(in_pairs(batches, torch.device("cpu")))
    assert [len(targets) for _, targets in pairs] == [8, 300, 300, 9, 7]
    assert torch.equal(torch.cat([rows for rows, _ in pairs]), x)
    assert torch.equal(torch.cat([targets for _, targets in pairs]), y)


def test_batches_that_do_not_fit_together_or_lie_elsewhere_stay_apart() -> None:
    here, label = torch.device("cpu"), torch.zeros(2, dtype=torch.long)
    for batches in (
        [(torch.ones(2, 3), label), (torch.ones(2, 4), label)],
        [(torch.ones(2, 3), label), (torch.ones(2, 3), label.expand(3, 2).T)],
        [((torch.ones(2, 3), torch.ones(2)), label)] * 2,
    ):
        pairs = list(in_pairs(batches, here))
        assert len(pairs) == 2 and all(mine is theirs for mine, theirs in zip(pairs, batches, strict=True))
    batches = [(torch.ones(2, 3), label)] * 2
    assert len(list(in_pairs(batches, torch.device("cuda")))) == 2
    assert not list(in_pairs([], here))
