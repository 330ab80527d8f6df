"""What the hooks of the documentation site make of pages and docstrings."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import typer

from pyro_bbits.cli import app

HOOKS = Path(__file__).parents[2] / "docs" / "hooks"


def load(name: str, needs: str) -> ModuleType:
    """A hook by its file, as the builder loads it."""
    pytest.importorskip(needs)
    spec = importlib.util.spec_from_file_location(name, HOOKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_help_names_every_option_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HOOKS.parents[1]))
    page = load("pages", needs="latex2mathml").on_page_markdown("# Here\n<!-- help of every command -->")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) >= {"train", "summary", "plot", "export"}
    for name, command in commands.items():
        _, _, section = page.partition(f"## `bbits {name}`")
        section, _, _ = section.partition("\n## ")
        for parameter in command.params:
            options = [*parameter.opts, *parameter.secondary_opts] if parameter.opts[0].startswith("-") else ["RUN"]
            assert all(option in section for option in options), (name, options)


def test_equations_become_mathml() -> None:
    hook = load("pages", needs="latex2mathml")
    html = hook.on_page_content('<p>if <span class="arithmatex">\\(z_2 &gt; 0\\)</span></p>')
    assert html.startswith("<p>if <math") and "<msub><mi>z</mi><mn>2</mn></msub>" in html and "arithmatex" not in html
    block = hook.on_page_content('<div class="arithmatex">\\[x\\]</div>')
    assert 'display="block"' in block
    with pytest.raises(ValueError, match="does not know"):
        hook.on_page_content('<div class="arithmatex">\\[\\nosuchcommand\\]</div>')


def test_docstrings_become_markdown() -> None:
    to_markdown = load("docstrings", needs="griffe").to_markdown
    text = "A :class:`~torch.nn.Linear`, see :func:`~pyro_bbits.gates.decide`.\n\n"
    text += ".. math::\n    a = b,\n    c\n\nAt :math:`x`."
    linear, link = "A `Linear`, see ", '<autoref optional identifier="pyro_bbits.gates.decide">`decide`</autoref>.'
    assert to_markdown(text) == f"{linear}{link}\n\n\\[a = b, c\\]\n\nAt \\(x\\)."


def test_every_page_has_its_place_in_the_navigation() -> None:
    settings = (HOOKS.parents[1] / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(HOOKS.parent).as_posix() for path in HOOKS.parent.rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in settings] == []
