"""Rows are held out in proportion, normalized by the training rows alone, and refused with file and row."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pyro_bbits.data.rows import Rows, Task, hold_out, make_splits
from pyro_bbits.data.splits import DataSplits


def rows(targets: Tensor | Sequence[str], name: str = "a.csv", inputs: Tensor | None = None) -> Rows:
    """Rows that can be recognized: the features of row `i` are `i` and `-i`."""
    numbers = torch.arange(len(targets), dtype=torch.float64)
    return Rows(torch.stack([numbers, -numbers], 1) if inputs is None else inputs, targets, lambda i: f"{name}:{i}")


def reals(count: int, columns: int = 1) -> Tensor:
    return torch.arange(count * columns, dtype=torch.float64).view(count, columns) ** 2


def split(task: Task = "classification", seed: int = 0, **parts: Rows) -> DataSplits:
    return split_parts(parts, task, seed)


def split_parts(parts: dict[str, Rows], task: Task = "classification", seed: int = 0) -> DataSplits:
    return make_splits("own", parts, task, validation_fraction=0.1, seed=seed)


def numbers(data: DataSplits) -> dict[str, list[int]]:
    """The rows in each part, read off the features after undoing their normalization."""
    assert data.input_scaling is not None
    mean, std = data.input_scaling.mean[0], data.input_scaling.std[0]
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    return {name: [round(x * std + mean) for x in part.inputs[:, 0].tolist()] for name, part in parts.items()}


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.2, 0.5, 0.99])
def test_each_class_keeps_a_row_and_gives_in_proportion(fraction: float) -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 9 + [3])
    rest, held = hold_out(rows(labels), fraction, seed=1)
    assert len(held) == min(round(100 * fraction), 96)
    assert sorted(rest.inputs[:, 0].tolist() + held.inputs[:, 0].tolist()) == list(range(100))
    assert isinstance(rest.targets, Tensor) and isinstance(held.targets, Tensor)
    assert rest.targets.unique().tolist() == [0, 1, 2, 3]
    shares = held.targets.bincount(minlength=4) - fraction * labels.bincount()
    assert shares.abs().max() <= 1.5
    for part in (rest, held):
        assert labels[part.inputs[:, 0].long()].tolist() == list(part.targets)
        assert [part.locate(i) for i in range(len(part))] == [f"a.csv:{int(n)}" for n in part.inputs[:, 0]]


def test_what_is_held_out_follows_the_seed_alone() -> None:
    labels = torch.arange(50) % 5
    torch.manual_seed(1)
    first = hold_out(rows(labels), 0.2, seed=7)[1].inputs
    torch.manual_seed(2)
    assert torch.equal(hold_out(rows(labels), 0.2, seed=7)[1].inputs, first)
    assert not torch.equal(hold_out(rows(labels), 0.2, seed=8)[1].inputs, first)


def test_other_seeds_are_tested_on_the_same_rows() -> None:
    """So no run is tested on what another one, whose weights it may start from, was trained on."""
    zero, one = (numbers(split(all=rows(torch.arange(100) % 4), seed=seed)) for seed in (0, 1))
    assert zero["test"] == one["test"] and len(zero["test"]) == 20
    assert set(zero["validation"]) != set(one["validation"]) and len(zero["validation"]) == 8
    for part in (zero, one):
        assert sorted(itertools.chain(*part.values())) == list(range(100))


def test_given_parts_stay_and_training_rows_are_mixed() -> None:
    labels = torch.tensor([0] * 20 + [1] * 20)
    data = split(train=rows(labels), test=rows(torch.tensor([1, 0])), validation=rows(torch.tensor([0, 1, 1])))
    found = numbers(data)
    assert (found["validation"], found["test"]) == ([0, 1, 2], [0, 1])
    assert sorted(found["train"]) == list(range(40)) != found["train"]
    assert data.train.targets.tolist() == [int(labels[row]) for row in found["train"]]
    assert set(data.train.targets[:10].tolist()) == {0, 1}, "the first rows set ranges and must show every class"


def test_inputs_are_normalized_by_the_training_rows_alone() -> None:
    labels = torch.arange(30) % 2
    base = split(train=rows(labels), validation=rows(labels), test=rows(labels))
    far = rows(labels, inputs=torch.full((30, 2), 1e9, dtype=torch.float64))
    moved = split(train=rows(labels), validation=far, test=far)
    assert moved.input_scaling == base.input_scaling
    torch.testing.assert_close(base.train.inputs.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(base.train.inputs.std(0, correction=0), torch.ones(2))


def test_bytes_are_scaled_to_one_before() -> None:
    pixels = torch.randint(256, (10, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part = rows(torch.arange(10) % 2, inputs=pixels)
    data = split(train=part, validation=part, test=part)
    assert data.input_scaling is not None
    expected = pixels.double() / 255
    torch.testing.assert_close(data.input_scaling.mean[1], expected[:, 1].mean().item(), rtol=1e-5, atol=0)
    torch.testing.assert_close(data.test.inputs, data.input_scaling(expected).float(), rtol=1e-4, atol=1e-5)
    black = data.input_scaling(torch.zeros(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(torch.tensor(data.input_scaling.black), black)


def test_targets_of_a_regression_share_one_deviation() -> None:
    part = rows(reals(40, 2))
    data = split("regression", train=part, validation=part, test=part)
    assert data.num_classes is None and data.num_outputs == 2 and data.likelihood == "normal"
    assert data.target_scaling is not None
    mean, std = data.target_scaling.mean, data.target_scaling.std
    assert std[0] == std[1]
    torch.testing.assert_close(data.train.targets.square().mean(), torch.tensor(1.0))
    back = data.test.targets.double() * std[0] + torch.tensor(mean)
    torch.testing.assert_close(back, reals(40, 2), rtol=1e-5, atol=1e-3)


def test_names_are_numbered_in_alphabetical_order() -> None:
    part = rows(["dog", "cat", "dog", "10"])
    data = split(train=part, validation=part, test=rows(["cat", "dog"]))
    assert data.class_names == ("10", "cat", "dog") and data.num_classes == 3
    assert data.validation.targets.tolist() == [2, 1, 2, 0] and data.test.targets.tolist() == [1, 2]


def labels(*values: int) -> Rows:
    return rows(torch.tensor(values))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": labels(1, 1, 1), "test": labels(1)}, r"two classes at least; all 2 .* of class 1 \(a\.csv:"),
        ({"all": rows(["x"] * 5)}, "two classes at least"),
        ({"train": labels(1, 2, 1, 2, 2), "test": labels(1)}, r"0 to K-1 .* have 1, 2; a\.csv:\d has 2\. Renumber"),
        ({"train": labels(0, 2, 0, 2, 2), "test": labels(0)}, r"have 0, 2; a\.csv:\d has 2"),
        ({"train": labels(0, -1, 0, -1, 0), "test": labels(0)}, r"a\.csv:\d has -1"),
        ({"train": labels(0, 1, 0, 1, 1), "test": labels(0, 1, 2)}, r"a\.csv:2 has 2"),
        (
            {"train": rows(["a", "b", "a", "b"]), "test": rows(["b", "c"], "t.csv")},
            r"t\.csv:1 is of class 'c', which the training rows do not have; their classes are a, b\.",
        ),
        (
            {"train": labels(0, 1, 0, 1), "test": rows(["a", "b"], "t.csv")},
            r"t\.csv:0 has the class name 'a', the training rows have numbers",
        ),
        ({"all": labels(0)}, r"1 rows are too few .* from a\.csv:0"),
        ({"all": labels(0, 1)}, "2 rows are too few"),
        (
            {"train": labels(0, 1, 0, 1), "test": rows(torch.tensor([0]), "t.csv", torch.zeros(1, 3))},
            r"one shape; a\.csv:\d has \(2,\), t\.csv:0 \(3,\)",
        ),
    ],
)
def test_unfit_classes_are_refused_with_their_row(parts: dict[str, Rows], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_parts(parts)


def test_targets_that_do_not_vary_are_refused() -> None:
    part = rows(torch.full((5, 1), 0.1, dtype=torch.float64))
    with pytest.raises(ValueError, match="the same target, so there is nothing to learn"):
        split("regression", all=part)
