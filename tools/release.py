"""Build what a release consists of: `python -m tools.release --output dist` in a clean checkout.

Sdists and wheels of three distributions, the node pack as a zip file, an SBOM (CycloneDX, from uv.lock) and SHA256SUMS.
Everything is built twice, in two folders, and must come out with the same bytes. The wheel of lorasmith has a man page
and completions for shells, made of the declarations that `--help` prints. Runs in an environment with Lorasmith, and
needs `pip install uv packaging`; uv downloads hatchling.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tools.bundled import bundled
from tools.node_pack import PACK, check_pack, stamped, write_pack
from tools.rehearsal import rehearse

ROOT = Path(__file__).parents[1]
PARTS = (".", "lorasmith-tiny", "lorasmith-editor")
SHELLS = {
    "bash": "bash-completion/completions/lorasmith",
    "zsh": "zsh/site-functions/_lorasmith",
    "fish": "fish/vendor_completions.d/lorasmith.fish",
    "powershell": "lorasmith/lorasmith.ps1",
}


def versions(root: Path = ROOT) -> dict[str, str]:
    """The versions of the distributions, by name. Raises ValueError where an extra or the node pack has another one."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    version = project["version"]
    for extra, name in (("demo", "lorasmith-tiny"), ("editor", "lorasmith-editor")):
        if f"{name}~={version}" not in project["optional-dependencies"][extra]:
            raise ValueError(f"the extra {extra} must ask for {name}~={version}")
    pack = root / PACK / "pyproject.toml"
    if pack.is_file():
        nodes = tomllib.loads(pack.read_text("utf-8"))["project"]
        if (nodes["version"], nodes["dependencies"]) != (version, [f"lorasmith~={version}"]):
            raise ValueError(f"{pack} must have version {version} and depend on lorasmith~={version}")
    return dict.fromkeys(("lorasmith", *PARTS[1:]), version)


def home(root: Path = ROOT) -> str:
    """The address of the project's repository; empty where it has none."""
    return str(tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["lorasmith"]["home"])


def minor(version: str) -> str:
    """The minor version, such as `0.9` of `0.9.3`."""
    return ".".join(version.split(".")[:2])


def site_address(address: str, version: str) -> str:
    """The address of the documentation of a version: the repository's pages on GitHub. Empty for other hosts."""
    found = re.fullmatch(r"https://github\.com/([^/]+)/([^/]+)/?", address)
    return f"https://{found[1].lower()}.github.io/{found[2]}/{minor(version)}/" if found else ""


def stamp(folder: Path, address: str) -> None:
    """Give every distribution and the node pack in `folder` the address of the repository, and of its documentation."""
    for part in (*PARTS, PACK):
        file = folder / part / "pyproject.toml"
        if address and file.is_file():
            text = file.read_text("utf-8")
            if part == PACK:
                text = stamped(text, address, tomllib.loads(text)["project"]["version"])
            urls = f'[project.urls]\nRepository = "{address}"\nIssues = "{address}/issues"\n'
            if documentation := site_address(address, versions(folder)["lorasmith"]):
                urls += f'Documentation = "{documentation}"\n'
            file.write_text(f"{text.rstrip()}\n\n{urls}", "utf-8")


def image_arguments(variant: str, root: Path = ROOT) -> dict[str, str]:
    """Build arguments of the image for `cpu` or `cuda`; those of `cuda` are the defaults of compose.cuda.yaml."""
    found = {"HOME_URL": home(root)}
    if variant == "cuda":
        text = (root / "compose.cuda.yaml").read_text("utf-8")
        found |= dict(re.findall(r"^ +(\w+): \$\{\1:-(.+)\}$", text, re.MULTILINE))
    return found


def changes(text: str) -> dict[str, dict[str, list[str]]]:
    """The entries of a changelog as keepachangelog.com has them, by version and kind. Raises ValueError for others."""
    found: dict[str, dict[str, list[str]]] = {}
    entries: list[str] | None = None
    for line in text.splitlines():
        if version := re.fullmatch(r"## \[(Unreleased|\d+\.\d+\.\d+)\](?: - (\d{4}-\d\d-\d\d))?", line):
            if (version[1] == "Unreleased") != (version[2] is None) or version[1] in found:
                raise ValueError(f"{line!r} must be a version that is new here, with a date unless it is Unreleased")
            found[version[1]], entries = {}, None
        elif kind := re.fullmatch(r"### (Added|Changed|Deprecated|Removed|Fixed|Security)", line):
            entries = list(found.values())[-1].setdefault(kind[1], [])
        elif line.startswith("#") and line != "# Changelog":
            raise ValueError(f"{line!r} is no heading of a changelog")
        elif line.startswith("- ") and entries is not None:
            entries.append(line[2:])
        elif line.startswith("  ") and entries:
            entries[-1] += line[1:]
        elif line and found:
            raise ValueError(f"{line!r} belongs to no version and kind")
    return found


def man_page(version: str) -> str:
    """lorasmith(1), of every command with all of its options."""
    from typer.main import get_command

    from lorasmith.cli.main import app

    root = get_command(app)
    lines = [f'.TH LORASMITH 1 "" "lorasmith {version}" "User Commands"', ".SH NAME"]
    lines += [f"lorasmith \\- {_roff(root.help or '')}", ".SH SYNOPSIS", "lorasmith COMMAND [OPTIONS] [ARGUMENTS]"]
    for name, command in _commands(root, "lorasmith"):
        lines += [f".SH {_roff(name.upper())}", _roff(command.help or "").replace("\n\n", "\n.PP\n")]
        context = command.make_context(name, [], resilient_parsing=True)
        for param in command.get_params(context):
            if (record := param.get_help_record(context)) is not None:
                lines += [".TP", f".B {_roff(record[0])}", _roff(record[1])]
    return "\n".join(line for line in lines if line) + "\n"


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in sorted(group.commands.items()):
        yield f"{path} {name}", command
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")


def _roff(text: str) -> str:
    escaped = text.strip().replace("\\", "\\e").replace("-", "\\-")
    escaped = re.sub(r"[^\x00-\x7f]", lambda one: f"\\[u{ord(one[0]):04X}]", escaped)
    return re.sub(r"^([.'])", r"\\&\1", re.sub(r"[ \t]+", " ", escaped), flags=re.MULTILINE)


def write_share(folder: Path, version: str) -> None:
    """Write the man page and the completions as they lie below `/usr/share`."""
    from typer._completion_shared import get_completion_script

    files = {"man/man1/lorasmith.1": man_page(version)}
    for shell, name in SHELLS.items():
        script = get_completion_script(prog_name="lorasmith", complete_var="_LORASMITH_COMPLETE", shell=shell)
        files[name] = script.strip() + "\n"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8", newline="\n")


def sbom(epoch: int) -> str:
    """The packages that uv.lock installs with the extras, as CycloneDX; without a time and number of its own.

    Libraries that their wheels bundle are components of theirs, where the locked version is the installed one.
    """
    command = [sys.executable, "-m", "uv", "export", "--quiet", "--frozen", "--format", "cyclonedx1.5"]
    done = subprocess.run(
        [*command, "--all-extras", "--no-extra=dev"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    document = json.loads(done.stdout)
    del document["serialNumber"]
    found = versions()
    for one in (document["metadata"]["component"], *document["components"]):
        if one["name"] in found:
            project = tomllib.loads(
                (ROOT / PARTS[list(found).index(one["name"])] / "pyproject.toml").read_text("utf-8")
            )
            one["version"] = found[one["name"]]
            one["licenses"] = [{"expression": project["project"]["license"]}]
    for one in document["components"]:
        if libraries := installed_libraries(one["name"], one["version"]):
            one["components"] = libraries
    document["metadata"]["timestamp"] = datetime.fromtimestamp(epoch, UTC).isoformat()
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def installed_libraries(name: str, version: str) -> list[dict[str, Any]]:
    """What a package bundles, as components of CycloneDX; nothing if this version is not installed."""
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return []
    return [
        {
            "type": "library",
            "name": one.name,
            "licenses": [{"expression": one.licence}],
            "properties": [{"name": "lorasmith:file", "value": one.file}],
        }
        for one in (bundled(package) if package.version == version else ())
    ]


def not_read(root: Path = ROOT) -> list[str]:
    """Packages of extras of which no locked version is installed, so that the SBOM lacks what they bundle."""
    extras = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = {re.split("[<>=~[]", one)[0] for extra, packages in extras.items() if extra != "dev" for one in packages}
    locked: dict[str, set[str]] = {}
    for one in tomllib.loads((root / "uv.lock").read_text("utf-8"))["package"]:
        locked.setdefault(one["name"], set()).add(one.get("version", ""))
    installed = {re.sub("[._-]+", "-", one.name).lower(): one.version for one in metadata.distributions()}
    return sorted(name for name in named - {*versions(root)} if installed.get(name) not in locked[name])


def build(commit: str, output: Path, epoch: int, version: str) -> None:
    """Build the distributions of a commit, in a folder of their own, into `output`."""
    with tempfile.TemporaryDirectory(prefix=f"{output.name}-") as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        stamp(Path(folder), home(Path(folder)))
        # Of the commit, whichever Lorasmith the environment has.
        code = (
            f"from pathlib import Path; from tools.release import write_share; write_share(Path('share'), {version!r})"
        )
        path = os.pathsep.join([folder, str(Path(folder) / "src")])
        subprocess.run([sys.executable, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": path}, check=True)
        for part in PARTS:
            subprocess.run(
                [sys.executable, "-m", "uv", "build", "--quiet", "--no-sources", "--out-dir", str(output), part],
                cwd=folder,
                env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch)},
                check=True,
            )
        write_pack(Path(folder) / PACK, output / f"lorasmith-nodes-{version}.zip", epoch)
    (output / ".gitignore").unlink(missing_ok=True)


def check(wheel: Path, version: str) -> None:
    """Check a wheel's metadata by the packaging standards. Raises ValueError, and the exceptions of `packaging`."""
    from packaging.metadata import Metadata

    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        about = Metadata.from_email(files.read(info), validate=True)
    if str(about.version) != version or not about.license_expression or not about.description:
        raise ValueError(f"{wheel.name} must have version {version}, a licence and a description")
    licences = {f"{info.rpartition('/')[0]}/licenses/{file}" for file in about.license_files or ()}
    if not licences or not licences <= set(names):
        raise ValueError(f"{wheel.name} lacks licence files that it names: {sorted(licences - set(names))}")
    if wheel.name.startswith("lorasmith-") and not any(name.endswith("share/man/man1/lorasmith.1") for name in names):
        raise ValueError(f"{wheel.name} has no man page")


def main() -> None:
    """Build, compare, check and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument(
        "--publish",
        metavar="TAG",
        help="refuse while pyproject.toml has no home, and a tag that is not its version",
    )
    parser.add_argument("--rehearse", action="store_true", help="install and try what was built (tools/rehearsal.py)")
    parser.add_argument("--image", choices=("cpu", "cuda"), help="print the build arguments of an image, and end")
    parser.add_argument("--draft", action="store_true", help="the changelog need not have the version yet")
    arguments = parser.parse_args()
    if arguments.image:
        print("\n".join(f"{name}={value}" for name, value in image_arguments(arguments.image).items()))
        return
    output: Path = arguments.output.resolve()
    if output.exists() and any(output.iterdir()):
        sys.exit(f"{output} must be empty; remove its files, or name another folder with --output")
    if arguments.publish and not home():
        sys.exit("home is empty in [tool.lorasmith] of pyproject.toml; give the repository's address before publishing")
    found = versions()
    if arguments.publish and arguments.publish != f"v{found['lorasmith']}":
        sys.exit(f"the tag is {arguments.publish}, pyproject.toml has {found['lorasmith']}; tag v{found['lorasmith']}")
    newest = next(
        version for version in [*changes((ROOT / "CHANGELOG.md").read_text("utf-8")), "none"] if version[0] != "U"
    )
    if newest != found["lorasmith"] and not arguments.draft:
        sys.exit(
            f"CHANGELOG.md ends with version {newest}, pyproject.toml has {found['lorasmith']}; give the entries it"
        )
    if others := not_read():
        message = (
            f"the SBOM says what wheels bundle, but {', '.join(others)} are not installed as uv.lock has them; run "
            'python -m pip install --constraint constraints.txt ".[EXTRAS]" with all extras but dev'
        )
        if not arguments.draft:
            sys.exit(message)
        print(f"Note: {message}", file=sys.stderr)
    commit = subprocess.run(["git", "log", "-1", "--format=%H %ct"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    name, time = commit.stdout.decode().split()
    epoch = int(time)
    with tempfile.TemporaryDirectory() as again:
        sums = []
        for folder in (output, Path(again) / "a folder of another name"):
            folder.mkdir(parents=True, exist_ok=True)
            build(name, folder, epoch, found["lorasmith"])
            (folder / f"lorasmith-{found['lorasmith']}.cdx.json").write_text(sbom(epoch), "utf-8")
            sums.append({one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in sorted(folder.iterdir())})
    if sums[0] != sums[1]:
        sys.exit(f"these differ between two builds: {[one for one in sums[0] if sums[0][one] != sums[1].get(one)]}")
    for part, version in found.items():
        check(next(output.glob(f"{part.replace('-', '_')}-{version}-*.whl")), version)
    check_pack(next(output.glob("lorasmith-nodes-*.zip")), home())
    (output / "SHA256SUMS").write_text("".join(f"{digest}  {file}\n" for file, digest in sums[0].items()), "utf-8")
    print("\n".join(f"{digest}  {file}" for file, digest in sums[0].items()))
    if arguments.rehearse:
        for line in rehearse(output):
            print(line, flush=True)


if __name__ == "__main__":
    main()
