"""Every test, and every docstring example, starts from the same state and leaves none behind."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pyro
import pytest
import torch

# Workers run side by side: threads of their own would only get in each other's way.
torch.set_num_threads(1)


class FreshState:
    """A plugin, since the fixtures of a conftest file do not reach the docstrings in pyro_bbits/."""

    @pytest.fixture(autouse=True)
    def fresh_state(self) -> Iterator[None]:
        """Seed, empty the parameter store; afterwards put Pyro's settings, validation among them, back."""
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        with pyro.settings.context(**pyro.settings.get()):
            yield

    @pytest.hookimpl
    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Look for no examples in kernels that cannot be imported; None leaves the choice to others."""
        kernel = collection_path.parent.name == "kernels" and collection_path.name.startswith("triton_")
        return True if kernel and find_spec("triton") is None else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(FreshState(), "fresh-state")
