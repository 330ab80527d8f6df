"""Weighted sums against the matrix that they stand for."""

import pytest
import torch

import pyro_bbits.sums as sums_module
from pyro_bbits.sums import WeightedSums


def matrix_of(sums: list[dict[int, float]], num_values: int) -> torch.Tensor:
    matrix = torch.zeros(len(sums), num_values, dtype=torch.double)
    for row, terms in enumerate(sums):
        for column, weight in terms.items():
            matrix[row, column] = weight
    return matrix


def random_sums(rows: int, columns: int, seed: int) -> list[dict[int, float]]:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randint(-3, 4, (rows, columns), generator=generator)
    return [{c: float(w) for c, w in enumerate(row.tolist()) if w} for row in dense]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (3, 17), (9, 40)])
@pytest.mark.parametrize("longest", [2, 1024])
def test_sums_and_their_gradients_are_those_of_the_matrix(
    rows: int, columns: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums_module, "LONGEST", longest)
    terms = [*random_sums(rows, columns, seed=rows), {}]
    sums, matrix = WeightedSums(terms, columns), matrix_of(terms, columns)
    values = torch.randn(columns, dtype=torch.double, requires_grad=True)
    actual, weights = sums(values), torch.randn(rows + 1, dtype=torch.double)
    torch.testing.assert_close(actual, matrix @ values)
    torch.testing.assert_close(torch.autograd.grad(actual @ weights, values)[0], matrix.T @ weights)
    assert torch.autograd.gradgradcheck(sums, values)


def test_sums_of_integers_are_exact_and_keep_their_type() -> None:
    sums = WeightedSums([dict.fromkeys(range(5000), 1.0), {4999: 512.0}], 5000)
    actual = sums(torch.ones(5000))
    assert actual.dtype == torch.float32
    assert actual.tolist() == [5000.0, 512.0]


def test_sums_of_many_vectors_and_their_gradients_by_vmap() -> None:
    terms = random_sums(4, 6, seed=0)
    sums, matrix = WeightedSums(terms, 6), matrix_of(terms, 6)
    values = torch.randn(3, 6, dtype=torch.double)
    torch.testing.assert_close(torch.vmap(sums)(values), values @ matrix.T)
    jacobian = torch.vmap(torch.func.jacrev(sums))(values)
    torch.testing.assert_close(jacobian, matrix.expand(3, -1, -1))


def test_what_is_not_a_number_reaches_the_sums_it_is_in_and_no_others() -> None:
    sums = WeightedSums([{0: 1.0}, {1: 1.0}, {1: 1.0, 2: 1.0}], 3)
    values = torch.tensor([float("nan"), 1.0, 1.0], requires_grad=True)
    actual = sums(values)
    assert actual[0].isnan() and actual[1:].tolist() == [1.0, 2.0]
    (gradient,) = torch.autograd.grad(actual, values, torch.tensor([float("inf"), 1.0, 1.0]))
    assert not gradient[0].isfinite() and gradient[1:].tolist() == [2.0, 1.0]


def test_nothing_to_sum_is_refused() -> None:
    with pytest.raises(ValueError, match="0 sums of 3 values"):
        WeightedSums([], 3)
    with pytest.raises(ValueError, match="1 sums of 0 values"):
        WeightedSums([{}], 0)
