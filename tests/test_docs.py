"""The documentation: it is complete, what it says runs, and it builds into a site."""

import importlib
import inspect
import pkgutil
import re

import jax
import numpy as np
import pytest
from support import documents
from support.selection import some

import partnewton as pn

ROOT = documents.ROOT
DOCS = ROOT / "docs"
# Their docstrings are the reference. Of the demonstration only the data sets are in it.
MODULES = [
    module.name
    for module in pkgutil.iter_modules(pn.__path__)
    if not module.name.startswith("_") and module.name != "demo"
]
MODULES += ["demo.data"]


def relative(page):
    return str(page.relative_to(ROOT))


# The sections of two pages are programs of their own: test_libraries.py.
PROGRAMS = [
    page
    for page in documents.pages()
    if documents.program(page).strip() and page.stem not in ("libraries", "logging")
]
QUICK = [page for page in PROGRAMS if page.stem not in ("recipes", "full_batch")]


def public_objects():
    """Each function and class of the package that is public, under one name."""
    found = {}
    for module in [pn, *(importlib.import_module(f"partnewton.{m}") for m in MODULES)]:
        for name in getattr(module, "__all__", ()):
            x = getattr(module, name)
            if inspect.isclass(x) or inspect.isfunction(x):
                found[f"{x.__module__}.{x.__qualname__}"] = x
    return found


# --- the pages ------------------------------------------------------------------------


@pytest.mark.usefixtures("registry_is_restored")
@pytest.mark.parametrize("page", some(PROGRAMS, default=QUICK), ids=relative)
def test_the_blocks_of_a_page_run_from_top_to_bottom(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = documents.run(page)
    if page.stem == "recipes":
        for name in ("nnx_losses", "linen_losses"):
            losses = namespace[name]
            assert np.all(np.isfinite(losses)), name
            assert losses[-1] < 0.5 * losses[0], name
        state = namespace["linen_state"]
        assert state.step == 50
        assert set(pn.learning_rates(state.opt_state)) == {
            "layers_0/bias",
            "layers_0/kernel",
            "layers_2/bias",
            "layers_2/kernel",
        }
    if page.stem == "README":
        assert namespace["loss"](namespace["params"]) < 1e-2 * np.log(10)
    assert not jax.config.jax_enable_x64


def test_the_two_commands_are_at_the_top():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    top = readme.split("\n## ")[0]
    for command in (
        'pip install -e ".[demo]" && python -m partnewton',
        'pip install -e ".[test]" && pytest',
    ):
        assert command in top


@pytest.mark.parametrize("page", documents.pages(), ids=relative)
def test_links_to_files_resolve(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not re.match(r"https?:", target):
            assert (page.parent / target).exists(), target


def test_images_are_small():
    for picture in DOCS.rglob("*.png"):
        assert picture.stat().st_size < 200_000, picture


# --- the reference --------------------------------------------------------------------


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
        if inspect.signature(x).return_annotation is not None:
            assert "Returns:" in text, name
        assert ">>> " in text, name
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
        modules = {name.rsplit(".", n)[0] for n in range(name.count(".") + 1)}
        by_face = f"partnewton.{x.__name__}" in covered
        assert modules & covered or by_face, f"{name} is missing in docs/api.md."
