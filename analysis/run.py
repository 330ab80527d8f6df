"""A training run as a folder: settings, history, posterior, weights, configuration, plots."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pyro_bbits.analysis.plots import plot_bit_widths, plot_bops, plot_channels, plot_gates, plot_history
from pyro_bbits.analysis.posterior import GatePosterior
from pyro_bbits.configuration import BitConfiguration
from pyro_bbits.files import (
    PARTIAL,
    remove_leftovers,
    save_tensors_atomically,
    write_atomically,
    write_text_atomically,
)
from pyro_bbits.gates import DecisionRule
from pyro_bbits.inference import History
from pyro_bbits.settings import RunSettings

__all__ = ["RunFolder"]

POSTERIOR_PLOTS: dict[str, Callable[[GatePosterior], Figure]] = {
    "gates": plot_gates,
    "bit_widths": plot_bit_widths,
    "channels": plot_channels,
    "bops": plot_bops,
}
HISTORY_PLOT = "history"
OWN_FILES = (
    "settings.yaml",
    "data.json",
    "history.jsonl",
    "posterior.safetensors",
    "weights.safetensors",
    "bits.json",
    "results.json",
)


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run lie.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def settings_file(self) -> Path:
        """Resolved settings, YAML."""
        return self.path / "settings.yaml"

    @property
    def history_file(self) -> Path:
        """Training history, JSON lines."""
        return self.path / "history.jsonl"

    @property
    def posterior_file(self) -> Path:
        """Gate posterior with ranges and structure, safetensors."""
        return self.path / "posterior.safetensors"

    @property
    def weights_file(self) -> Path:
        """Trained weights under the names of the float network, safetensors."""
        return self.path / "weights.safetensors"

    @property
    def bits_file(self) -> Path:
        """The bit configuration, JSON."""
        return self.path / "bits.json"

    @property
    def results_file(self) -> Path:
        """Final figures, JSON."""
        return self.path / "results.json"

    @property
    def data_file(self) -> Path:
        """What the data are: rows, class names and how inputs were normalized, JSON."""
        return self.path / "data.json"

    @property
    def plots(self) -> Path:
        """Folder of the plots."""
        return self.path / "plots"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, one folder per stage of the training."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.results_file.is_file()

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """A folder that holds a run.

        Raises:
            ValueError: If it does not.
        """
        folder = cls(path)
        if not folder.settings_file.is_file():
            raise ValueError(
                f"{path} holds no run (no {folder.settings_file.name}); give the --output of `bbits train`."
            )
        return folder

    @classmethod
    def check(cls, path: Path, *, overwrite: bool = False) -> None:
        """Raise unless a run may be written to this place.

        Raises:
            ValueError: If the folder holds a run already and is not to be overwritten, or holds something else.
        """
        above = next((p for p in (path, *path.parents) if p.exists()), None)
        if above is not None and not above.is_dir():
            raise ValueError(f"{above} is not a folder; choose another --output.")
        if not path.is_dir() or all(file.name.startswith(PARTIAL) for file in path.iterdir()):
            return
        if not cls(path).settings_file.exists():
            raise ValueError(f"{path} is not empty and holds no run; choose another --output.")
        if not overwrite:
            raise ValueError(
                f"{path} holds a run already; choose another --output, pass --resume to go on with it, or --overwrite "
                "to replace it."
            )
        beside = cls(_beside(path))
        if beside.finished:
            raise ValueError(
                f"{beside.path} holds a complete run that would be lost: --overwrite trains there first. Move it away "
                "(or to the place of the old run)."
            )
        cls.check(beside.path, overwrite=True)

    @classmethod
    def create(cls, path: Path, settings: RunSettings, *, overwrite: bool = False) -> "RunFolder":
        """Start a run in a new folder, or beside an old one that it shall replace: in `path` with `.new` behind it.

        Of an earlier attempt to replace it nothing stays. See :meth:`move_to`.

        Raises:
            ValueError: As :meth:`check` does.
        """
        cls.check(path, overwrite=overwrite)
        folder = cls(path)
        if folder.settings_file.exists():
            folder = cls(_beside(path))
            if folder.path.exists():
                shutil.rmtree(folder.path)
        remove_leftovers(folder.path)
        settings.save(folder.settings_file)
        return folder

    def remove_leftovers(self) -> None:
        """Remove files that a process was writing when it was killed."""
        for place in (self.path, self.plots):
            remove_leftovers(place)

    def move_to(self, path: Path) -> "RunFolder":
        """Put a finished run in the place of an old one; files there that belong to no run are kept.

        Arguments:
            path: The place; nothing happens if the run is there.

        Returns:
            The run in its place.
        """
        path = path.resolve()
        if path == self.path.resolve():
            return self
        old = Path(tempfile.mkdtemp(prefix=f"{path.name}.old-", dir=path.parent))
        old.rmdir()
        os.replace(path, old)
        os.replace(self.path, path)
        for name in OWN_FILES:
            (old / name).unlink(missing_ok=True)
        shutil.rmtree(RunFolder(old).checkpoints, ignore_errors=True)
        for plot in (plot for name in (*POSTERIOR_PLOTS, HISTORY_PLOT) for plot in (old / "plots").glob(f"{name}.*")):
            plot.unlink()
        shutil.copytree(old, path, dirs_exist_ok=True)
        shutil.rmtree(old)
        return RunFolder(path)

    def settings(self) -> RunSettings:
        """Settings of the run."""
        return RunSettings.load(self.settings_file)

    def posterior(self) -> GatePosterior:
        """The gate posterior; a ValueError tells of a run that has not come so far."""
        if not self.posterior_file.exists():
            again = (
                f"; `bbits train --resume --output {self.path}` goes on with it" if self.checkpoints.is_dir() else ""
            )
            raise ValueError(
                f"the run in {self.path} has no posterior: it ended before a quantized network was trained{again}."
            )
        posterior = GatePosterior.load(self.posterior_file)
        self._check_together(posterior)
        return posterior

    def bits(self) -> BitConfiguration | None:
        """The configuration in `bits.json`; None if there is no such file."""
        return BitConfiguration.load(self.bits_file) if self.bits_file.exists() else None

    def _check_together(self, posterior: GatePosterior) -> None:
        """Raise if files of several runs, or of several moments of one, lie in the folder."""
        weights = GatePosterior.saved_with(self.posterior_file)
        if weights is not None and weights != _digest(self.weights_file):
            load_weights(self.weights_file)  # damaged, rather than of another run?
            raise ValueError(self._mixed(self.weights_file))
        bits = self.bits()
        if bits is not None and not any(bits.is_same(posterior.configuration(rule)) for rule in get_args(DecisionRule)):
            raise ValueError(self._mixed(self.bits_file))
        if any(_digest(self.path / name) != digest for name, digest in self.results().get("files", {}).items()):
            raise ValueError(self._mixed(self.results_file))
        if self.history_file.exists() and self.history().tensors not in ((), posterior.structure.layout.tensors):
            raise ValueError(self._mixed(self.history_file))

    def _mixed(self, path: Path) -> str:
        return (
            f"{path} does not belong to {self.posterior_file.name} beside it: the folder mixes files of several runs, "
            "or the run was killed while it saved them (then `bbits train --resume` writes them again)."
        )

    def history(self) -> History:
        """The training history."""
        return History.load(self.history_file)

    def results(self) -> dict[str, Any]:
        """Final figures; empty for a run that was interrupted."""
        if not self.results_file.exists():
            return {}
        try:
            content = json.loads(self.results_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.results_file} cannot be read: {error}.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.results_file} must hold figures by name; got {type(content).__name__}.")
        return content

    def save_network(self, net: nn.Module, posterior: GatePosterior, rule: DecisionRule) -> None:
        """Write weights, posterior and configuration."""
        save_tensors_atomically(self.weights_file, net.state_dict())
        posterior.save(self.posterior_file, _digest(self.weights_file))
        posterior.configuration(rule).save(self.bits_file)

    def digests(self) -> dict[str, str]:
        """SHA-256 of the files that hold the trained network, by name."""
        files = (self.weights_file, self.posterior_file, self.bits_file)
        return {file.name: _digest(file) for file in files if file.exists()}

    def save_results(self, results: Mapping[str, Any]) -> None:
        """Write the final figures; a run that has them is complete."""
        write_text_atomically(self.results_file, json.dumps(dict(results), indent=1) + "\n")

    def save_description(self, description: Mapping[str, Any]) -> None:
        """Write what the data are."""
        write_text_atomically(self.data_file, json.dumps(dict(description), indent=1) + "\n")

    def save_plots(self, target: Path | None = None, kind: str = "png") -> list[Path]:
        """Draw all plots of the run; training curves only if an epoch was completed.

        Arguments:
            target: Folder for them; the run's own by default.
            kind: File type that Matplotlib knows: `png`, `svg`, `pdf`.

        Returns:
            The files.
        """
        _check_folder(target or self.plots)
        posterior, history = self.posterior(), self.history()
        figures = {name: plot(posterior) for name, plot in POSTERIOR_PLOTS.items()}
        if len(history):
            figures[HISTORY_PLOT] = plot_history(history)
        return [_save_figure(figure, (target or self.plots) / f"{name}.{kind}") for name, figure in figures.items()]

    def export(self, target: Path, rule: DecisionRule, *, multiple_of: int = 1) -> list[Path]:
        """Write `bits.json` under a rule, and the weights it belongs to.

        Arguments:
            target: Folder for the files.
            rule: How gates are decided.
            multiple_of: As for :meth:`~pyro_bbits.analysis.GatePosterior.configuration`.

        Returns:
            The files.
        """
        _check_folder(target)
        if (target / self.settings_file.name).exists():
            raise ValueError(f"{target} holds a run; choose another --output, or its files would be replaced.")
        files = [target / self.bits_file.name, target / self.weights_file.name]
        configuration = self.posterior().configuration(rule, multiple_of=multiple_of)
        save_tensors_atomically(files[1], load_weights(self.weights_file))
        configuration.save(files[0])
        return files


def _beside(path: Path) -> Path:
    real = path.resolve() if not path.name or path.is_symlink() else path
    return real.with_name(f"{real.name}.new")


def _check_folder(target: Path) -> None:
    above = next((p for p in (target, *target.parents) if p.exists()), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"{above} is a file; --output must be a folder, in which the files are written.")


def _digest(path: Path) -> str:
    if not path.is_file():
        return "missing"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save_figure(figure: Figure, path: Path) -> Path:
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))
    return path


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors.

    Raises:
        ValueError: If the file is missing or something else.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights {path} cannot be read: {error}.") from error


def pick_device(name: str) -> torch.device:
    """The device a run uses.

    Raises:
        ValueError: If a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device 'cuda' was asked for, but PyTorch sees no GPU; use 'auto' or 'cpu'.")
    if not available or name == "cpu":
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ:
        return torch.device("cuda")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # torchrun: a GPU for each process
    if device.index >= torch.cuda.device_count():
        raise ValueError(f"every process needs a GPU of its own; there are {torch.cuda.device_count()}.")
    torch.cuda.set_device(device)
    return device
