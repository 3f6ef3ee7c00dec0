"""What the pages say runs, and does what they say."""

import re

import jax
import numpy as np
import pytest
from support import documents
from support.selection import some

import partnewton as pn


def relative(page):
    return str(page.relative_to(documents.ROOT))


PROGRAMS = [p for p in documents.pages() if documents.program(p).strip()]
# Those whose blocks take a few seconds. That of the engine runs in test_adjoint.py too.
QUICK = [documents.ROOT / "docs" / name for name in ("faq.md", "index.md")]


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


def test_the_two_commands_stand_at_the_top():
    readme = (documents.ROOT / "README.md").read_text(encoding="utf-8")
    top = readme.split("\n## ")[0]
    for command in (
        'pip install -e ".[demo]" && python -m partnewton',
        'pip install -e ".[test]" && pytest',
    ):
        assert command in top


@pytest.mark.parametrize("page", documents.pages(), ids=relative)
def test_links_to_files_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not re.match(r"https?:", target):
            assert (page.parent / target).exists(), target


def test_pictures_are_small():
    for picture in (documents.ROOT / "docs").rglob("*.png"):
        assert picture.stat().st_size < 150_000, picture
