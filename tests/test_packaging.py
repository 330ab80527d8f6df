"""The four rooms are installed as one package, and are imported by no other name."""

import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "inference", "analysis")


def packages_on_disk() -> set[str]:
    """Name every folder with Python files as it is imported; rglob does not follow the links."""
    files = (file for room in ("pyro_bbits", *ROOMS) for file in (ROOT / room).rglob("*.py"))
    dotted = {".".join(file.parent.relative_to(ROOT).parts) for file in files}
    return {name if name.split(".")[0] == "pyro_bbits" else f"pyro_bbits.{name}" for name in dotted}


def test_package_list_names_every_folder() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(settings["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_one_top_level_name_is_installed() -> None:
    top_level = distribution("pyro-bbits").read_text("top_level.txt")
    assert top_level is not None
    assert top_level.split() == ["pyro_bbits"]


def test_rooms_are_never_imported_by_their_bare_names() -> None:
    assert not set(ROOMS) & set(sys.modules)
