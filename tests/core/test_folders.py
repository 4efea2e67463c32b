from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core import folders as folders_module
from lorasmith.core.errors import DataError, LoraError, LorasmithError, ModelError, OptionError, OutputError
from lorasmith.core.folders import (
    BUILT_IN_BASE,
    MAX_STEM_BYTES,
    Folders,
    file_stem,
    fingerprint,
    pipeline_index,
    read_extra_model_paths,
)

NOON = time.struct_time((2024, 3, 5, 12, 7, 9, 1, 65, 0))
OUTSIDE = ["../x", "a/../../x", "/etc/passwd", "..", "C:\\x", "a\\..\\..\\x", "", ".", "a\0b"]


def put(path: Path, content: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def test_files_lists_every_root_with_forward_slashes(folders: Folders) -> None:
    put(folders.base / "models/loras/b.safetensors")
    put(folders.base / "models/loras/Sub/a.SAFETENSORS")
    put(folders.base / "models/loras/.hidden/c.safetensors")
    put(folders.base / "models/loras/readme.txt")
    put(folders.output / "loras/trained.safetensors")
    assert folders.files("loras") == ["Sub/a.SAFETENSORS", "b.safetensors", "trained.safetensors"]
    assert folders.files("loras", [".txt"]) == ["readme.txt"]
    assert folders.find("loras", "Sub/a.SAFETENSORS") == folders.base / "models/loras/Sub/a.SAFETENSORS"
    assert folders.find("loras", "Sub\\a.SAFETENSORS").is_file()
    assert folders.find("loras", "trained.safetensors").is_relative_to(folders.output)


def test_nothing_there_is_an_empty_list(folders: Folders) -> None:
    assert folders.files("vae") == []
    assert folders.input_files([".exr"]) == []


@pytest.mark.parametrize("index", ["model_index.json", "modular_model_index.json"])
def test_a_diffusers_folder_is_one_checkpoint(folders: Folders, index: str) -> None:
    put(folders.base / "models/checkpoints/mine" / index)
    assert pipeline_index(folders.base / "models/checkpoints") is None
    put(folders.base / "models/checkpoints/mine/unet/weights.safetensors")
    put(folders.base / "models/checkpoints/other.safetensors")
    assert folders.files("checkpoints") == ["lorasmith-tiny.safetensors", "mine", "other.safetensors"]
    assert folders.find("checkpoints", "mine") == folders.base / "models/checkpoints/mine"


def test_the_embedded_model_is_found_without_a_base(folders: Folders) -> None:
    name = "lorasmith-tiny.safetensors"
    assert folders.find("checkpoints", name) == BUILT_IN_BASE / "models/checkpoints" / name


def test_the_base_goes_before_what_is_built_in(folders: Folders) -> None:
    put(folders.base / "models/checkpoints/lorasmith-tiny.safetensors")
    assert folders.find("checkpoints", "lorasmith-tiny.safetensors").is_relative_to(folders.base)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("unet", "diffusion_models"),
        ("unet", "unet"),
        ("diffusion_models", "unet"),
        ("clip", "text_encoders"),
        ("text_encoders", "clip"),
        ("controlnet", "controlnet"),
    ],
)
def test_older_names_of_kinds(folders: Folders, kind: str, place: str) -> None:
    put(folders.base / "models" / place / "x.safetensors")
    assert folders.files(kind) == ["x.safetensors"]


def test_a_missing_model_names_the_near_miss_and_the_folder(folders: Folders) -> None:
    put(folders.base / "models/checkpoints/dreamshaper.safetensors")
    with pytest.raises(ModelError, match=r"'dreamshapr.safetensors' among checkpoints \(did you mean 'dreamshaper"):
        folders.find("checkpoints", "dreamshapr.safetensors")
    with pytest.raises(LoraError, match=r"put it into .*loras or choose one"):
        folders.find("loras", "x.safetensors")


def test_links_are_followed_and_loops_end(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("disk")
    put(elsewhere / "big.safetensors")
    root = folders.base / "models/loras"
    root.mkdir(parents=True)
    (root / "disk").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(elsewhere)
    assert folders.files("loras") == ["disk/big.safetensors"]
    assert folders.find("loras", "disk/big.safetensors").is_file()


def test_a_link_to_a_whole_disk_costs_what_its_first_files_cost(
    folders: Folders, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    disk, root = tmp_path_factory.mktemp("disk"), folders.base / "models/loras"
    for number in range(30):
        put(disk / f"{number % 3}/{number}/x.safetensors")
    put(root / "mine/own.safetensors")
    (root / "a disk").symlink_to(disk)
    assert len(folders.files("loras")) == 31 and not caplog.text
    scanned: list[object] = []
    scandir = os.scandir
    monkeypatch.setattr("lorasmith.core.folders.os.scandir", lambda folder: scanned.append(folder) or scandir(folder))
    monkeypatch.setattr("lorasmith.core.folders._MOST_LINKED", 1000)  # ten folders
    found = folders.files("loras")
    assert "mine/own.safetensors" in found and len(found) < 15 and len(scanned) < 25
    assert "links in" in caplog.text and "more files than are listed" in caplog.text
    assert folders.find("loras", "a disk/2/29/x.safetensors").is_file()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
@pytest.mark.parametrize("linked", ["file", "folder", "folder inside", "dataset"])
def test_inputs_behind_links_out_of_the_base_are_read_only_if_that_is_typed(
    folders: Folders, tmp_path_factory: pytest.TempPathFactory, linked: str
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    put(elsewhere / "in/1.png")
    put(elsewhere / "in/shard_0000.safetensors")
    put(folders.base / "input/dog/1.png")
    following = replace(folders, follow_links=True)
    place, target, find, listed = {
        "file": ("input/x.png", "in/1.png", Folders.find_input, lambda one: one.input_files([".png"])),
        "folder": ("input/x.png", "in", Folders.find_input_folder, Folders.input_folders),
        "folder inside": ("input/dog/x.png", "in", Folders.find_input_folder, Folders.input_folders),
        "dataset": ("datasets/x.png", "in", Folders.find_dataset, Folders.datasets),
    }[linked]
    link = folders.base / place
    link.parent.mkdir(exist_ok=True)
    name = link.relative_to(folders.base / place.partition("/")[0]).as_posix()
    link.symlink_to(elsewhere / target)
    assert name not in listed(folders) and name in listed(following)
    with pytest.raises(DataError, match=r"is a link out of it; copy it there, or type --follow-links"):
        find(folders, name)
    assert find(following, name) == link
    inside = put(folders.base / "models/x/shard_0000.safetensors")
    link.unlink()
    link.symlink_to(inside if linked == "file" else inside.parent)
    assert name in listed(folders) and find(folders, name) == link


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_place_that_is_a_link_itself_is_read(tmp_path: Path) -> None:
    put(tmp_path / "disk/dog/1.png")
    put(tmp_path / "disk/a.png")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/input").symlink_to(tmp_path / "disk")
    (tmp_path / "base/output").symlink_to(tmp_path / "disk")
    folders = Folders(tmp_path / "base")
    assert folders.find_input("a.png [output]").is_file()
    assert folders.find_input("a.png").is_file() and folders.input_files([".png"])[:2] == ["a.png", "dog/1.png"]
    assert folders.find_input_folder("dog").is_dir() and "dog" in folders.input_folders()


def test_a_data_set_whose_replacement_was_killed_is_found(folders: Folders) -> None:
    for name in ("a", "b/c"):
        place = folders.base / "datasets" / name
        put(place.parent / f".{place.name}.x1y2.tmp/old/{place.name}/shard_0000.safetensors")
    assert folders.find_dataset("b/c").is_dir()
    assert folders.datasets() == ["a", "b/c"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_are_refused_everywhere(folders: Folders, name: str) -> None:
    put(folders.base.parent / "x")
    doors = [
        lambda: folders.find("checkpoints", name),
        lambda: folders.find_input(name),
        lambda: folders.find_input(f"{name} [output]"),
        lambda: folders.find_input_folder(name),
        lambda: folders.numbered(name),
        lambda: folders.find_dataset(name),
        lambda: folders.new_dataset(name),
    ]
    for door in doors:
        with pytest.raises(LorasmithError, match="must stay inside its folder"):
            door()


@given(st.lists(st.sampled_from(["..", ".", "a", "/", "\\", "C:", "~", "%year%", ""]), max_size=6).map("/".join))
def test_no_prefix_leads_out_of_the_output_folder(folders: Folders, prefix: str) -> None:
    try:
        files = folders.numbered(prefix)
    except OutputError:
        return
    assert Path(os.path.normpath(files.path(".png"))).is_relative_to(folders.output)


def test_input_names_may_carry_their_place(folders: Folders) -> None:
    for place in ("input", "output", "temp"):
        put(folders.base / place / "sub/cat.png", place)
    assert folders.find_input("sub/cat.png").read_text() == "input"
    assert folders.find_input("sub/cat.png [input]").read_text() == "input"
    assert folders.find_input("sub/cat.png [output]").read_text() == "output"
    assert folders.find_input("sub/cat.png [temp]").read_text() == "temp"
    put(folders.base / "input/odd [name].png")
    assert folders.find_input("odd [name].png").is_file()


def test_a_missing_input_names_the_near_miss(folders: Folders) -> None:
    put(folders.base / "input/cats/cat1.png")
    with pytest.raises(DataError, match=r"no file 'cats/cat.png' in the input folder \(did you mean 'cat1.png'"):
        folders.find_input("cats/cat.png")


def test_input_files_and_folders(folders: Folders) -> None:
    put(folders.base / "input/b.png")
    put(folders.base / "input/A.PNG")
    put(folders.base / "input/notes.txt")
    put(folders.base / "input/dogs/big/1.png")
    built_in = [path.relative_to(BUILT_IN_BASE / "input").as_posix() for path in BUILT_IN_BASE.glob("input/*/*.png")]
    assert built_in and folders.input_files([".png"]) == ["A.PNG", "b.png", *sorted(["dogs/big/1.png", *built_in])]
    assert {"dogs", "dogs/big"} <= set(folders.input_folders())
    assert folders.find_input_folder("dogs/big") == folders.base / "input/dogs/big"
    with pytest.raises(DataError, match=r"no folder 'dog' in the input folder \(did you mean 'dogs'"):
        folders.find_input_folder("dog")


def test_built_in_data_sets_are_input_folders(folders: Folders) -> None:
    built_in = [entry.name for entry in (BUILT_IN_BASE / "input").glob("*") if entry.is_dir()]
    assert set(built_in) <= set(folders.input_folders())
    for name in built_in:
        assert folders.find_input_folder(name) == BUILT_IN_BASE / "input" / name


def test_data_sets_are_folders_of_shards(folders: Folders) -> None:
    assert folders.datasets() == []
    put(folders.base / "datasets/b/shard_0000.pkl")
    put(folders.base / "datasets/a/deep/shard_0000.safetensors")
    put(folders.base / "datasets/photos/cat.png")
    put(folders.base / "datasets/.old.tmp/new/shard_0000.pkl")
    put(folders.base / "datasets/shard_0000.pkl")
    assert folders.datasets() == ["a/deep", "b"]
    assert folders.find_dataset("a/deep") == folders.base / "datasets/a/deep"
    with pytest.raises(DataError, match=r"no folder 'a/dep' in .*did you mean 'a/deep'"):
        folders.find_dataset("a/dep")
    with pytest.raises(OutputError, match="a folder name must be at most 20 names of 200 bytes"):
        folders.new_dataset("a" * 300)


def test_numbered_files(folders: Folders) -> None:
    files = folders.numbered("loras/dog_200_steps")
    assert files.path(".safetensors") == folders.output / "loras/dog_200_steps_00001_.safetensors"
    assert files.path("alpha.png", 1).name == "dog_200_steps_00002_alpha.png"
    assert (files.subfolder, files.stem, files.counter) == ("loras", "dog_200_steps", 1)
    reference = {"filename": "dog_200_steps_00001_.png", "subfolder": "loras", "type": "output"}
    assert files.reference(files.path(".png")) == reference
    assert folders.numbered("x", place="temp").folder == folders.base / "temp"
    assert not folders.output.exists()


@pytest.mark.parametrize(
    ("there", "counter"),
    [
        (["dog_00001_.png"], 2),
        (["dog_00007_.png", "dog_00003_.webp"], 8),
        (["DOG_00004_.png"], 5),
        (["dog_00005.png"], 6),
        (["dog_100000_.png"], 100001),
        (["dog_200_steps_00001_.png", "dogs_00009_.png", "dog_.png", "dog.png", "hotdog_00002_.png"], 1),
    ],
)
def test_counters_go_on_after_the_highest(folders: Folders, there: list[str], counter: int) -> None:
    for name in there:
        put(folders.output / name)
    assert folders.numbered("dog").counter == counter


@given(st.sets(st.integers(1, 10**6), max_size=5), st.text("ab._+(%", min_size=1, max_size=4))
def test_a_counter_is_never_taken(tmp_path_factory: pytest.TempPathFactory, taken: set[int], stem: str) -> None:
    if stem.strip(".") == "":
        return
    folders = Folders(tmp_path_factory.mktemp("base"))
    for counter in taken:
        put(folders.output / f"{stem}_{counter:05}_.png")
    first = folders.numbered(stem)
    assert first.counter == max(taken, default=0) + 1
    put(first.path(".png"))
    assert folders.numbered(stem).counter == first.counter + 1


def test_tokens_in_prefixes(folders: Folders) -> None:
    prefix = "%year%-%month%-%day%/%hour%%minute%%second%_%width%x%height%_%other%"
    files = folders.numbered(prefix, width=64, height=32, now=NOON)
    assert (files.subfolder, files.stem) == ("2024-03-05", "120709_64x32_%other%")


def test_extra_model_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(
        tmp_path / "config/extra_model_paths.yaml",
        """
comfyui:
    base_path: ../comfy
    is_default: true
    checkpoints: models/checkpoints/
    clip: |
        models/text_encoders/
        models/clip/
a1111:
    base_path: $PLACE/webui
    loras: |
         models/Lora

         models/LyCORIS
plain:
    vae: here/vae
empty:
""",
    )
    monkeypatch.setenv("PLACE", str(tmp_path))
    preferred, extra = read_extra_model_paths(file)
    comfy = tmp_path / "comfy/models"
    assert preferred == {
        "checkpoints": [comfy / "checkpoints"],
        "text_encoders": [comfy / "text_encoders", comfy / "clip"],
    }
    webui = tmp_path / "webui/models"
    assert extra == {"loras": [webui / "Lora", webui / "LyCORIS"], "vae": [tmp_path / "config/here/vae"]}


def test_extra_model_paths_of_the_base_are_loaded(tmp_path: Path) -> None:
    put(tmp_path / "base/extra_model_paths.yaml", f"one:\n  base_path: {tmp_path}/far\n  loras: loras\n")
    put(tmp_path / "far/loras/far.safetensors")
    put(tmp_path / "near.yaml", "one:\n  is_default: true\n  loras: first\n")
    put(tmp_path / "first/far.safetensors")
    put(tmp_path / "base/models/loras/far.safetensors")
    base = tmp_path / "base"
    assert tmp_path / "far/loras" in Folders.load(base).roots("loras")
    assert Folders.load(base).find("loras", "far.safetensors").is_relative_to(base)
    given_file = Folders.load(base, extra_model_paths=tmp_path / "near.yaml")
    assert given_file.find("loras", "far.safetensors") == tmp_path / "first/far.safetensors"
    assert tmp_path / "far/loras" not in given_file.roots("loras")
    assert Folders.load(tmp_path / "none").extra == {}


def test_malformed_extra_model_paths(tmp_path: Path) -> None:
    for content, sentence in [
        ("a: [", "must be a readable YAML file"),
        ("a: !!python/object/apply:sys.exit [code of a file was run]", "must be a readable YAML file"),
        ("- a\n- b", "must hold named sections of kinds and paths, got list"),
        ("a: b", "section 'a' of .* must map kinds to paths, got str"),
        ("a:\n  loras: [x, y]", "'loras' in section 'a' of .* must be lines of paths"),
    ]:
        with pytest.raises(OptionError, match=sentence) as caught:
            Folders.load(tmp_path, extra_model_paths=put(tmp_path / "x.yaml", content))
        assert "\n" not in str(caught.value)


def test_a_missing_extra_model_paths_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="must be a readable YAML file"):
        Folders.load(tmp_path, extra_model_paths=tmp_path / "no.yaml")


def test_fingerprints_follow_size_time_and_names(tmp_path: Path) -> None:
    file = put(tmp_path / "set/a.txt", "one")
    seen = [fingerprint(file), fingerprint(tmp_path / "set")]
    assert seen[0] == seen[1]
    os.utime(file, ns=(1, 1))
    assert fingerprint(file) != seen[0]
    put(tmp_path / "set/sub/b.txt")
    assert len(fingerprint(tmp_path / "set")) == 2


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "\ud800", "a\x1bb"])
def test_names_that_no_file_can_have_are_missing(folders: Folders, name: str) -> None:
    for find in (lambda: folders.find("loras", name), lambda: folders.find_input(name)):
        with pytest.raises(LorasmithError, match=r"no (file )?'"):
            find()
    for look in (folders.find_input_folder, folders.find_dataset):
        with pytest.raises(DataError, match="no folder"):
            look(name)


@pytest.mark.parametrize("prefix", ["x" * 201, "é" * 101, "a/" * 20 + "b", "a\nb", "\ud800", "%width%" * 201])
def test_prefixes_of_names_too_long_for_a_file_are_refused(folders: Folders, prefix: str) -> None:
    with pytest.raises(OutputError, match="must be at most 20 names of 200 bytes without control characters"):
        folders.numbered(prefix)


@given(st.text(st.characters() | st.sampled_from("\x00\x1b\udce9"), max_size=300))
def test_the_start_of_a_files_name_is_printable_and_short(name: str) -> None:
    stem = file_stem(name)

    assert 1 <= len(stem.encode()) <= MAX_STEM_BYTES
    assert file_stem(stem) == stem
    assert not {"\x00", "\x1b"} & set(stem)


def test_a_bomb_of_references_in_extra_model_paths_is_not_printed(tmp_path: Path) -> None:
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    (tmp_path / "extra.yaml").write_text("a0: &a0 [x]\n" + levels)
    with pytest.raises(OptionError, match="must map kinds to paths, got list"):
        read_extra_model_paths(tmp_path / "extra.yaml")
    (tmp_path / "deep.yaml").write_text("[" * 500)
    with pytest.raises(OptionError, match="must be a readable YAML file"):
        read_extra_model_paths(tmp_path / "deep.yaml")


def test_names_of_embeddings_walk_the_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    styles = tmp_path / "styles"
    styles.mkdir()
    (styles / "old.pt").touch()
    for folder in (styles, tmp_path):
        os.utime(folder, (1.7e9, 1.7e9))
    walks: list[Path] = []
    real = folders_module._walk
    monkeypatch.setattr(folders_module, "_walk", lambda root, *given: walks.append(root) or real(root, *given))  # type: ignore[func-returns-value]
    found = Folders.of("embeddings", tmp_path)
    assert found.embedding("old") == styles / "old.pt"
    count = len(walks)
    assert [found.embedding(f"unknown-{number}") for number in range(9)] == [None] * 9 and len(walks) == count
    (styles / "new.pt").touch()
    assert found.embedding("new") == styles / "new.pt" and len(walks) > count
