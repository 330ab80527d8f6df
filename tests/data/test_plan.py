"""The parts of all ranks are the batches of one process."""

import itertools

import pytest
import torch

from pyro_bbits.data.plan import EpochPlan, random_state

CASES = [
    (num_data, world_size, share, shuffle)
    for num_data, world_size, share, shuffle in itertools.product(
        (1, 2, 5, 12, 13, 14, 15, 16, 17, 23), (1, 2, 3), (1, 2, 4), (False, True)
    )
    if num_data >= world_size
]


def plans(num_data: int, world_size: int, share: int, shuffle: bool) -> list[EpochPlan]:
    batch = share * world_size
    return [EpochPlan(num_data, batch, shuffle, seed=3, rank=r, world_size=world_size) for r in range(world_size)]


@pytest.mark.parametrize(("num_data", "world_size", "share", "shuffle"), CASES)
def test_parts_of_all_ranks_are_the_batches_of_one_process(
    num_data: int, world_size: int, share: int, shuffle: bool
) -> None:
    """Every row comes at most once and in order; what is left out is less than a row per rank, and only in training."""
    ranks = plans(num_data, world_size, share, shuffle)
    (order,) = {tuple(plan.order(5).tolist()) for plan in ranks}
    batches: list[list[int]] = []
    for step in itertools.zip_longest(*(plan.parts for plan in ranks), fillvalue=(0, 0)):
        batches.append([row for low, high in step for row in order[low:high]])
    seen = [row for batch in batches for row in batch]
    assert seen == list(order[: len(seen)])
    missing = num_data - len(seen)
    assert missing == (num_data % (share * world_size) % world_size if shuffle else 0)
    assert all(len(batch) == share * world_size for batch in batches[:-1])


@pytest.mark.parametrize(("num_data", "world_size", "share", "shuffle"), CASES)
def test_ranks_train_on_parts_of_one_size_and_never_on_a_single_row(
    num_data: int, world_size: int, share: int, shuffle: bool
) -> None:
    sizes = [[high - low for low, high in plan.parts] for plan in plans(num_data, world_size, share, shuffle)]
    if shuffle:
        assert all(other == sizes[0] for other in sizes)
        if share > 1 and num_data >= 2 * world_size:
            assert min(sizes[0]) >= 2
    else:
        for step in itertools.zip_longest(*sizes, fillvalue=0):
            assert max(step) - min(step) <= 1


def test_the_examples_of_the_tail_by_hand() -> None:
    def sizes(num_data: int, shuffle: bool) -> list[list[int]]:
        return [[high - low for low, high in plan.parts] for plan in plans(num_data, 2, 4, shuffle)]

    assert sizes(19, shuffle=True) == [[4, 5], [4, 5]], "a row left out, two merged into the batch before"
    assert sizes(21, shuffle=True) == [[4, 4, 2], [4, 4, 2]], "a row left out"
    assert sizes(21, shuffle=False) == [[4, 4, 3], [4, 4, 2]]
    assert sizes(17, shuffle=False) == [[4, 4, 1], [4, 4]]


def test_an_order_is_of_its_seed_and_epoch() -> None:
    orders = [EpochPlan(40, 8, True, seed).order(epoch) for seed, epoch in itertools.product(range(3), repeat=2)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(orders, 2))
    assert torch.equal(EpochPlan(40, 10, True, 2, rank=1, world_size=5).order(2), orders[-1])
    assert EpochPlan(4, 2).order(7).tolist() == [0, 1, 2, 3]


def test_random_states_tell_all_parts_apart() -> None:
    parts = [(0, 1), (1, 0), (0, 11), (0, 1, 1), (0, 1, "picture", 0), (0, 1, "augmentation")]
    assert len({random_state(*part) for part in parts}) == len(parts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "at least one row"),
        ((4, 0), "batch_size must be at least 1; got 0"),
        ((9, 4, False, 0, 2, 2), r"rank must lie in \[0, world_size\); got rank 2 of world_size 2"),
        ((9, 4, False, 0, -1, 2), "got rank -1"),
        ((9, 4, False, 0, 0, 0), "world_size 0"),
        ((9, 4, False, 0, 0, 3), "rows of all 3 processes and must be a multiple .* got 4"),
        ((2, 3, False, 0, 0, 3), "3 processes need at least a row each; got 2"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochPlan(*arguments)  # type: ignore[arg-type]
