"""Bad data and settings are named before they do harm, a diverging run by its first offender."""

import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils.data import DataLoader, TensorDataset

from pyro_bbits import GatePrior, quantize
from pyro_bbits.data import TensorLoader
from pyro_bbits.inference import (
    EmptyGuide,
    EpochRecord,
    HardConcreteGuide,
    NonFiniteError,
    Recipe,
    StraightThroughGuide,
    fine_tune,
    fit,
)
from pyro_bbits.inference.checks import BatchCheck, check_num_data, check_precision, check_signs
from pyro_bbits.models import GatedModel, NormalLikelihood, PlainModel

MakeModel = Callable[..., GatedModel]
Batch = tuple[Tensor, Tensor]

# Pyro warns of a NaN in its own words before our error names the cause.
pytestmark = pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")

X, Y = torch.rand(6, 3, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 1, 1, 0, 1, 0])


def spoiled(value: float) -> Tensor:
    x = X.clone()
    x[4, 1] = value
    return x


class Endless:
    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield X, Y


BAD_LOADERS: dict[str, tuple[Any, str]] = {
    "empty": ([], "the training data are empty: the loader has no batch"),
    "NaN": ([(spoiled(math.nan), Y)], "inputs hold NaN or infinite values, first in sample 4 of a batch"),
    "infinite": ([(spoiled(math.inf), Y)], "inputs hold NaN or infinite values, first in sample 4 of a batch"),
    "too large a label": ([(X, Y + 1)], "labels must lie between 0 and 1, .* 2 outputs; got labels from 1 to 2"),
    "negative label": ([(X, Y - 1)], "labels must lie between 0 and 1, .* got labels from -1 to 0"),
    "float labels": ([(X, Y.float())], r"labels must be integers from 0 to 1; got torch\.float32"),
    "one-hot labels": ([(X, torch.eye(2)[Y])], r"targets must have shape \(6,\) .*; got \(6, 2\)"),
    "too few labels": ([(X, Y[:5])], r"targets must have shape \(6,\) .*; got \(5,\)"),
}


@pytest.mark.parametrize(("loader", "message"), BAD_LOADERS.values(), ids=BAD_LOADERS)
@pytest.mark.parametrize("train", [fit, fine_tune])
def test_bad_data_are_refused_before_anything_is_trained(
    make_model: MakeModel, train: Callable[..., object], loader: Any, message: str
) -> None:
    model = make_model(num_data=6)
    guide = HardConcreteGuide(model.prior)
    before = copy.deepcopy(nn.ModuleList([model, guide]).state_dict())
    with pytest.raises(ValueError, match=message):
        train(model, guide, loader, epochs=1, progress=False)
    after = nn.ModuleList([model, guide]).state_dict()
    trainable = [name for name in after if not name.endswith("extra_state") and "prior" not in name]
    assert trainable
    assert all(torch.equal(after[name], before[name]) for name in trainable)


SETTINGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no epoch": ({"epochs": 0}, ValueError, "epochs must be at least 1; got 0"),
    "negative epochs": ({"epochs": -2}, ValueError, "epochs must be at least 1; got -2"),
    "empty validation": ({"validation": []}, ValueError, "the validation data are empty"),
    "endless validation": (
        {"validation": Endless()},
        TypeError,
        r"the validation loader needs a length \(batches per epoch\); got Endless",
    ),
    "endless training": ({"train": Endless()}, TypeError, "the training loader needs a length .* got Endless"),
    "unknown rule": ({"rule": "mode"}, ValueError, "rule must be 'map' or 'threshold'; got 'mode'"),
}


@pytest.mark.parametrize(("options", "error", "message"), SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("train", [fit, fine_tune])
def test_bad_settings_change_nothing(
    make_model: MakeModel,
    train: Callable[..., object],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    model = make_model(num_data=6)
    guide = HardConcreteGuide(model.prior)
    before, random = copy.deepcopy(nn.ModuleList([model, guide]).state_dict()), torch.get_rng_state()
    with pytest.raises(error, match=message):
        train(model, guide, **{"train": [(X, Y)], "epochs": 1, "progress": False, "seed": 9} | options)
    after = nn.ModuleList([model, guide]).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("train", [fit, fine_tune])
def test_a_guide_of_another_prior_is_refused(make_model: MakeModel, train: Callable[..., object]) -> None:
    model = make_model(num_data=6)
    other = GatePrior(model.net, mu=5.0)
    with pytest.raises(ValueError, match=r"made for another prior .*StraightThroughGuide\(model\.prior\)"):
        train(model, StraightThroughGuide(other), [(X, Y)], epochs=1, progress=False)
    assert other.strength.isfinite().all()  # nothing was pinned


@pytest.mark.parametrize("mu", [-0.1, math.inf, math.nan])
def test_the_prior_strength_must_be_finite_and_not_negative(make_model: MakeModel, mu: float) -> None:
    with pytest.raises(ValueError, match=f"mu must be a finite number of at least 0 .*got {mu}"):
        make_model(mu)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(6), r"targets must have shape \(6, 2\) for this network and likelihood; got \(6,\)"),
        (torch.full((6, 2), math.nan), "the targets hold NaN or infinite values"),
        (torch.tensor([[0.0, math.inf]] * 6), "the targets hold NaN or infinite values"),
    ],
)
def test_regression_targets_are_checked(y: Tensor, message: str) -> None:
    model = PlainModel(nn.Linear(3, 2), 6, NormalLikelihood())
    with pytest.raises(ValueError, match=message):
        fit(model, EmptyGuide(), [(X, y)], epochs=1, progress=False)
    BatchCheck(model)(X, torch.zeros(6, 2))


def test_label_maps_are_checked() -> None:
    model, x = PlainModel(nn.Conv1d(2, 3, 1), 4), torch.rand(4, 2, 5)
    BatchCheck(model)(x, torch.full((4, 5), 2))
    with pytest.raises(ValueError, match=r"labels must lie between 0 and 2, .* got labels from 3 to 3"):
        BatchCheck(model)(x, torch.full((4, 5), 3))
    with pytest.raises(ValueError, match=r"targets must have shape \(4, 5\)"):
        BatchCheck(model)(x, torch.zeros(4, dtype=torch.long))


class Scale(nn.Module):
    """Takes an image, a number per sample and one number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
        logits: Tensor = self.layer(x)
        return logits * weight[:, None] * factor


def test_every_input_is_checked_whatever_its_rank() -> None:
    model, weight = PlainModel(Scale(), 6), torch.ones(6)
    BatchCheck(model)((X, weight, torch.tensor(2.0)), Y)
    weight[3] = math.nan
    with pytest.raises(ValueError, match="first in sample 3 of a batch"):
        BatchCheck(model)({"x": X, "weight": weight, "factor": torch.tensor(2.0)}, Y)
    with pytest.raises(ValueError, match="inputs hold NaN or infinite values"):
        BatchCheck(model)((X, torch.ones(6), torch.tensor(math.inf)), Y)


def test_later_batches_of_the_first_epoch_are_checked_before_their_step() -> None:
    model = PlainModel(nn.Linear(3, 2), 12)
    with pytest.raises(ValueError, match="first in sample 4"):
        fit(model, EmptyGuide(), [(X, Y), (spoiled(math.nan), Y)], epochs=1, progress=False)
    assert all(p.isfinite().all() for p in model.parameters())


def test_checks_leave_modes_and_running_statistics_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model = PlainModel(net, 6)
    net[1].eval()
    before = copy.deepcopy(model.state_dict())
    BatchCheck(model)(X, Y)
    assert [module.training for module in net] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Explodes(nn.Module):
    """The identity until it is told otherwise."""

    broken = False

    def forward(self, x: Tensor) -> Tensor:
        return x * math.inf if self.broken else x


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), Explodes(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.middle(self.first(x).relu()))
        return logits


@pytest.fixture(params=["plain", "gated"])
def parts(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    """Model, guide and the network inside."""
    if request.param == "plain":
        plain = PlainModel(Parts(), 6)
        return plain, EmptyGuide(), plain.net
    network = quantize(Parts(), X)
    gated = GatedModel(network, GatePrior(network, mu=0.01), 6)
    return gated, HardConcreteGuide(gated.prior), network.net


def fit_and_break(model: Any, guide: Any, change: Callable[[], object], **options: Any) -> str:
    """Message of the error of a run that is sabotaged after its second epoch of two steps."""

    def sabotage(record: EpochRecord) -> None:
        if record.epoch == 2:
            with torch.no_grad():
                change()

    loader = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    with pytest.raises(NonFiniteError) as caught:
        fit(model, guide, loader, epochs=4, progress=False, on_epoch=sabotage, **options)
    return str(caught.value)


def test_a_parameter_that_became_nan_is_named(parts: tuple[Any, Any, Any]) -> None:
    model, guide, net = parts
    message = fit_and_break(model, guide, lambda: net.last.weight[1, 2].fill_(math.nan))
    name = next(name for name, p in model.named_parameters() if p is net.last.weight)
    assert re.match(r"the loss is nan at epoch 3, step 1; first to be NaN or infinite: ", message)
    assert f"the parameter '{name}' of the model" in message


def test_the_module_that_first_gives_an_infinite_activation_is_named(parts: tuple[Any, Any, Any]) -> None:
    model, guide, net = parts
    message = fit_and_break(model, guide, lambda: setattr(net.middle, "broken", True))
    name = next(name for name, module in model.named_modules() if module is net.middle)
    assert name.endswith("middle")
    assert f"first to be NaN or infinite: the output of module '{name}'" in message


def test_a_logit_that_became_nan_is_named(make_model: MakeModel) -> None:
    model = make_model(num_data=6)
    guide = HardConcreteGuide(model.prior)
    message = fit_and_break(model, guide, lambda: guide.tensor_logits[0, 0].fill_(math.nan))
    assert "the parameter 'tensor_logits' of the guide" in message


def test_inputs_that_became_nan_later_are_named() -> None:
    x = X.clone()
    loader = [(x, Y)]
    with pytest.raises(NonFiniteError, match=r"epoch 2, step 1; .*the inputs of the batch"):
        fit(
            PlainModel(nn.Linear(3, 2), 6),
            EmptyGuide(),
            loader,
            epochs=3,
            progress=False,
            on_epoch=lambda _: x.fill_(math.nan),
        )


def test_a_likelihood_that_became_nan_is_named() -> None:
    scale = torch.ones(())

    def own(output: Tensor) -> Any:
        return dist.Normal(output, scale).to_event(1)

    model = PlainModel(nn.Linear(3, 1), 6, own)
    with pytest.raises(NonFiniteError, match="first to be NaN or infinite: the likelihood of the batch"):
        fit(
            model,
            EmptyGuide(),
            [(X, torch.zeros(6, 1))],
            epochs=3,
            progress=False,
            on_epoch=lambda _: scale.fill_(math.nan),
        )


def test_a_huge_learning_rate_ends_in_a_hint_and_not_in_nan_parameters() -> None:
    model = PlainModel(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)), 6, NormalLikelihood())
    recipe = Recipe(weight_lr=1e25, schedule="constant")
    message = "at epoch 2, step 1; .*the output of module 'net.2'.*lower weight learning rate"
    with pytest.raises(NonFiniteError, match=message):
        fit(model, EmptyGuide(), [(X, torch.ones(6, 1))], epochs=4, recipe=recipe, progress=False)
    assert all(p.isfinite().all() for p in model.parameters())


def negative_later() -> tuple[GatedModel, Tensor]:
    """A network whose hidden layer is positive on the examples and negative on the data."""
    first = nn.Linear(2, 4)
    nn.init.ones_(first.weight)
    nn.init.zeros_(first.bias)
    net = nn.Sequential(first, nn.Identity(), nn.Linear(4, 2))
    network = quantize(net, torch.rand(8, 2))
    assert network.quantizers.signed == (False, True, False)
    return GatedModel(network, GatePrior(network, mu=0.01), 6), -torch.rand(6, 2)


def test_negative_values_at_unsigned_quantizers_are_warned_of_once() -> None:
    model, x = negative_later()
    assert check_signs(model, x) == ["2.input"]
    assert check_signs(model, torch.cat([x, -x])) == ["2.input"]
    assert check_signs(model, -x) == []
    with pytest.warns(UserWarning, match=r"unsigned quantizers of 2\.input and are clipped .*example inputs") as caught:
        fit(model, HardConcreteGuide(model.prior), [(x, Y)] * 2, epochs=2, progress=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_signs_do_not_concern_plain_models_and_leave_no_hooks() -> None:
    assert check_signs(PlainModel(nn.Linear(3, 2), 6), -X) == []
    model, x = negative_later()
    check_signs(model, x)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("flag", [True, False])
def test_pyro_s_validation_is_as_before_after_a_run_and_after_an_error(flag: bool) -> None:
    model, seen = PlainModel(nn.Linear(3, 2), 6), []

    def watch(record: EpochRecord) -> None:
        seen.append((pyro.settings.get("validate_infer"), Distribution._validate_args))
        if record.epoch == 2:
            raise KeyboardInterrupt

    with pyro.validation_enabled(flag):
        fit(model, EmptyGuide(), [(X, Y)], epochs=1, progress=False, on_epoch=watch)
        states = [(pyro.settings.get("validate_infer"), Distribution._validate_args)]
        with pytest.raises(KeyboardInterrupt):
            fit(model, EmptyGuide(), [(X, Y)], epochs=3, progress=False, on_epoch=watch)
        states.append((pyro.settings.get("validate_infer"), Distribution._validate_args))
        with pytest.raises(ValueError, match="labels"):
            fit(model, EmptyGuide(), [(X, Y + 5)], epochs=1, progress=False)
        states.append((pyro.settings.get("validate_infer"), Distribution._validate_args))
    assert seen == [(False, False)] * 3
    assert states == [(flag, flag)] * 3


def test_a_model_with_gates_needs_a_guide_with_gates(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"EmptyGuide has none; use HardConcreteGuide"):
        fit(make_model(num_data=6), EmptyGuide(), [(X, Y)], epochs=1, progress=False)


@pytest.mark.parametrize(
    ("loader", "message"), [pair for name, pair in BAD_LOADERS.items() if name != "empty"], ids=[*BAD_LOADERS][1:]
)
@pytest.mark.parametrize("train", [fit, fine_tune])
def test_bad_validation_data_are_refused_before_anything_is_trained(
    make_model: MakeModel, train: Callable[..., object], loader: Any, message: str
) -> None:
    """In whichever batch they are."""
    model = make_model(num_data=6)
    guide = HardConcreteGuide(model.prior)
    before = copy.deepcopy([*model.parameters(), *guide.parameters()])
    with pytest.raises(ValueError, match=f"^validation data: .*{message}"):
        train(model, guide, [(X, Y)], [(X, Y), *loader], epochs=1, progress=False)
    assert all(torch.equal(a, b) for a, b in zip([*model.parameters(), *guide.parameters()], before, strict=True))


class Sampled:
    """A loader like PyTorch's, with a sampler."""

    def __init__(self, sampler: Any, dataset: Any) -> None:
        self.sampler, self.dataset = sampler, dataset

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Batch]:
        yield X, Y


class Distributed(list[int]):
    num_replicas = 2


@pytest.mark.parametrize(
    ("loader", "size"),
    [
        (TensorLoader(X, Y, 2), 6),
        (DataLoader(TensorDataset(X, Y)), 6),
        (Sampled(range(4), range(6)), 4),  # a subset
        (Sampled(Distributed([0, 1, 2]), range(6)), 6),  # this process has half of the data
    ],
)
def test_a_model_that_counts_other_data_is_warned_of(make_model: MakeModel, loader: Any, size: int) -> None:
    check_num_data(make_model(num_data=size), loader)  # warnings are errors
    check_num_data(PlainModel(nn.Linear(3, 2), 1), loader)  # no KL to weigh
    check_num_data(make_model(num_data=100), [(X, Y)])  # a list does not say
    model = make_model(num_data=60)
    with pytest.warns(UserWarning, match=f"made for num_data=60 training samples, .* loader has {size}; ") as caught:
        fit(model, HardConcreteGuide(model.prior), loader, epochs=1, recipe=Recipe(gate_lr=1e-9), progress=False)
    assert [warning.filename for warning in caught] == [__file__]


def test_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'net\.weight' is float16, .*; train the network in float32"):
        check_precision(PlainModel(nn.Linear(2, 2).half(), 4))
