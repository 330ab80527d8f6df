"""A training run as a folder: settings, history, posterior, weights, configuration, plots."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pyro_bbits.analysis.plots import plot_bit_widths, plot_bops, plot_channels, plot_gates, plot_history
from pyro_bbits.analysis.posterior import GatePosterior
from pyro_bbits.files import save_tensors_atomically, write_atomically, write_text_atomically
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
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is not a folder; choose another --output.")
        if not path.is_dir() or not any(path.iterdir()):
            return
        if not cls(path).settings_file.exists():
            raise ValueError(f"{path} is not empty and holds no run; choose another --output.")
        if not overwrite:
            raise ValueError(f"{path} holds a run already; choose another --output, or pass --overwrite to replace it.")

    @classmethod
    def create(cls, path: Path, settings: RunSettings, *, overwrite: bool = False) -> "RunFolder":
        """Start a run in a new folder, or in an old one, whose files and plots are removed then.

        Raises:
            ValueError: As :meth:`check` does.
        """
        cls.check(path, overwrite=overwrite)
        folder = cls(path)
        for old in (
            folder.history_file,
            folder.posterior_file,
            folder.weights_file,
            folder.bits_file,
            folder.results_file,
            folder.data_file,
            *(plot for name in (*POSTERIOR_PLOTS, HISTORY_PLOT) for plot in folder.plots.glob(f"{name}.*")),
        ):
            old.unlink(missing_ok=True)
        settings.save(folder.settings_file)
        return folder

    def settings(self) -> RunSettings:
        """Settings of the run."""
        return RunSettings.load(self.settings_file)

    def posterior(self) -> GatePosterior:
        """The gate posterior; a ValueError tells of a run that has not come so far."""
        if not self.posterior_file.exists():
            raise ValueError(
                f"the run in {self.path} has no posterior: it ended before a quantized network was trained."
            )
        return GatePosterior.load(self.posterior_file)

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
        posterior.save(self.posterior_file)
        posterior.configuration(rule).save(self.bits_file)

    def save_results(self, results: Mapping[str, Any]) -> None:
        """Write the final figures."""
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
        posterior, history = self.posterior(), self.history()
        figures = {name: plot(posterior) for name, plot in POSTERIOR_PLOTS.items()}
        if len(history):
            figures[HISTORY_PLOT] = plot_history(history)
        return [_save_figure(figure, (target or self.plots) / f"{name}.{kind}") for name, figure in figures.items()]

    def export(self, target: Path, rule: DecisionRule) -> list[Path]:
        """Write `bits.json` under a rule, and the weights it belongs to.

        Returns:
            The files.
        """
        files = [target / self.bits_file.name, target / self.weights_file.name]
        configuration = self.posterior().configuration(rule)
        save_tensors_atomically(files[1], load_weights(self.weights_file))
        configuration.save(files[0])
        return files


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
    return torch.device("cuda" if available and name != "cpu" else "cpu")
