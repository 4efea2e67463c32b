"""Build the site of the documentation into build/site (`make site`).

    python -m tools.site

The pages of docs/ and those at the root of the repository are copied to build/site-pages with links that lead where the
site has them, and MkDocs builds them strictly: a link or an anchor that leads nowhere is an error. mkdocs.yml has the
navigation. A link whose text is the name of a page gets its title. Links to files that are no pages (code, tests,
folders) lead to the repository, if `home` in pyproject.toml says where that is, and are plain text otherwise.
"""

from __future__ import annotations

import functools
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from tools.release import home

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "site-pages"
ADDED = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|!?\[[^\]]*\](?:\([^)]*\))?)*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def main() -> None:
    """Prepare the pages and build them."""
    repository = home()
    prepare(repository)
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "LORASMITH_HOME": repository}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml"]
    raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)


def prepare(repository: str = "") -> None:
    """Write the pages of the site; `repository` is the address of the project's code."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ADDED:
        shutil.copy(ROOT / name, PAGES)
    pages = {path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*") if path.is_file()}
    for page in pages:
        if page.endswith(".md"):
            path = PAGES / page
            path.write_text(_on_the_site(path.read_text(encoding="utf-8"), page, pages, repository), encoding="utf-8")


def _on_the_site(markdown: str, page: str, pages: Collection[str], repository: str) -> str:
    folder = posixpath.dirname(page)
    former = "" if page in ADDED else posixpath.join("docs", folder)

    def led(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        place = posixpath.normpath(posixpath.join(former, target))
        if "://" in target or not (ROOT / place).exists():
            return match[0]  # a missing file is named by the build
        if place == "README.md":
            place, anchor = "index.md", ""
        place = place.removeprefix("docs/")
        if place in pages:
            if text == target.removeprefix("../"):
                text = _title(place)
            return f"[{text}]({posixpath.relpath(place, folder or '.')}{anchor})"
        return f"[{text}]({repository.rstrip('/')}/blob/main/{place})" if repository else text

    images = re.sub(r"(!\[[^\]]*\]\()docs/", r"\1", markdown) if page in ADDED else markdown
    return _indented(_LINK.sub(led, images))


@functools.cache
def _title(page: str) -> str:
    first = (PAGES / page).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("# ")


def _indented(markdown: str) -> str:
    """Paragraphs and tables of list items, which GitHub reads from two spaces on, with four."""
    lines: list[str] = []
    is_code = is_inside = False
    for line in markdown.split("\n"):
        is_code ^= line.lstrip().startswith("```")
        is_item = len(line) - len(line.lstrip()) in (2, 3) and not is_code and bool(line.strip())
        is_inside = is_item and (is_inside or not lines or not lines[-1].strip())
        lines.append(f"    {line.lstrip()}" if is_inside else line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
