"""What a release has beside the code: versions that agree, the changelog, the man page and the completions."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from lorasmith.cli.main import app
from tools import release
from tools.node_pack import PACK

ROOT = release.ROOT


needs_companions = pytest.mark.skipif(
    not (ROOT / "lorasmith-tiny").is_dir(), reason="an sdist is without the other distributions"
)


@needs_companions
def test_the_versions_agree(tmp_path: Path) -> None:
    found = release.versions()
    assert found.keys() == {"lorasmith", "lorasmith-tiny", "lorasmith-editor"}
    assert set(found.values()) == {tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]}
    for part in release.PARTS[1:]:
        assert "../pyproject.toml" in (ROOT / part / "pyproject.toml").read_text("utf-8")
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    (tmp_path / "pyproject.toml").write_text(text.replace("lorasmith-tiny~=", "lorasmith-tiny~=99."), "utf-8")
    with pytest.raises(ValueError, match=r"the extra demo must ask for lorasmith-tiny~="):
        release.versions(tmp_path)


@needs_companions
def test_the_home_of_the_project_is_one_setting(tmp_path: Path) -> None:
    parts = [*release.PARTS, PACK]
    for part in parts:
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / "pyproject.toml").write_bytes((ROOT / part / "pyproject.toml").read_bytes())
        assert "[project.urls]" not in (ROOT / part / "pyproject.toml").read_text("utf-8")
    release.stamp(tmp_path, "https://example.org/lorasmith")
    for part in parts:
        project = tomllib.loads((tmp_path / part / "pyproject.toml").read_text("utf-8"))["project"]
        assert project["urls"]["Repository"] == "https://example.org/lorasmith"


@needs_companions
@pytest.mark.parametrize(
    ("home", "message"), [("", "home is empty"), ("https://example.org/lorasmith", "the tag is v0.0.0, pyproject")]
)
def test_publishing_is_refused_without_a_home_or_for_another_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str, message: str
) -> None:
    monkeypatch.setattr("sys.argv", ["release", "--publish", "v0.0.0", "--output", str(tmp_path)])
    monkeypatch.setattr(release, "home", lambda: home)
    with pytest.raises(SystemExit, match=message):
        release.main()


@needs_companions
def test_the_workflow_that_publishes_has_few_rights_and_pinned_actions() -> None:
    text = (ROOT / ".github" / "workflows" / "publish.yml").read_text("utf-8")
    workflow = yaml.safe_load(text)
    jobs = workflow["jobs"]
    assert workflow["permissions"] == {}
    assert {name: {*job["permissions"]} for name, job in jobs.items()} == {
        "build": {"contents"},
        "attest": {"attestations", "id-token"},
        "pypi": {"id-token"},
        "image": {"attestations", "contents", "id-token", "packages"},
        "nodes": set(),
        "site": {"contents"},
        "site-pages": {"id-token", "pages"},
        "page": {"contents"},
    }
    assert [name for name, job in jobs.items() if job["permissions"].get("contents") == "write"] == ["page"]
    # What runs code of the project neither publishes distributions nor signs them.
    steps = [(name, step) for name, job in jobs.items() for step in job["steps"]]
    assert {name for name, step in steps if "tools.release" in step.get("run", "")} == {"build", "image"}
    assert [name for name, step in steps if "tools.release --rehearse" in step.get("run", "")] == ["build"]
    for name, job in jobs.items():
        if name in ("build", "image", "site"):  # a rehearsal has no tag, and they publish nothing without one
            rights = [one for one in job["steps"] if "attest@" in str(one) or "login-action" in str(one)]
            assert all(one["if"] == "github.ref_type == 'tag'" for one in rights)
        else:
            assert job["if"] == "github.ref_type == 'tag'" and "needs" in job
    assert "push: ${{ github.ref_type == 'tag' }}" in text
    used = re.findall(r"uses: (.+)", text)
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one) for one in used)
    pins = {one.partition("@")[0]: one for one in used}
    assert set(used) == set(pins.values())
    # Text that somebody else may choose reaches a shell as a variable, not as a piece of its script.
    assert not [step for _, step in steps if "${{" in step.get("run", "")]


@needs_companions
def test_the_images_differ_by_what_compose_says() -> None:
    assert release.image_arguments("cpu").keys() == {"HOME_URL"}
    cuda = release.image_arguments("cuda")
    args = yaml.safe_load((ROOT / "compose.cuda.yaml").read_text("utf-8"))["services"]["lorasmith"]["build"]["args"]
    assert cuda.keys() == {"HOME_URL", *args} and "nvidia/cuda" in cuda["BASE"] and "/cu" in cuda["TORCH_INDEX"]
    comment = (ROOT / "Dockerfile").read_text("utf-8").partition("ARG")[0]
    assert all(f"{name}={cuda[name]}" in comment for name in args)


def test_the_changelog_has_versions_kinds_and_entries() -> None:
    found = release.changes((ROOT / "CHANGELOG.md").read_text("utf-8"))
    assert all(entries for kinds in found.values() for entries in kinds.values())
    assert sum(len(entries) for kinds in found.values() for entries in kinds.values()) > 140


@pytest.mark.parametrize(
    "text",
    [
        "## 0.1.0\n",
        "## [0.1.0]\n",
        "## [Unreleased] - 2026-01-01\n",
        "## [Unreleased]\n## [Unreleased]\n",
        "## [Unreleased]\n### New\n- a\n",
        "## [Unreleased]\n- a\n",
    ],
)
def test_another_changelog_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be a version|is no heading|belongs to no"):
        release.changes(text)
    assert release.changes("# Changelog\n\nIntro.\n\n## [1.0.0] - 2026-01-02\n\n### Fixed\n\n- a\n  b\n") == {
        "1.0.0": {"Fixed": ["a b"]}
    }


def test_the_man_page_has_every_option_of_every_command(tmp_path: Path) -> None:
    release.write_share(tmp_path, "1.2.3")
    page = tmp_path / "man" / "man1" / "lorasmith.1"
    text = page.read_text("utf-8").replace("\\-", "-")
    for name, command in release._commands(get_command(app), "lorasmith"):
        section = text.split(f".SH {name.upper()}\n")[1].split("\n.SH ")[0]
        for param in command.params:
            assert param.param_type_name == "argument" or all(option in section for option in param.opts), param.name
    assert "lorasmith 1.2.3" in text
    assert not re.findall(r"^[.'](?!(TH|SH|PP|TP|B)\b)", page.read_text("utf-8"), re.MULTILINE)
    if groff := shutil.which("groff"):
        done = subprocess.run([groff, "-man", "-ww", "-z", str(page)], capture_output=True, text=True, check=True)
        assert done.stderr == ""


def test_completions_are_scripts_of_their_shells(tmp_path: Path) -> None:
    release.write_share(tmp_path, "1.2.3")
    for shell, name in release.SHELLS.items():
        assert "_LORASMITH_COMPLETE" in (tmp_path / name).read_text("utf-8")
        if shell in ("bash", "zsh", "fish") and shutil.which(shell):
            subprocess.run([shell, "-n", str(tmp_path / name)], check=True)


def test_lock_and_constraints_are_those_of_the_project() -> None:
    """`.ci/versions pin` writes them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(one for name, extra in extras.items() if name != "dev" for one in extra)]
    bounds = dict(one.lower().split(">=") for one in wanted if ">=" in one)
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    assert {name: release_of(bound) for name, bound in bounds.items()} == {
        name: release_of(version) for name, version in oldest.items() if name != "comfyui-frontend-package"
    }
    newest = (ROOT / "constraints.txt").read_text("utf-8")
    lock = (ROOT / "uv.lock").read_text("utf-8")
    assert all(re.search(rf"^{name}(==|>=)", newest, re.MULTILINE) for name in bounds)
    assert "+cpu" not in newest + lock
    assert set(re.findall(r"https?://([^/\"]+)", lock)) == {"pypi.org", "files.pythonhosted.org"}


@needs_companions
def test_an_image_is_built_from_all_that_the_distributions_are_built_from() -> None:
    """`.dockerignore` leaves out whatever it does not name."""
    named = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    files = [project["project"]["readme"], *project["project"]["license-files"], *wheel["packages"]]
    files += ["hatch_build.py"] * ("custom" in wheel["hooks"]) + [
        *release.PARTS[1:],
        "pyproject.toml",
        "constraints.txt",
    ]
    assert {file.partition("/")[0] for file in files} == named


def release_of(version: str) -> tuple[int, ...]:
    numbers = [int(one) for one in version.split(".")]
    while numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
