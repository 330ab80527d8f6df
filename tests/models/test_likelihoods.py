"""Likelihoods give one log-probability per sample, equal to the usual loss functions."""

import math

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F

from pyro_bbits.models.likelihoods import Likelihood, NormalLikelihood, categorical, resolve_likelihood


@pytest.mark.parametrize("positions", [(), (5,), (2, 3)])
def test_categorical_is_the_cross_entropy_of_each_sample(positions: tuple[int, ...]) -> None:
    logits, labels = torch.randn(4, 3, *positions), torch.randint(3, (4, *positions))
    distribution = categorical(logits)
    assert (distribution.batch_shape, distribution.event_shape) == ((4,), positions)
    expected = -F.cross_entropy(logits, labels, reduction="none").reshape(4, -1).sum(1)
    torch.testing.assert_close(distribution.log_prob(labels), expected)


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
