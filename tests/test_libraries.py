"""The page on other libraries: each section is a program of its own."""

import re
import warnings

import pytest
from support import documents
from support.selection import some

PAGE = documents.ROOT / "docs" / "libraries.md"
SECTIONS = documents.sections(PAGE)
SLOW = ("Differential equations with diffrax",)
QUICK = [name for name in SECTIONS if name not in SLOW]


def test_every_section_has_a_program():
    assert len(SECTIONS) == 5
    assert set(SLOW) < set(SECTIONS)


@pytest.mark.parametrize("name", some(list(SECTIONS), default=QUICK))
def test_the_program_of_a_section_runs(name):
    for library in re.findall(r"^import (\w+)", SECTIONS[name], re.MULTILINE):
        with warnings.catch_warnings():  # those of importing it are not ours
            warnings.simplefilter("ignore")
            pytest.importorskip(library, reason=f"{library} is not installed")
    exec(compile(SECTIONS[name], f"{PAGE}: {name}", "exec"), {"__name__": "section"})
