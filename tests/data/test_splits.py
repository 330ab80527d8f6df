"""Splits refuse what a network could not train on, and validation rows are taken reproducibly."""

import pytest
import torch
from torch import Tensor

from pyro_bbits.data.scaling import Scaling
from pyro_bbits.data.splits import DataSplits, Split, validation_split


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32)


def whole(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def numbered(size: int) -> tuple[Tensor, Tensor]:
    """Rows that can be recognized: image `i` is filled with `i`, and so is its label."""
    return torch.arange(size, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2), torch.arange(size)


def test_split_keeps_its_rows_and_counts_them() -> None:
    images, labels = numbered(3)
    split = Split(images, labels)
    assert len(split) == 3
    assert split.inputs is images and split.targets is labels
    assert repr(split) == "Split(inputs=(3, 1, 2, 2), targets=(3,))"


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (zeros(2, 8, 8), whole(2), r"inputs must be a 2-dimensional torch.float32 .* or a 4-dim.* shape \(2, 8, 8\)"),
        (zeros(2, 1, 8, 8).byte(), whole(2), "inputs must be .* a 4-dimensional .* of torch.uint8"),
        (zeros(2, 1, 8, 8), zeros(2), "targets must be a 1-dimensional torch.int64 .* of torch.float32"),
        (zeros(2, 1, 8, 8), whole(3), "got 2 inputs and 3 targets"),
        (zeros(0, 1, 8, 8), whole(0), "at least one input"),
        (zeros(2, 1, 0, 8), whole(2), "at least one input"),
    ],
)
def test_split_refuses_rows_of_another_form(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Split(images, labels)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_split_names_the_first_image_that_is_not_finite(value: float) -> None:
    images = zeros(6, 2, 3, 3)
    images[4, 1, 2, 0] = value
    images[5, 0, 0, 0] = value
    with pytest.raises(ValueError, match="input 4 is the first that holds NaN or infinity"):
        Split(images, whole(6))


def make_splits(num_classes: int = 3, test: Split | None = None) -> DataSplits:
    train, validation = Split(*numbered(3)), Split(*numbered(2))
    return DataSplits("numbers", train, validation, test or Split(*numbered(1)), num_classes, augment=False)


def test_data_splits_know_the_input_shape() -> None:
    rows = Split(zeros(2, 3, 4, 5), whole(2))
    assert DataSplits("zeros", rows, rows, rows, 1, augment=True).input_shape == (3, 4, 5)


def test_data_splits_refuse_labels_out_of_range() -> None:
    assert make_splits(3).num_classes == 3
    with pytest.raises(ValueError, match=r"\[0, 2\); label 2 of the train split is 2"):
        make_splits(2)
    with pytest.raises(ValueError, match=r"\[0, 3\); label 1 of the test split is -1"):
        make_splits(3, Split(numbered(2)[0], torch.tensor([0, -1])))


def test_data_splits_refuse_images_of_two_shapes() -> None:
    other = Split(zeros(1, 1, 3, 3), whole(1))
    with pytest.raises(ValueError, match=r"train has \(1, 2, 2\), test \(1, 3, 3\)"):
        make_splits(test=other)


def test_a_regression_has_real_targets_of_one_width() -> None:
    one, two = (Split(zeros(4, 3), zeros(4, columns)) for columns in (1, 2))
    assert DataSplits("reals", two, two, two, None).num_outputs == 2
    with pytest.raises(ValueError, match=r"must be float32 \(N, 1\) in all splits; test has torch.float32 \(4, 2\)"):
        DataSplits("reals", one, one, two, None)
    with pytest.raises(ValueError, match="needs int64 labels; train has torch"):
        DataSplits("reals", one, one, one, 2)
    labels = Split(zeros(4, 3), whole(4))
    with pytest.raises(ValueError, match=r"is a regression: .* train has torch\.int64"):
        DataSplits("labels", labels, labels, labels, None)


def test_loaders_give_each_split_to_those_who_need_it() -> None:
    """Training rows shuffled and shared by the ranks, held-out rows in order and whole unless they are shared too."""
    train, held = Split(*numbered(12)), Split(*numbered(5))
    data = DataSplits("numbers", train, held, held, 12)
    whole_epoch = [y.tolist() for _, y in data.loaders(4, seed=2).train]
    rows = [row for batch in whole_epoch for row in batch]
    assert sorted(rows) == list(range(12)) != rows
    ranks = [data.loaders(4, seed=2, rank=rank, world_size=2) for rank in range(2)]
    parts = [[y.tolist() for _, y in rank.train] for rank in ranks]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole_epoch
    for rank in ranks:
        assert [y.tolist() for _, y in rank.test] == [list(range(5))]
    shared = [data.loaders(4, rank=rank, world_size=2, share_evaluation=True) for rank in range(2)]
    assert [y.tolist() for rank in shared for _, y in rank.validation] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("shape", "rows"), [((3, 64, 64), 512), ((3, 32, 32), 512), ((1, 28, 28), 2006), ((1, 8, 8), 2048), ((3,), 2048)]
)
def test_small_inputs_are_evaluated_in_larger_batches(shape: tuple[int, ...], rows: int) -> None:
    one, held_out = (Split(torch.zeros(n, *shape), torch.zeros(n, dtype=torch.int64)) for n in (2, 2100))
    loaders = DataSplits("zeros", one, held_out, held_out, 2).loaders(2)
    for loader in (loaders.validation, loaders.test):
        sizes = [len(y) for _, y in loader]
        assert sizes[0] == rows and sum(sizes) == 2100


def test_training_images_are_padded_with_black_by_an_eighth() -> None:
    split = Split(zeros(50, 1, 16, 16) + 1, whole(50))
    data = DataSplits("ones", split, split, split, 1, augment=True, input_scaling=Scaling((0.5,), (0.25,)))
    train, _, test = (next(iter(loader))[0] for loader in data.loaders(50))
    assert train.unique().tolist() == [-2.0, 1.0] and test.unique().tolist() == [1.0]
    assert (train == -2).all(3).sum(2).max() == 2, "rows of padding"


@pytest.mark.parametrize(("size", "fraction", "expected"), [(50, 0.1, 5), (50, 0.99, 49), (3, 0.01, 1), (2, 0.9, 1)])
def test_validation_and_training_rows_are_disjoint_and_cover_all(size: int, fraction: float, expected: int) -> None:
    train, validation = validation_split(*numbered(size), fraction, seed=0)
    assert len(validation) == expected
    assert sorted(train.targets.tolist() + validation.targets.tolist()) == list(range(size))
    for part in (train, validation):
        assert torch.equal(part.inputs[:, 0, 0, 0], part.targets.float())
        assert part.targets.tolist() == sorted(part.targets.tolist())


def test_validation_rows_follow_the_seed_alone() -> None:
    torch.manual_seed(1)
    _, first = validation_split(*numbered(100), 0.2, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    _, again = validation_split(*numbered(100), 0.2, seed=5)
    _, other = validation_split(*numbered(100), 0.2, seed=6)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.targets, other.targets)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_validation_fraction_must_lie_between_0_and_1(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"strictly between 0 and 1; got {fraction}"):
        validation_split(*numbered(10), fraction, seed=0)


def test_validation_split_needs_two_rows() -> None:
    with pytest.raises(ValueError, match="at least two rows"):
        validation_split(*numbered(1), 0.5, seed=0)
