"""The pages of the documentation as programs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pages() -> list[Path]:
    """The README and the pages in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def program(page: Path) -> str:
    """The python blocks of a page, one after the other, at the lines they stand at."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * text.count("\n")
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        first = text.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines) + "\n"


def sections(page: Path) -> dict[str, str]:
    """The program of each section of a page, after that of the text before them all."""
    whole = program(page).splitlines()
    lines = page.read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("## ")]
    found = {}
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        if any(line.strip() for line in whole[start:end]):
            kept = [*whole[: starts[0]], *[""] * (start - starts[0]), *whole[start:end]]
            found[lines[start].removeprefix("## ")] = "\n".join(kept) + "\n"
    return found


def run(page: Path) -> dict:
    """Runs the program of a page; returns what it defined."""
    namespace = {"__name__": page.stem}
    exec(compile(program(page), str(page), "exec"), namespace)
    return namespace
