"""Atomic writes: a file is complete under its final name, or not there."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["PARTIAL", "remove_leftovers", "save_tensors_atomically", "write_atomically", "write_text_atomically"]

PARTIAL = ".partial-"
"""How the names of temporary files begin."""


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there.

    The content is on the disk before the name is, so a killed process or a power cut leaves the old file.

    Arguments:
        path: The final name; folders on the way are made.
        write: Writes the content to the path it is given.

    Raises:
        OSError: If the folder cannot be made or written to, or the disk is full; the old file stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{PARTIAL}{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OSError(f"{path} cannot be written: {reason}; what was there before is kept.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Remove the temporary files that a process left in a folder when it was killed while writing.

    Returns:
        What was removed.
    """
    leftovers = sorted(Path(folder).glob(f"{PARTIAL}*"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_tensors_atomically(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors atomically; tensors that share memory are written one by one."""
    separate = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(separate, temporary, dict(metadata or {})))
