"""The documentation: every public name is in it, and it builds into a site."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import partnewton as pn

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MODULES = ["averaging", "data", "engines", "metrics", "partitions", "plot", "rules"]
MODULES += [
    "cubic",
    "directions",
    "lookback",
    "presets",
    "summary",
    "transform",
    "clipping",
]


def public_objects():
    """Each function and class of the package that is public, under one name."""
    found = {}
    for module in [pn, *(importlib.import_module(f"partnewton.{m}") for m in MODULES)]:
        for name in getattr(module, "__all__", ()):
            x = getattr(module, name)
            if inspect.isclass(x) or inspect.isfunction(x):
                found[f"{x.__module__}.{x.__qualname__}"] = x
    return found


def test_every_module_of_the_package_is_looked_at():
    files = {path.stem for path in (ROOT / "partnewton").glob("[!_]*.py")}
    # What is run, and not called: no one imports names from there.
    assert files - set(MODULES) - {"demo"} == set()


@pytest.mark.parametrize("name", sorted(public_objects()))
def test_public_names_have_a_docstring_with_arguments_and_an_example(name):
    x = public_objects()[name]
    text = inspect.getdoc(x)
    assert text, name
    first = text.split("\n\n")[0]
    assert first.endswith("."), f"{name}: the first paragraph is no sentence."
    if inspect.isfunction(x):
        parameters = [p for p in inspect.signature(x).parameters if p != "self"]
        assert not parameters or "Args:" in text, name
        for parameter in parameters:
            assert re.search(rf"^\s.*\b{parameter}\b.*:", text, re.MULTILINE), (
                f"{name}: {parameter} is not documented."
            )
        assert "Returns:" in text, name
    elif hasattr(x, "_fields"):
        assert "Attributes:" in text, name
        for field in x._fields:
            assert re.search(rf"^\s*{field}:", text, re.MULTILINE), (
                f"{name}: {field} is not documented."
            )


def test_every_public_name_is_in_the_reference():
    reference = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    for entry in reference:
        module, _, last = entry.rpartition(".")
        try:
            importlib.import_module(entry)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), last), entry
    covered = set(reference)
    for name in pn.__all__:
        assert f"partnewton.{name}" in covered, f"{name} is missing in docs/api.md."
    for name, x in public_objects().items():
        modules = {name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)}
        by_face = f"partnewton.{x.__name__}" in covered
        assert modules & covered or by_face, f"{name} is missing in docs/api.md."


def test_every_page_is_in_the_site():
    listed = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.glob("*.md"):
        assert f": {page.name}" in listed, f"{page.name} is missing in mkdocs.yml."


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocstrings", reason='needs pip install "partnewton[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "api" / "index.html").read_text()
    for name in pn.__all__:
        assert f'id="partnewton.{name}"' in page, name
    assert not re.search(r":(func|class|mod|data):", page)
