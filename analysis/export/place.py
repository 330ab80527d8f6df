"""Where exported files go: checked before any work, filled at once."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyro_bbits.files import PARTIAL, write_atomically

__all__ = ["check_place", "scratch"]


def check_place(path: str | Path) -> Path:
    """A file that can be written.

    Raises:
        ValueError: If it is a folder, or its folder cannot be made or written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; an export is written to a file.")
    above = next(place for place in path.absolute().parents if place.exists())
    if not above.is_dir():
        raise ValueError(f"{path} cannot be written: {above} is a file, not a folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {above} may not be written to.")
    return path


@contextmanager
def scratch(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Files to fill in a folder of their own; they take their places together, if nothing is raised."""
    folder = targets[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as name:
        drafts = tuple(Path(name) / target.name for target in targets)
        yield drafts
        for draft, target in zip(drafts, targets, strict=True):
            write_atomically(target, lambda temporary, draft=draft: os.replace(draft, temporary))  # type: ignore[misc]
