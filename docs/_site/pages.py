"""A hook of the site: pages that stand elsewhere in the repository are part of it."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of `PAGES`."""
    for page, source in PAGES.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Point links between files of the repository to the pages of the site."""
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder = (ROOT / source).parent
    page_of = {ROOT / source: name for name, source in PAGES.items()}

    def in_site(found: re.Match[str]) -> str:
        target, anchor = (folder / found[1]).resolve(), found[2] or ""
        if target.is_relative_to(ROOT / "docs"):
            return f"]({target.relative_to(ROOT / 'docs')}{anchor})"
        return f"]({page_of[target]}{anchor})" if target in page_of else found[0]

    return re.sub(r"\]\(((?!https?:)[^)#\s]+)(#[^)\s]*)?\)", in_site, markdown)
