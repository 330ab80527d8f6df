"""Griffe extension: what docstrings write in reStructuredText (roles, equations) in the Markdown of these pages."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|attr|mod):`(~?)([^`]+)`")
MATH = re.compile(r":math:`([^`]+)`")
BLOCK = re.compile(r"^( *)\.\. math::\n((?:\1 +.*\n|\n)+)", re.MULTILINE)
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
OWN = "pyro_bbits."


def to_markdown(text: str) -> str:
    """Rewrite roles as links within these pages, or as code where they lead elsewhere, and equations for arithmatex."""
    text = EXAMPLE.sub(r"\1Examples:", BLOCK.sub(_block, text + "\n"))  # the plural is the section of doctests
    return ROLE.sub(_link, MATH.sub(r"\\(\1\\)", text)).rstrip("\n")


def _block(match: re.Match[str]) -> str:
    indent, body = match.groups()
    latex = " ".join(body.split())
    return f"{indent}\\[{latex}\\]\n\n"


def _link(match: re.Match[str]) -> str:
    short, path = match.groups()
    shown = path.rsplit(".", 1)[-1] if short else path
    if not path.startswith(OWN):
        return f"`{shown}`"
    return f'<autoref optional identifier="{path}">`{shown}`</autoref>'  # plain where these pages do not have it


class MarkdownDocstrings(griffe.Extension):
    """Rewrites every docstring once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
