"""An extension of the site: references in docstrings become links."""

import re

import griffe


class Roles(griffe.Extension):
    """Convert the references of docstrings, :func:`~a.b`, to Markdown."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Convert one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r":(?:func|class|data|mod|meth):`(~?)([\w.]+)`",
                lambda found: _reference(*found.groups()),
                obj.docstring.value,
            )


def _reference(short: str, name: str) -> str:
    shown = name.rpartition(".")[2] if short else name
    if name.startswith("partnewton."):
        return f"[`{shown}`][{name}]"
    return f"`{shown}`"
