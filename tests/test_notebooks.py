"""Notebooks: they run from top to bottom, and what is stored is complete and small."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_seven_notebooks():
    assert [path.stem for path in PATHS] == [
        "flax_linen",
        "flax_nnx",
        "looking_at_interactions",
        "newton_from_cauchy_to_full",
        "pinn",
        "quickstart",
        "transformer",
    ]


# Constants of the notebooks that take long, and values with which they do not.
SHORTER = {
    "looking_at_interactions": ("STEPS = 150", "STEPS = 30"),
    "quickstart": ("steps=600", "steps=100"),
    "pinn": ("SECONDS = 90", "SECONDS = 1"),
    "transformer": ("STEPS = 200", "STEPS = 30"),
}


def shortened(notebook, constant, shorter):
    (cell,) = (cell for cell in code_cells(notebook) if constant in cell.source)
    cell.source = cell.source.replace(constant, shorter)


# zmq and the loop of the kernel's client are not ours.
@pytest.mark.filterwarnings("default")
@pytest.mark.slow
@each_notebook
def test_notebook_runs_from_top_to_bottom(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "error:::partnewton")
    notebook = read(path)
    if path.stem in SHORTER:
        shortened(notebook, *SHORTER[path.stem])
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    shown = [o for cell in code_cells(notebook) for o in cell.outputs]
    assert any("image/png" in o.get("data", {}) for o in shown)


@each_notebook
def test_stored_outputs_are_those_of_one_run_from_top_to_bottom(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert any("image/png" in o.get("data", {}) for o in outputs)


@each_notebook
def test_the_first_cell_installs_the_package_only_where_it_is_missing(path):
    first = code_cells(read(path))[0]
    assert 'if importlib.util.find_spec("partnewton") is None:' in first.source
    assert re.search(r"^    %pip install .*partnewton", first.source, re.MULTILINE)
    assert first.outputs == []


@each_notebook
def test_there_is_prose_between_short_cells(path):
    notebook = read(path)
    assert notebook.cells[0].cell_type == "markdown"
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(prose) >= 4
    assert max(len(cell.source.splitlines()) for cell in code_cells(notebook)) <= 42


@each_notebook
def test_links_between_notebooks_resolve(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\(([^)]*\.ipynb)\)", cell.source):
                assert (path.parent / link).exists(), link


def test_notebooks_are_small():
    assert sum(path.stat().st_size for path in PATHS) < 2_000_000


@each_notebook
def test_notebooks_contain_no_names_of_a_machine(path):
    text = path.read_text()
    assert "/home/" not in text
    assert "/work/" not in text
