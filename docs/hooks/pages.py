"""Build hooks of the pages: equations become MathML, which browsers draw without scripts; the command line its help."""

import re
import subprocess
import sys
from typing import Any

from latex2mathml.converter import convert

EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
HELP_MARKER = "<!-- help of every command -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help of the command line where a page asks for it."""
    return markdown.replace(HELP_MARKER, command_help()) if HELP_MARKER in markdown else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Draw the equations of a page."""
    return EQUATION.sub(_mathml, html)


def command_help() -> str:
    """Every command with its arguments and options, as Typer documents them, one heading level down."""
    command = [sys.executable, "-m", "typer", "pyro_bbits.cli", "utils", "docs", "--name", "bbits"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.sub(r"^# .*$", "", text, count=1, flags=re.MULTILINE).replace("```console\n$ ", "```sh\n")


def _mathml(match: re.Match[str]) -> str:
    kind, latex = match.groups()
    for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        latex = latex.replace(entity, sign)
    latex = re.sub(r"\\(log|max|min) +", r"\\\1\\,", latex)  # "log u", not "logu"
    mathml = str(convert(latex.strip(), display="block" if kind == "div" else "inline"))
    if "\\" in mathml:
        raise ValueError(f"the equation {latex!r} has a command that latex2mathml does not know.")
    return mathml
