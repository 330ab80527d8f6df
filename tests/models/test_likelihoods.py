"""Likelihoods give one log-probability per sample, equal to the usual loss functions."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F

from pyro_bbits.models.likelihoods import (
    Likelihood,
    NormalLikelihood,
    ScoredCategorical,
    categorical,
    resolve_likelihood,
)


@pytest.mark.parametrize("positions", [(), (5,), (2, 3)])
def test_categorical_is_the_cross_entropy_of_each_sample(positions: tuple[int, ...]) -> None:
    logits, labels = torch.randn(4, 3, *positions), torch.randint(3, (4, *positions))
    distribution = categorical(logits)
    assert (distribution.batch_shape, distribution.event_shape) == ((4,), positions)
    expected = -F.cross_entropy(logits, labels, reduction="none").reshape(4, -1).sum(1)
    torch.testing.assert_close(distribution.log_prob(labels), expected)


@pytest.mark.parametrize("batch", [(), (5,), (5, 2), (2, 3, 4)])
def test_scores_make_pyro_s_categorical(batch: tuple[int, ...]) -> None:
    """Log-probabilities, their gradients, moments, draws and shapes; targets of further dimensions too."""
    scores, labels = torch.randn(*batch, 3, dtype=torch.float64) * 4, torch.randint(3, batch)
    ours, stock = ScoredCategorical(scores), dist.Categorical(logits=scores)
    assert isinstance(ours, dist.Categorical) and ours.has_enumerate_support
    assert (ours.batch_shape, ours.event_shape, ours.param_shape) == (stock.batch_shape, (), stock.param_shape)
    for name in ("logits", "probs", "mode"):
        torch.testing.assert_close(getattr(ours, name), getattr(stock, name))
    torch.testing.assert_close(ours.entropy(), stock.entropy())
    everything = ours.enumerate_support()
    assert torch.equal(everything, stock.enumerate_support())
    for value in (labels, labels.expand(7, *batch), everything):
        torch.testing.assert_close(ours.log_prob(value), stock.log_prob(value), rtol=1e-12, atol=1e-12)
    wide, wide_stock = ours.expand([6, *batch]), stock.expand([6, *batch])
    torch.testing.assert_close(wide.log_prob(labels), wide_stock.log_prob(labels), rtol=1e-12, atol=1e-12)
    pyro.set_rng_seed(4)
    drawn = wide.sample(torch.Size([2]))
    pyro.set_rng_seed(4)
    assert torch.equal(drawn, wide_stock.sample(torch.Size([2])))


def test_scores_are_normalized_only_where_they_are_read() -> None:
    lazy = ScoredCategorical(torch.randn(4, 3), validate_args=False)
    lazy.log_prob(torch.zeros(4, dtype=torch.long))
    assert "logits" not in vars(lazy)
    torch.testing.assert_close(lazy.logits.exp().sum(-1), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_probabilities_of_half_precision_scores_are_float32(dtype: torch.dtype) -> None:
    """Computed in float32, so that they equal those of the rounded scores to its digits."""
    scores, labels = (torch.randn(4, 3) * 9).to(dtype).requires_grad_(), torch.randint(3, (4,))
    log_prob = ScoredCategorical(scores, validate_args=False).log_prob(labels)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, -F.cross_entropy(scores.float(), labels, reduction="none"))
    log_prob.sum().backward()
    assert scores.grad is not None and scores.grad.dtype == dtype


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("label", [3, -1, -100])
def test_classes_that_do_not_exist_are_refused(validate: bool, label: int) -> None:
    """Cross entropy alone would pass over -100 in silence."""
    with pytest.raises((IndexError, ValueError)):
        ScoredCategorical(torch.zeros(2, 3), validate_args=validate).log_prob(torch.tensor([0, label]))


def test_the_sum_over_a_batch_is_that_of_its_samples() -> None:
    scores, y = torch.randn(50, 7, dtype=torch.double), torch.randint(7, (50,))
    plain = ScoredCategorical(scores, validate_args=False)
    summed = plain.summed_loss(y)
    assert summed is not None
    torch.testing.assert_close(summed, -plain.log_prob(y).sum())
    assert plain.summed_loss(y[:1]) is None, "would be spread over the batch"
    assert ScoredCategorical(scores.view(5, 10, 7), validate_args=False).summed_loss(y.view(5, 10)) is None
    assert ScoredCategorical(scores, validate_args=True).summed_loss(y) is None


def test_validation_finds_scores_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="parameter logits"):
        ScoredCategorical(torch.tensor([[0.0, math.nan]]), validate_args=True)
    with pytest.raises(ValueError, match=r"scores must have a dimension of classes, \(..., K\); got shape \(\)"):
        ScoredCategorical(torch.tensor(1.0))


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 2, 3)])
def test_normal_is_the_squared_error_of_each_sample(shape: tuple[int, ...]) -> None:
    output, y, scale = torch.randn(shape), torch.randn(shape), 0.3
    distribution = NormalLikelihood(scale)(output)
    assert (distribution.batch_shape, distribution.event_shape) == (shape[:1], shape[1:])
    errors = ((y - output) / scale).reshape(6, -1)
    expected = -0.5 * errors.square().sum(1) - errors.shape[1] * (math.log(scale) + 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(distribution.log_prob(y), expected)


def test_normal_learns_the_standard_deviation_of_the_errors() -> None:
    """The likelihood is flat in the scale exactly where the scale is the root mean square of the errors."""
    output, y = torch.zeros(50, 2), torch.randn(50, 2)
    likelihood = NormalLikelihood(y.square().mean().sqrt().item())
    likelihood(output).log_prob(y).sum().backward()
    assert likelihood.log_scale.grad is not None
    assert likelihood.log_scale.grad.item() == pytest.approx(0, abs=1e-3)
    likelihood = NormalLikelihood(1.0)
    likelihood(output).log_prob(y).sum().backward()
    assert likelihood.log_scale.grad is not None
    assert likelihood.log_scale.grad.item() == pytest.approx((y.square() - 1).sum().item(), rel=1e-4)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_normal_needs_a_positive_scale(scale: float) -> None:
    with pytest.raises(ValueError, match=f"scale must be above 0; got {scale}"):
        NormalLikelihood(scale)


def test_names_and_callables_are_resolved() -> None:
    def own(output: torch.Tensor) -> dist.Distribution:
        return dist.Poisson(output.exp())

    likelihoods: list[Likelihood] = [own, NormalLikelihood(2.0)]
    assert resolve_likelihood("categorical") is categorical
    assert isinstance(resolve_likelihood("normal"), NormalLikelihood)
    assert all(resolve_likelihood(likelihood) is likelihood for likelihood in likelihoods)


@pytest.mark.parametrize("name", ["gaussian", None])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'categorical', 'normal' or a callable; got {name!r}"):
        resolve_likelihood(name)  # type: ignore[arg-type]
