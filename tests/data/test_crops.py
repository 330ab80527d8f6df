"""A crop is the shifted image with its border, mirrored where asked for, in one gather."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pyro_bbits.data.crops import AUGMENTATIONS, augmentation, cut, erase, pad


def random_images(size: int, channels: int = 2, height: int = 5, width: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(size, channels, height, width, generator=generator) + 1


def crop(images: Tensor, corners: list[tuple[int, int]], flipped: list[bool] | None = None) -> Tensor:
    numbers = torch.arange(len(images))
    return cut(pad(images), numbers, torch.tensor(corners).T, torch.tensor(flipped or [False] * len(images)))


def test_padding_surrounds_the_image_and_has_the_value_of_its_channel() -> None:
    images = random_images(2)
    padded = pad(images, 3, torch.tensor([-3.0, 0.5]))
    assert padded.shape == (2, 11, 13, 2) and padded.is_contiguous()
    expected = torch.tensor([-3.0, 0.5]).expand(2, 11, 13, 2).clone()
    expected[:, 3:8, 3:10] = images.permute(0, 2, 3, 1)
    assert torch.equal(padded, expected)
    assert pad(images, 0).movedim(-1, 1).equal(images)


def test_centred_crop_is_the_image() -> None:
    images = random_images(3)
    assert torch.equal(crop(images, [(4, 4)] * 3), images)


def test_crop_is_a_shift_filled_with_zeros() -> None:
    images = random_images(2)
    crops = crop(images, [(4 - 2, 4 + 3), (4, 4 - 1)])
    assert torch.equal(crops[0, :, 2:, :-3], images[0, :, :-2, 3:])
    assert crops[0].count_nonzero() == 2 * 3 * 4
    assert torch.equal(crops[1, :, :, 1:], images[1, :, :, :-1])
    assert crops[1].count_nonzero() == 2 * 5 * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_every_crop_is_the_slice_of_the_padded_image_or_its_mirror_image(dtype: torch.dtype) -> None:
    """All 5 x 5 corners, mirrored and not, of images in any order and more than once."""
    images = (random_images(3) * 100).to(dtype)
    padded = torch.zeros(3, 2, 9, 11, dtype=dtype)
    padded[:, :, 2:-2, 2:-2] = images
    cases = list(itertools.product([2, 0, 1], range(5), range(5), [False, True]))
    number, top, left, flipped = (torch.tensor(values) for values in zip(*cases, strict=True))
    crops = cut(pad(images, 2), number, torch.stack([top, left]), flipped, 2)
    for found, (n, t, l, f) in zip(crops, cases, strict=True):
        expected = padded[n, :, t : t + 5, l : l + 7]
        assert torch.equal(found, expected.flip(-1) if f else expected)


def test_crops_lie_in_memory_channels_last() -> None:
    crops = crop(random_images(6, channels=3), [(0, 8)] * 6, [True] * 6)
    assert crops.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [1, 2, 3, 20])
@pytest.mark.parametrize("value", [None, (-1.0, 0.5)])
def test_the_square_around_each_pixel_is_painted_over(size: int, value: tuple[float, ...] | None) -> None:
    """All middles, those at the edge too, against a slice of an image with room around it."""
    centres = list(itertools.product(range(5), range(7)))
    images = random_images(1).expand(len(centres), -1, -1, -1)
    paint = torch.zeros(2) if value is None else torch.tensor(value)
    found = erase(images, torch.tensor(centres).T, size, None if value is None else paint)
    for image, (row, column) in zip(found, centres, strict=True):
        roomy = torch.zeros(2, 45, 47)
        roomy[:, 20:25, 20:27] = images[0]
        top, left = 20 + row - size // 2, 20 + column - size // 2
        roomy[:, top : top + size, left : left + size] = paint[:, None, None]
        assert torch.equal(image, roomy[:, 20:25, 20:27])


def test_names_of_augmentations_and_their_fields_agree() -> None:
    for name, fields in AUGMENTATIONS.items():
        assert augmentation(SimpleNamespace(**{"mirror": True} | dict(fields))) == name
