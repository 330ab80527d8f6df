"""Scaled data have mean 0 and deviation 1, channel by channel."""

import pytest
import torch

from pyro_bbits.data.scaling import Scaling


@pytest.mark.parametrize("shape", [(50, 3), (20, 2, 4, 5)])
def test_scaled_data_have_mean_0_and_deviation_1(shape: tuple[int, ...]) -> None:
    data = torch.randn(shape, dtype=torch.float64) * 7 + 1e6
    scaled = Scaling.of(data)(data).movedim(1, 0).flatten(1)
    torch.testing.assert_close(scaled.mean(1), torch.zeros(shape[1], dtype=torch.float64), atol=1e-7, rtol=0)
    torch.testing.assert_close(scaled.square().mean(1), torch.ones(shape[1], dtype=torch.float64))


def test_a_channel_that_never_changes_becomes_0() -> None:
    data = torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 3.0]], dtype=torch.float64)
    scaling = Scaling.of(data)
    assert scaling.std[0] == 1
    assert scaling(data)[:, 0].abs().max() < 1e-15


def test_black_is_what_0_becomes() -> None:
    scaling = Scaling((0.5, 0.25), (0.25, 0.5))
    assert scaling.black == (-2.0, -0.5)
    assert scaling(torch.zeros(1, 2, 1, 1)).flatten().tolist() == [-2.0, -0.5]


@pytest.mark.parametrize(("mean", "std"), [((0.0,), ()), ((0.0,), (0.0,)), ((0.0,), (float("nan"),))])
def test_a_scaling_that_divides_by_nothing_is_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="a deviation above 0 for each mean"):
        Scaling(mean, std)
