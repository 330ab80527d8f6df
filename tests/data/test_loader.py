"""The loader gives each row once, in an order that seed and epoch decide, and crops as it says."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_bbits.data.crops import erase
from pyro_bbits.data.loader import TensorLoader


def make_loader(size: int, batch_size: int = 4, shuffle: bool = True, seed: int = 0) -> TensorLoader:
    images = torch.arange(size, dtype=torch.float32).view(-1, 1, 1, 1)
    return TensorLoader(images, torch.arange(size), batch_size=batch_size, shuffle=shuffle, seed=seed)


def order(loader: TensorLoader) -> list[int]:
    return [int(label) for _, labels in loader for label in labels]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (13, 4), (14, 4), (3, 4), (1, 4), (3, 1), (5, 2)])
def test_each_row_comes_once_an_epoch_with_its_label(size: int, batch_size: int, shuffle: bool) -> None:
    loader = make_loader(size, batch_size, shuffle)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert loader.num_data == size
    assert all(torch.equal(images[:, 0, 0, 0], labels.float()) for images, labels in batches)
    assert sorted(label for _, labels in batches for label in labels.tolist()) == list(range(size))


@pytest.mark.parametrize(
    ("size", "batch_size", "shuffle", "sizes"),
    [
        (14, 4, True, [4, 4, 4, 2]),
        (13, 4, True, [4, 4, 5]),
        (13, 4, False, [4, 4, 4, 1]),
        (5, 4, True, [5]),
        (1, 4, True, [1]),
        (3, 1, True, [1, 1, 1]),
    ],
)
def test_a_single_last_row_is_merged_in_training_only(
    size: int, batch_size: int, shuffle: bool, sizes: list[int]
) -> None:
    assert [len(labels) for _, labels in make_loader(size, batch_size, shuffle)] == sizes


def test_rows_keep_their_order_without_shuffling() -> None:
    loader = make_loader(10, shuffle=False)
    assert order(loader) == order(loader) == list(range(10))


def test_order_follows_seed_and_epoch_alone() -> None:
    first, second = make_loader(50, seed=3), make_loader(50, seed=3)
    torch.manual_seed(1)
    epochs = [order(first) for _ in range(3)]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert [order(second) for _ in range(3)] == epochs
    assert torch.equal(torch.get_rng_state(), state)
    assert all(a != b for a, b in itertools.combinations(epochs, 2))


def test_set_epoch_goes_back_to_an_epoch() -> None:
    loader = make_loader(50)
    epochs = [order(loader) for _ in range(3)]
    loader.set_epoch(1)
    assert loader.epoch == 1
    assert [order(loader), order(loader)] == epochs[1:]
    assert loader.epoch == 3


def test_seeds_share_no_epoch() -> None:
    """Seed 1 must not be seed 0 one epoch later."""
    loaders = [make_loader(50, seed=0), make_loader(50, seed=1)]
    zero, one = ([order(loader) for _ in range(3)] for loader in loaders)
    assert all(a != b for a, b in itertools.product(zero, one))


def test_a_pass_left_early_still_counts_as_an_epoch() -> None:
    whole, left = make_loader(50), make_loader(50)
    epochs = [order(whole), order(whole)]
    assert next(iter(left))[1].tolist() == epochs[0][:4]
    assert order(left) == epochs[1]


def random_images(size: int, channels: int = 2, height: int = 5, width: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(size, channels, height, width, generator=generator) + 1


def every_variant(image: Tensor) -> dict[tuple[int, int, int], Tensor]:
    """Cut all 9 x 9 crops and their mirror images by slicing, the slow and obvious way."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 8, width + 8)
    padded[:, 4:-4, 4:-4] = image
    crops = {
        (top, left): padded[:, top : top + height, left : left + width]
        for top, left in itertools.product(range(9), repeat=2)
    }
    mirrored = {(*corner, 1): crop.flip(-1) for corner, crop in crops.items()}
    return mirrored | {(*corner, 0): crop for corner, crop in crops.items()}


def test_augmentation_draws_every_crop_and_flip_of_an_image() -> None:
    image = random_images(1, height=9, width=9)
    loader = TensorLoader(image.expand(4000, -1, -1, -1), torch.zeros(4000), 500, shuffle=True, augment=True)
    augmented = torch.cat([images for images, _ in loader])
    variants = every_variant(image[0])
    counts = [int((augmented == crop).flatten(1).all(dim=1).sum()) for crop in variants.values()]
    assert sum(counts) == 4000  # all variants differ, so each augmented image is exactly one of them
    assert len(counts) == 162
    # Expected 4000 / 162 = 24.7 each; other seeds would break a bound with probability below 1e-4.
    assert min(counts) >= 3 and max(counts) <= 55


def test_without_mirroring_every_crop_is_drawn_and_no_mirrored_one() -> None:
    image = random_images(1, height=9, width=9)
    options: dict[str, Any] = {"shuffle": True, "augment": True}
    loader = TensorLoader(image.expand(2000, -1, -1, -1), torch.zeros(2000), 500, mirror=False, **options)
    augmented = torch.cat([images for images, _ in loader])
    straight = [crop for (_, _, mirrored), crop in every_variant(image[0]).items() if not mirrored]
    counts = [int((augmented == crop).flatten(1).all(dim=1).sum()) for crop in straight]
    # Expected 2000 / 81 = 24.7 each; other seeds would break a bound with probability below 1e-4.
    assert sum(counts) == 2000 and min(counts) >= 3 and max(counts) <= 55


def test_painted_squares_are_drawn_after_all_else() -> None:
    """The images are those without squares but for the squares, whose middles reach every pixel."""
    images = random_images(2000, height=4, width=6) + 1
    options: dict[str, Any] = {"shuffle": True, "augment": True, "pad_value": (-1.0, -2.0)}
    plain, painted = (TensorLoader(images, torch.arange(2000), 500, cutout=cutout, **options) for cutout in (0, 3))
    found = [torch.cat([x for x, _ in loader]) for loader in (plain, painted)]
    drawn = painted.variants(0)
    assert drawn is not None and len(drawn) == 5
    assert torch.equal(found[1], erase(found[0], drawn[3:], 3, torch.tensor([-1.0, -2.0])))
    assert not torch.equal(*found)
    assert set(zip(*drawn[3:].tolist(), strict=True)) == set(itertools.product(range(4), range(6)))


def test_augmentation_follows_seed_and_epoch_alone() -> None:
    images = random_images(20)
    loaders = [TensorLoader(images, torch.arange(20), 8, seed=1, augment=True) for _ in range(2)]
    passes = [[torch.cat([x for x, _ in loader]) for _ in range(2)] for loader in loaders]
    assert torch.equal(passes[0][0], passes[1][0]) and torch.equal(passes[0][1], passes[1][1])
    assert not torch.equal(passes[0][0], passes[0][1])


def test_images_are_not_changed_by_augmenting_or_by_their_user() -> None:
    images = random_images(6)
    before = images.clone()
    for augment in (True, False):
        for batch, _ in TensorLoader(images, torch.arange(6), 4, augment=augment):
            batch.zero_()
    assert torch.equal(images, before)


def test_batches_are_on_the_device() -> None:
    images, labels = torch.zeros(6, 1, 4, 4), torch.arange(6)
    loader = TensorLoader(images, labels, 2, shuffle=True, augment=True, device="meta")
    batches = list(loader)
    assert [x.shape for x, _ in batches] == [(2, 1, 4, 4)] * 3
    assert all(x.device.type == y.device.type == "meta" for x, y in batches)


def test_loader_refuses_what_it_cannot_batch() -> None:
    images, labels = torch.zeros(4, 1, 2, 2), torch.arange(4)
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        TensorLoader(images, labels, batch_size=0)
    with pytest.raises(ValueError, match="got 4 inputs and 3 targets"):
        TensorLoader(images, labels[:3])
    with pytest.raises(ValueError, match="at least one row"):
        TensorLoader(images[:0], labels[:0])
    with pytest.raises(ValueError, match=r"\(N, C, H, W\); got \(4, 4\)"):
        TensorLoader(images.view(4, 4), labels, augment=True)
    with pytest.raises(ValueError, match="epochs count from 0; got -1"):
        TensorLoader(images, labels).set_epoch(-1)


# --- padding, devices and ranks ---------------------------------------------------------------------------------------


def test_augmentation_pads_with_the_value_given() -> None:
    """Images of ones: what is not 1 is padding, and both channels are padded in the same places."""
    loader = TensorLoader(torch.ones(64, 2, 8, 8), torch.arange(64), augment=True, pad_value=(-2.0, 5.0), padding=2)
    ((images, _),) = loader
    assert images[:, 0].unique().tolist() == [-2.0, 1.0] and images[:, 1].unique().tolist() == [1.0, 5.0]
    assert torch.equal(images[:, 0] == -2, images[:, 1] == 5)
    rows = (images[:, 0] != 1).all(2).sum(1)
    assert rows.max() == 2, "at most the padding"


class Copies(TorchDispatchMode):
    """Counts what is copied to the meta device, which stands for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_meta:
            sources = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dim()]
            self.count += any(not leaf.is_meta for leaf in sources)
        return result


@pytest.mark.parametrize("batch_size", [2, 16])
def test_an_epoch_copies_its_order_and_its_random_numbers_once(batch_size: int) -> None:
    images, labels = torch.zeros(16, 3, 8, 8), torch.arange(16)
    loader = TensorLoader(images, labels, batch_size, True, augment=True, device="meta", pad_value=(1.0, 2.0, 3.0))
    with Copies() as copies:
        assert len(list(loader)) == 16 // batch_size
    assert copies.count == 2


@pytest.mark.parametrize("size", [24, 29, 30])
def test_ranks_together_see_the_batches_of_one_process(size: int) -> None:
    """The same rows in the same order, cropped and mirrored alike."""
    images, labels = random_images(size), torch.arange(size)
    whole = TensorLoader(images, labels, 8, shuffle=True, seed=4, augment=True)
    ranks = [TensorLoader(images, labels, 8, True, 4, True, rank=rank, world_size=2) for rank in range(2)]
    for loader in (whole, *ranks):
        loader.set_epoch(3)
    assert [rank.num_data for rank in ranks] == [size, size]
    assert len(ranks[0]) == len(ranks[1]) == len(whole)
    for (x, y), *parts in zip(whole, *ranks, strict=True):
        kept = len(y) - len(y) % 2
        assert len(parts[0][1]) == len(parts[1][1])
        assert torch.equal(torch.cat([part[0] for part in parts]), x[:kept])
        assert torch.equal(torch.cat([part[1] for part in parts]), y[:kept])


def test_features_and_real_targets_are_batched_too() -> None:
    features, targets = torch.rand(5, 3), torch.rand(5, 2)
    x, y = zip(*TensorLoader(features, targets, 2), strict=True)
    assert torch.equal(torch.cat(x), features) and torch.equal(torch.cat(y), targets)


def test_padding_that_does_not_fit_the_images_is_refused() -> None:
    images, labels = torch.zeros(4, 3, 2, 2), torch.arange(4)
    with pytest.raises(ValueError, match="a number for each of the 3 channels; got 1"):
        TensorLoader(images, labels, augment=True, pad_value=(0.0,))
    with pytest.raises(ValueError, match="padding and cutout must be at least 0; got padding=-1, cutout=0"):
        TensorLoader(images, labels, augment=True, padding=-1)
    with pytest.raises(ValueError, match="padding and cutout must be at least 0; got padding=4, cutout=-2"):
        TensorLoader(images, labels, augment=True, cutout=-2)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [False, True])
def test_channels_last_changes_the_memory_and_no_number(augment: bool) -> None:
    images, labels = random_images(11), torch.arange(11)
    usual, last = (
        TensorLoader(images, labels, 4, True, augment=augment, memory_format=memory_format)
        for memory_format in (torch.contiguous_format, torch.channels_last)
    )
    for (x, y), (u, v) in zip(usual, last, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
        assert x.is_contiguous() and u.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rows_padded_once_give_the_same_batches(memory_format: torch.memory_format) -> None:
    images, labels = random_images(11), torch.arange(11)
    options: dict[str, Any] = {"augment": True, "pad_value": (-1.0, 2.0), "padding": 2, "memory_format": memory_format}
    each, once = (TensorLoader(images, labels, 4, True, **options) for _ in range(2))
    once.hold_padded()
    assert torch.equal(once.inputs, images)
    for (x, y), (u, v) in zip(each, once, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_memory_formats_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"channels_last must have shape \(N, C, H, W\); got \(4, 2\)"):
        TensorLoader(torch.zeros(4, 2), torch.arange(4), memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="memory_format must be"):
        TensorLoader(torch.zeros(4, 2), torch.arange(4), memory_format=torch.preserve_format)
