"""Libraries that only some data sets need."""

import importlib
from types import ModuleType

__all__ = ["HUB", "require"]

HUB = "pyro-bbits[hub]"  # the extra with datasets and Pillow


def require(name: str, requirement: str = HUB) -> ModuleType:
    """Import a library only when the data set that needs it is asked for.

    Arguments:
        name: The module.
        requirement: What to install for it.

    Raises:
        ImportError: If it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        hint = f'run pip install "{requirement}".'
        raise ImportError(f"reading this data set needs {error.name}; {hint}") from error
