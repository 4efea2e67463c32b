"""Build the site of the documentation into build/site (`make site`): a folder for each minor version.

    python -m tools.site

The pages of docs/ and those at the root of the repository are copied to build/site-pages with links that lead where the
site has them, and MkDocs builds them strictly: a link or an anchor that leads nowhere is an error. mkdocs.yml has the
navigation. A link whose text is the name of a page gets its title. Links to files that are no pages (code, tests,
folders) lead to the repository, if `home` in pyproject.toml says where that is, and are plain text otherwise.

Other minor versions are built from the newest tag of each, by the `tools.site` of that tag. `latest/` has a page for
each page of the newest released version, which leads there. `versions.json` is what the theme's version selector
reads; its form is that of mike, which would need a branch for what is built here from the tags alone.
"""

from __future__ import annotations

import argparse
import functools
import html
import io
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

from tools.release import home, minor, site_address, versions

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "site-pages"
ADDED = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|!?\[[^\]]*\](?:\([^)]*\))?)*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def main() -> None:
    """Build the pages of all versions, or those of this folder alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "site")
    parser.add_argument("--alone", action="store_true", help="build the pages of this folder into --output itself")
    arguments = parser.parse_args()
    output: Path = arguments.output.resolve()
    if arguments.alone:
        build(output)
        return
    shutil.rmtree(output, ignore_errors=True)
    own = versions()["lorasmith"]
    released = tagged()
    for version in newest_of_each_minor(released):
        if minor(version) != minor(own):
            _build_tag(f"v{version}", output / minor(version))
    build(output / minor(own))
    write_versions(output, own, released)


def build(output: Path) -> None:
    """Prepare the pages of this folder and build them; ends the program where MkDocs finds a fault."""
    repository = home()
    prepare(repository)
    address = site_address(repository, versions()["lorasmith"])
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "LORASMITH_HOME": repository, "LORASMITH_SITE": address}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml"]
    if code := subprocess.run([*command, "--site-dir", output], env=environment, check=False).returncode:
        raise SystemExit(code)


def tagged() -> list[str]:
    """Versions that have a tag; none outside a repository."""
    command = ["git", "tag", "--list", "v*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [tag[1:] for tag in done.stdout.splitlines() if re.fullmatch(r"v\d+\.\d+\.\d+", tag)]


def newest_of_each_minor(found: Iterable[str]) -> list[str]:
    """The newest version of each minor version, the newest first."""
    newest = {minor(version): version for version in sorted(found, key=_numbers)}
    return sorted(newest.values(), key=_numbers, reverse=True)


def write_versions(output: Path, own: str, released: Collection[str]) -> None:
    """Write the list of versions, and pages that lead to the newest released one, or to `own` if there is none."""
    others = [version for version in newest_of_each_minor(released) if minor(version) != minor(own)]
    shown = sorted([own, *others], key=_numbers, reverse=True)
    latest = next((version for version in shown if version in released), own)
    entries = [
        {
            "version": minor(version),
            "title": version if version in released else f"{version} dev",
            "aliases": ["latest"] if version == latest else [],
        }
        for version in shown
    ]
    (output / "versions.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    folder = output / minor(latest)
    pages = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.html")) if path.name != "404.html"]
    for page, target in (("index.html", "index.html"), *((f"latest/{page}", page) for page in pages)):
        path = output / page
        path.parent.mkdir(parents=True, exist_ok=True)
        place = posixpath.relpath(f"{minor(latest)}/{target}", posixpath.dirname(page) or ".")
        path.write_text(_LEADS_ON.format(place=html.escape(place), code=json.dumps(place)), encoding="utf-8")


_LEADS_ON = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Lorasmith</title>
<link rel="canonical" href="{place}">
<script>location.replace({code} + location.search + location.hash)</script>
<noscript><meta http-equiv="refresh" content="0; url={place}"></noscript>
<p>This page is <a href="{place}">here</a>.</p>
</html>
"""


def _build_tag(tag: str, output: Path) -> None:
    archive = subprocess.run(["git", "archive", tag], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        command = [sys.executable, "-m", "tools.site", "--alone", "--output", output]
        subprocess.run(command, cwd=folder, check=True)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def prepare(repository: str = "") -> None:
    """Write the pages of the site; `repository` is the address of the project's code."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*ADDED, "src/lorasmith/server/pages/icon.svg"):
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
            if text == target.removeprefix("../") and place.endswith(".md"):
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
