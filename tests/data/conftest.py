"""Pictures that a test makes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

MakePictures = Callable[..., Path]


def picture(number: int, size: tuple[int, int], mode: str = "RGB") -> Any:
    """Noise that is another for each number, of `size` (width, height)."""
    pillow = pytest.importorskip("PIL.Image")
    channels = len(mode) if mode != "1" else 1
    generator = torch.Generator().manual_seed(number)
    levels = torch.randint(256, (size[1], size[0], channels), generator=generator, dtype=torch.uint8)
    return pillow.fromarray(levels.squeeze(-1).numpy(), mode if mode != "1" else None).convert(mode)


@pytest.fixture
def make_pictures(tmp_path: Path) -> MakePictures:
    """Makes `root/FOLDER/000.png`, ... for each folder and count; every picture is another one."""

    def make(counts: Mapping[str, int], size: tuple[int, int] = (6, 5), mode: str = "RGB", root: str = "own") -> Path:
        number = 0
        for folder, count in counts.items():
            (tmp_path / root / folder).mkdir(parents=True)
            for i in range(count):
                picture(number := number + 1, size, mode).save(tmp_path / root / folder / f"{i:03}.png")
        return tmp_path / root

    return make
