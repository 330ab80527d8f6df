"""A large JPEG is decoded in part only where nobody can tell, and every format is read alike."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_bbits.data import pictures
from pyro_bbits.data.pictures import decode, levels, pixels, random_crop, read_random_crop

pillow = pytest.importorskip("PIL.Image")


def smooth(width: int, height: int) -> Any:
    """Waves of some 200 pixels, which a picture of an eighth of the size still shows."""
    x, y = torch.arange(width)[None, :], torch.arange(height)[:, None]
    channels = [torch.sin(x / a + y / b) * 90 + 128 for a, b in ((45.0, 35.0), (60.0, -40.0), (-35.0, 55.0))]
    return pillow.fromarray(torch.stack(channels, -1).byte().numpy())


def both(path: Path, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random crop read as the loader does, and the same one of the whole picture."""
    read = read_random_crop(path, size, random.Random(seed))
    return tuple(levels(image).int() for image in (read, random_crop(decode(path), size, random.Random(seed))))  # type: ignore[return-value]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Sizes of the pictures that parts are cut from, with the box."""
    found, cut = list[tuple[Any, ...]](), pictures._cut

    def spy(image: Any, box: Any, size: int) -> Any:
        found.append((image.size, box))
        return cut(image, box, size)

    monkeypatch.setattr(pictures, "_cut", spy)
    return found


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path: Path, decoded: list[tuple[Any, ...]]) -> None:
    smooth(1203, 901).save(tmp_path / "a.jpg", quality=95)
    for seed in range(12):
        small, whole = both(tmp_path / "a.jpg", 64, seed)
        assert small.shape == (3, 64, 64)
        assert (small - whole).abs().float().mean() < 2, "levels of 256"
    sizes = {size for size, _ in decoded[::2]}
    assert sizes <= {(602, 451), (301, 226), (151, 113), (1203, 901)} and len(sizes) >= 2
    for (width, height), (left, top, right, bottom) in decoded[::2]:
        assert min(right - left, bottom - top) >= 64 or (width, height) == (1203, 901)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_what_is_not_large_is_decoded_whole(tmp_path: Path, suffix: str) -> None:
    smooth(120, 90).save(tmp_path / f"a{suffix}")
    for seed in range(10):
        read, whole = both(tmp_path / f"a{suffix}", 64, seed)
        assert torch.equal(read, whole)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpegs_become_rgb_too(tmp_path: Path, mode: str) -> None:
    smooth(640, 480).convert(mode).save(tmp_path / "a.jpg", quality=95)
    small, whole = both(tmp_path / "a.jpg", 32, 0)
    assert small.shape == (3, 32, 32) and (small - whole).abs().float().mean() < 3


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".gif", ".webp", ".tif", ".ppm", ".jpg"])
def test_a_picture_is_there_after_its_file_is_closed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    smooth(20, 16).save(path)
    with pillow.open(path) as image:
        expected = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.uint8).view(16, 20, 3)
    image = decode(path)
    path.unlink()
    assert torch.equal(pixels(image), expected) and torch.equal(levels(image), expected.movedim(-1, 0))
    assert levels(image).is_contiguous()


def test_a_crop_of_a_broken_file_names_it(tmp_path: Path) -> None:
    smooth(640, 480).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"a\.jpg is not a picture that can be decoded: .*truncated"):
        read_random_crop(tmp_path / "a.jpg", 32, random.Random(0))


def test_more_than_8_bits_are_refused_for_a_crop_too(tmp_path: Path) -> None:
    pillow.new("I;16", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has more than 8 bits per channel"):
        read_random_crop(tmp_path / "a.png", 8, random.Random(0))
