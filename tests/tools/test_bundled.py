"""Libraries in wheels of others: read from what is installed, with licences that NOTICE and the image heed."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tools import release
from tools.bundled import bundled

ROOT = release.ROOT


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return {package.name.replace("_", "-"): bundled(package) for package in metadata.distributions()}


def test_notice_names_what_the_extras_bring_under_copyleft(found: dict[str, Any]) -> None:
    notice = (ROOT / "NOTICE").read_text("utf-8")
    for package, extra in (("pillow-heif", "heic"), ("av", "video")):
        paragraph = re.split(r"\n- |\n\n", notice.partition(f"- {package} (extra `{extra}`): ")[2])[0]
        copyleft = [one for one in found[package] if "GPL" in one.licence]
        assert any(one.is_gpl for one in copyleft), "its wheel is not read as it was"
        assert not [one.name for one in copyleft if not re.search(rf"\b{one.name}\b", paragraph)]


def test_an_image_is_without_gpl_libraries(found: dict[str, Any]) -> None:
    under_gpl = {name for name, libraries in found.items() if any(one.is_gpl for one in libraries)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    brings = {
        extra
        for extra, packages in project["optional-dependencies"].items()
        if under_gpl & {re.split("[<>=~[]", one)[0] for one in packages}
    }
    in_image = re.findall(r"^ARG EXTRAS=(.+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)[0]
    assert brings == {"heic", "video", "dev"} and not brings & set(in_image.split(","))
    assert "build-args: ${{ steps.of.outputs.arguments }}" in (ROOT / ".github/workflows/publish.yml").read_text(
        "utf-8"
    )
    assert "EXTRAS" not in release.image_arguments("cuda")


def test_the_sbom_has_libraries_with_their_licences() -> None:
    version = metadata.version("pillow-heif")
    libraries = release.installed_libraries("pillow-heif", version)
    x265 = next(one for one in libraries if one["name"] == "libx265")
    assert x265["licenses"] == [{"expression": "GPL-2.0-or-later"}]
    assert x265["properties"][0]["value"].startswith("libx265")
    assert (
        release.installed_libraries("pillow-heif", "0.0") == release.installed_libraries("no-such-package", "1") == []
    )


def test_a_library_without_a_known_licence_is_an_error(tmp_path: Path) -> None:
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n", "utf-8")
    (info / "RECORD").write_text("other.libs/libzip-0123abcd.so.5.4,,\nother/libmine.so,,\n", "utf-8")
    (tmp_path / "other.libs").mkdir()
    (tmp_path / "other.libs" / "libzip-0123abcd.so.5.4").touch()  # files that are not there are left out from 3.12 on
    with pytest.raises(ValueError, match=r"other 1.0 bundles \['libzip'\]; name their licences"):
        bundled(metadata.Distribution.at(info))


def test_what_the_sbom_cannot_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    lock = (ROOT / "uv.lock").read_text("utf-8")
    (tmp_path / "uv.lock").write_text(re.sub(r'(name = "pillow-heif"\nversion = ")', r"\g<1>9", lock), "utf-8")
    assert "pillow-heif" in release.not_read(tmp_path) and "gguf" not in release.not_read(tmp_path)
