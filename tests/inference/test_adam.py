"""Adam in pieces is Adam."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam

from pyro_bbits.inference import adam
from pyro_bbits.inference.adam import SpreadAdam, piece_length

SHAPES = ((3,), (700, 300), (0, 4), (4097,), (64, 32, 5, 5), (24, 12, 5, 5))


def parameters() -> list[nn.Parameter]:
    """Of several sizes; one channels last, one with gaps, one that gets no gradient."""
    torch.manual_seed(0)
    made = [torch.randn(shape) for shape in SHAPES]
    made[4] = made[4].contiguous(memory_format=torch.channels_last)
    made += [torch.randn(200, 100)[:, ::2], torch.randn(5000)]
    return [nn.Parameter(values) for values in made]


def take_steps(optimizer: Adam, mine: list[nn.Parameter], count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in mine[:-1]:
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()


@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}])
def test_pieces_are_updated_as_the_whole(decay: dict[str, Any]) -> None:
    mine, expected = parameters(), parameters()
    ours = SpreadAdam(mine, lr=1e-2, **decay)
    theirs = Adam(expected, lr=1e-2, fused=True, **decay)
    take_steps(ours, mine, 4)
    take_steps(theirs, expected, 4)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert not mine[4].is_contiguous() and mine[4].stride() == expected[4].stride()
    for a, b in zip(mine[:-1], expected[:-1], strict=True):
        assert ours.state[a]["step"] == theirs.state[b]["step"] == 4
    assert mine[-1] not in ours.state


def handed_over(optimizer: SpreadAdam) -> list[list[torch.Tensor]]:
    lists: list[list[torch.Tensor]] = [[] for _ in range(6)]
    optimizer._init_group(optimizer.param_groups[0], *lists)
    return lists


def test_tensors_are_handed_over_in_pieces_of_their_memory() -> None:
    mine = parameters()
    optimizer = SpreadAdam(mine, lr=1e-2)
    take_steps(optimizer, mine, 1)
    lists = handed_over(optimizer)
    length = piece_length(sum(p.numel() for p in mine[:-1]))
    whole = 10_000  # the one with gaps
    sizes = [part.numel() for part in lists[0]]
    assert length == 12_288 and sizes.count(length) == 21
    assert sum(sizes) == sum(p.numel() for p in mine[:-1]) and whole in sizes and max(sizes) == length
    assert {len(one) for one in lists if one} == {len(sizes)}
    places = {p.untyped_storage().data_ptr() for p in mine if p.numel()}
    assert {part.untyped_storage().data_ptr() for part in lists[0] if part.numel()} < places
    assert len({step.data_ptr() for step in lists[5]}) == len(sizes)


def test_a_network_that_fills_the_device_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = parameters()
    optimizer = SpreadAdam(mine, lr=1e-2)
    take_steps(optimizer, mine, 1)
    monkeypatch.setattr(adam, "CHUNK", 12_288)
    assert [part.numel() for part in handed_over(optimizer)[0]] == [p.numel() for p in mine[:-1]]


def test_tensors_that_lie_in_memory_in_another_order_are_not_cut() -> None:
    """Their pieces would not hold the same numbers."""
    values, step = torch.zeros(64, 32, 5, 5), torch.zeros(())
    gradient = torch.zeros_like(values, memory_format=torch.channels_last)
    assert [len(part) for part in adam._pieces([values, gradient], step, 4096)] == [1, 1, 1]
    assert [len(part) for part in adam._pieces([gradient, gradient], step, 4096)] == [13, 13, 13]


def test_state_goes_from_one_class_to_the_other() -> None:
    mine, expected = parameters(), parameters()
    first = SpreadAdam(mine, lr=1e-2)
    take_steps(first, mine, 2)
    with torch.no_grad():
        for a, b in zip(mine, expected, strict=True):
            b.copy_(a)
    second = Adam(expected, lr=1e-2, fused=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(first, mine, 2)
    take_steps(second, expected, 2)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
