from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorasmith.core.errors import LorasmithError, OutputError
from lorasmith.core.folders import Folders
from lorasmith.server.datasets import dataset_answers, dataset_change_answers
from lorasmith.server.datasets import dataset_answers as questions
from lorasmith.server.datasets.dataset_folders import UnknownFileError
from lorasmith.server.datasets.dataset_shapes import CaptionEdit


def noise(size: tuple[int, int] = (48, 40), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path / "base")


@pytest.fixture
def dog(folders: Folders) -> Path:
    """A dataset of three pictures, two of them with captions."""
    folder = folders.place("input") / "dog"
    folder.mkdir(parents=True)
    for number in (1, 2, 10):
        noise(seed=number).save(folder / f"{number}.png")
    (folder / "1.txt").write_text("a dog\non grass\n")
    (folder / "2.caption").write_text("a dog in snow")
    return folder


def write(folders: Folders, captions: dict[str, str], **seen: str) -> int:
    """Store captions in `dog`, having `seen` those of pictures such as `1.png`, by number."""
    edits = {file: CaptionEdit(caption=text, seen=seen.get(f"_{file[:-4]}")) for file, text in captions.items()}
    return dataset_change_answers.set_captions(folders, "dog", edits).changed


def sent(tmp_path: Path, content: bytes | Image.Image, kind: str = "png") -> str:
    """An uploaded file."""
    if isinstance(content, Image.Image):
        buffer = io.BytesIO()
        content.save(buffer, kind)
        content = buffer.getvalue()
    path = tmp_path / f"upload-{len(list(tmp_path.iterdir()))}"
    path.write_bytes(content)
    return str(path)


def test_datasets_are_folders_with_pictures_and_new_ones(folders: Folders, dog: Path) -> None:
    (dog.parent / "3d").mkdir()
    (dog.parent / "3d" / "shape.obj").write_text("")
    (dog.parent / "new").mkdir()
    rows = {row.name: row for row in questions.datasets(folders).datasets}
    assert list(rows) == ["dog", "new", "fox", "high-contrast"]
    row = rows["dog"]
    assert (row.images, row.captions, row.cover, row.builtin) == (3, 2, "1.png", False)
    assert row.modified == dog.stat().st_mtime
    assert (rows["new"].images, rows["new"].cover) == (0, None)
    assert rows["fox"].builtin and rows["fox"].images == 6
    assert questions.datasets(folders, name="dog").datasets == (row,)
    assert questions.datasets(folders, name="absent").datasets == ()


def test_a_dataset_shows_its_pictures_in_natural_order(folders: Folders, dog: Path) -> None:
    found = questions.dataset(folders, "dog")
    assert [one.file for one in found.images] == ["1.png", "2.png", "10.png"]
    first, second, third = found.images
    assert (first.width, first.height, first.bytes) == (48, 40, (dog / "1.png").stat().st_size)
    assert (first.caption, first.has_caption) == ("a dog\non grass", True)
    assert (second.caption, third.caption, third.has_caption) == ("a dog in snow", "", False)


def test_a_picture_is_upright(folders: Folders, dog: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise((64, 32)).save(dog / "turned.jpg", exif=exif)
    (row,) = (one for one in questions.dataset(folders, "dog").images if one.file == "turned.jpg")
    assert (row.width, row.height) == (32, 64)
    with Image.open(io.BytesIO(questions.thumbnail(folders, "dog", "turned.jpg", 16))) as small:
        assert small.format == "WEBP" and small.size == (8, 16)


def test_what_cannot_be_read_is_said_of_the_picture(folders: Folders, dog: Path) -> None:
    (dog / "10.png").write_bytes(b"<html>")
    (dog / "2.caption").write_bytes(b"a\x00b")
    (dog / "raw.nef").write_bytes(b"")
    found = questions.dataset(folders, "dog")
    _, second, third = found.images
    assert third.width is None and "is not an image in spite of its name" in third.problem
    assert not second.has_caption and "holds zero bytes" in second.problem
    assert [(one.file, one.reason[:13]) for one in found.skipped] == [("raw.nef", "is a NEF file")]
    with pytest.raises(LorasmithError, match="is not an image"):
        questions.thumbnail(folders, "dog", "10.png")


def test_inner_folders_are_said_and_not_shown(folders: Folders, dog: Path) -> None:
    for inner in ("5_sks dog", "other"):
        (dog / inner).mkdir()
        noise().save(dog / inner / "x.png")
    found = questions.dataset(folders, "dog")
    assert len(found.images) == 3
    assert "1 pictures in the folder 5_sks dog are trained on as well, and not shown here." in found.notes
    assert [one.file for one in found.skipped] == ["other"]


def test_captions_of_a_metadata_file_are_shown_and_a_text_replaces_them(folders: Folders, dog: Path) -> None:
    (dog / "metadata.jsonl").write_text(json.dumps({"file_name": "10.png", "text": "from metadata"}) + "\n")
    assert questions.dataset(folders, "dog").images[2].caption == "from metadata"
    assert write(folders, {"10.png": "mine"}, _10="from metadata") == 1
    assert questions.dataset(folders, "dog").images[2].caption == "mine"


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_that_leave_are_not_followed(folders: Folders, dog: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    noise().save(outside / "secret.png")
    (dog.parent / "leaves").symlink_to(outside)
    (dog / "link.png").symlink_to(outside / "secret.png")
    (folders.base / "elsewhere").mkdir()
    noise().save(folders.base / "elsewhere" / "a.png")
    (dog.parent / "stays").symlink_to(folders.base / "elsewhere")
    assert [row.name for row in questions.datasets(folders).datasets if not row.builtin] == ["dog", "stays"]
    with pytest.raises(UnknownFileError):
        questions.dataset(folders, "leaves")
    found = questions.dataset(folders, "dog")
    assert [one.file for one in found.images] == ["1.png", "2.png", "10.png"]
    assert "1 pictures are links to other folders: neither trained on nor shown here." in found.notes
    following = replace(folders, follow_links=True)
    assert questions.dataset(following, "leaves").images[0].file == "secret.png"
    notes = questions.dataset(following, "dog").notes
    assert "1 pictures are links to other folders: trained on, and not shown here." in notes
    with pytest.raises(UnknownFileError, match="is a link to somewhere else"):
        questions.picture_file(folders, "dog", "link.png")
    assert questions.picture_file(folders, "stays", "a.png") == str(folders.base.resolve() / "elsewhere" / "a.png")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_caption_behind_a_link_is_neither_shown_nor_written_through(
    folders: Folders, dog: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    (dog / "10.txt").symlink_to(secret)
    row = questions.dataset(folders, "dog").images[2]
    assert row.caption == "" and "10.txt is a link out of its folder" in row.problem
    assert "a secret" not in repr(dataset_answers.check_dataset(folders, "dog", settings={"resolution": 32}))
    assert write(folders, {"10.png": "mine"}, _10="") == 1
    assert secret.read_text() == "a secret" and (dog / "10.txt").read_text() == "mine\n"


def test_an_input_folder_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "disk" / "cat").mkdir(parents=True)
    noise().save(tmp_path / "disk" / "cat" / "a.png")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "input").symlink_to(tmp_path / "disk")
    assert questions.dataset(Folders(tmp_path / "base"), "cat").images[0].file == "a.png"


@pytest.mark.parametrize(
    ("asked", "made"), [("Dog", "Dog"), (" my cat ", "my cat"), ("../x", "__x"), ("nul", "_nul"), ("犬", "犬")]
)
def test_a_new_dataset_has_a_safe_name(folders: Folders, asked: str, made: str) -> None:
    assert dataset_change_answers.create_dataset(folders, asked).name == made
    assert (folders.place("input") / made).is_dir()
    for again in (asked, asked.upper()):
        with pytest.raises(dataset_change_answers.TakenNameError, match="already"):
            dataset_change_answers.create_dataset(folders, again)


ADDED: dict[str, tuple[str, str, str]] = {  # name sent, format, name kept
    "plain": ("new.png", "png", "new.png"),
    "capitals": ("NEW.PNG", "png", "NEW.png"),
    "another format": ("new.png", "jpeg", "new.jpg"),
    "jpeg": ("new.jpeg", "jpeg", "new.jpeg"),
    "no suffix": ("new", "webp", "new.webp"),
    "a path": ("C:\\photos\\new.png", "png", "new.png"),
    "leaves": ("../../new.png", "png", "new.png"),
    "taken": ("1.png", "png", "1-2.png"),
    "taken with another suffix": ("1.jpg", "jpeg", "1-2.jpg"),
    "for Windows": ("con.png", "png", "_con.png"),
    "a page": ("x.html", "png", "x.png"),
    "letters": ("füchs 犬?.png", "png", "füchs 犬_.png"),
    "dots": ("a.b.c.png", "png", "a.b.c.png"),
}


@pytest.mark.parametrize("case", ADDED)
def test_an_upload_is_kept_under_a_safe_free_name(folders: Folders, dog: Path, tmp_path: Path, case: str) -> None:
    asked, kind, kept = ADDED[case]
    before = {path.name: path.read_bytes() for path in dog.iterdir()}
    upload = sent(tmp_path, noise(seed=7), kind)
    assert dataset_change_answers.add_image(folders, "dog", file=asked, temporary=upload) == {"added": kept}
    assert {path.name for path in dog.iterdir()} == {*before, kept}
    assert all((dog / name).read_bytes() == content for name, content in before.items())
    assert not Path(upload).exists()


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("a.png", b"", "is empty"),
        ("a.png", b"<html><script>", "is not an image in spite of its name"),
        ("a.svg", b"<svg/>", "is a SVG file, which is not read here"),
        ("a.png", b"\x89PNG\r\n\x1a\n broken", "is not an image|is damaged"),
        ("a.mp4", b"", "is a video, which the page does not take; save it as an animated WebP"),
    ],
)
def test_what_is_no_picture_is_not_kept(
    folders: Folders, dog: Path, tmp_path: Path, file: str, content: bytes, reason: str
) -> None:
    before = sorted(dog.iterdir())
    answer = dataset_change_answers.add_image(folders, "dog", file=file, temporary=sent(tmp_path, content))
    assert sorted(dog.iterdir()) == before
    assert re.match(reason, answer["skipped"])


def test_formats_name_what_is_read_and_why_others_are_not(folders: Folders, dog: Path, tmp_path: Path) -> None:
    found = dataset_change_answers.formats(folders)
    assert {".png", ".jpg", ".webp", ".gif"} <= set(found.pictures)
    assert not set(found.pictures) & found.refused.keys()
    assert found.captions == (".txt", ".caption")
    assert found.refused[".jxl"] == "is a JXL file, which is not read here; convert it to PNG or JPEG"
    for suffix in (".jxl", ".mov", ".psd"):
        answer = dataset_change_answers.add_image(folders, "dog", file=f"a{suffix}", temporary=sent(tmp_path, noise()))
        assert answer == {"skipped": found.refused[suffix]}


MASKS = {
    "1.mask.png": "1.mask.png",
    "1.MASK.PNG": "1.mask.png",
    "1.mask.jpg": "1.mask.png",
    "new.mask.png": "10.mask.png",
}


@pytest.mark.parametrize("file", MASKS)
def test_a_mask_finds_its_picture_replaces_the_former_one_and_is_removed(
    folders: Folders, dog: Path, tmp_path: Path, file: str
) -> None:
    image = "10.png" if file.startswith("new") else ""  # renamed in the same upload
    of, kept = image or "1.png", MASKS[file]

    def added(grey: int) -> dict[str, str]:
        upload = sent(tmp_path, Image.new("L", (8, 8), grey))
        return dataset_change_answers.add_mask(folders, "dog", file=file, temporary=upload, image=image)

    assert added(9) == {"added": kept}
    again = added(255)
    assert again["added"] == kept and (folders.base / again["replaced"] / kept).is_file()
    assert {one.file: one.mask for one in questions.dataset(folders, "dog").images}[of] == kept
    shown = Image.open(io.BytesIO(questions.thumbnail(folders, "dog", of, 16, mask=True)))
    assert shown.convert("L").getpixel((4, 4)) == 255
    removed = dataset_change_answers.remove_mask(folders, "dog", of).removed
    assert not list(dog.glob("*mask*"))
    assert dataset_change_answers.restore_removed(folders, "dog", removed=removed).changed == 1
    assert (dog / kept).is_file()


def test_a_mask_without_its_picture_is_refused(folders: Folders, dog: Path, tmp_path: Path) -> None:
    answer = dataset_change_answers.add_mask(folders, "dog", file="7.mask.png", temporary=sent(tmp_path, noise()))
    assert answer == {"skipped": "is a mask, and no photo is called 7; add that too"}
    with pytest.raises(UnknownFileError, match=r"2\.png in dog has no mask"):
        dataset_change_answers.remove_mask(folders, "dog", "2.png")


def test_a_copy_is_not_kept_twice(folders: Folders, dog: Path, tmp_path: Path) -> None:
    answer = dataset_change_answers.add_image(
        folders, "dog", file="copy.png", temporary=sent(tmp_path, (dog / "2.png").read_bytes())
    )
    assert answer == {"skipped": "is in the dataset already, as 2.png", "same": "2.png"}


def test_a_dataset_has_a_cap(folders: Folders, dog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_change_answers, "MOST_IMAGES", 4)
    given = [
        dataset_change_answers.add_image(folders, "dog", file="n.png", temporary=sent(tmp_path, noise(seed=seed)))
        for seed in (8, 9)
    ]
    assert given[0] == {"added": "n.png"} and "one too many" in given[1]["skipped"]


CAPTIONS: dict[str, tuple[dict[str, str], bytes, dict[str, str]]] = {
    "of a picture": ({"file": "10.txt"}, b"ten\r\nlines", {"added": "10.txt"}),
    "of another name": ({"file": "new.txt", "image": "10.png"}, b"ten", {"added": "10.txt"}),
    "in capitals": ({"file": "10.TXT"}, b"ten", {"added": "10.txt"}),
    "without a picture": ({"file": "11.txt"}, b"x", {"skipped": "has no picture of the same name; add that too"}),
    "the same": ({"file": "1.txt"}, b"a dog on grass", {"added": "1.txt"}),
    "another": (
        {"file": "1.txt"}, b"a cat", {"skipped": "is left out, as 1.png has another caption; change that instead"}
    ),
    "no text": ({"file": "10.txt"}, b"\x00", {"skipped": "is not text, as it holds zero bytes; save it as UTF-8"}),
    "elsewhere": ({"file": "../10.txt"}, b"ten", {"added": "10.txt"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CAPTIONS)
def test_an_uploaded_text_is_a_caption(folders: Folders, dog: Path, tmp_path: Path, case: str) -> None:
    arguments, content, answer = CAPTIONS[case]
    before = {path.name: path.read_bytes() for path in dog.iterdir()}
    assert dataset_change_answers.add_caption(folders, "dog", temporary=sent(tmp_path, content), **arguments) == answer
    if "skipped" in answer:
        assert {path.name: path.read_bytes() for path in dog.iterdir()} == before
    else:
        assert (dog / answer["added"]).read_text().split() == content.decode().split()


def test_a_caption_file_that_cannot_be_read_is_set_aside(folders: Folders, dog: Path) -> None:
    (dog / "1.txt").write_bytes(b"zero\x00byte")
    assert write(folders, {"1.png": "new"}, _1="") == 1
    assert (dog / "1.txt").read_text() == "new\n"
    (aside,) = (folders.base / "user/lorasmith/removed").rglob("1.txt")
    assert aside.read_bytes() == b"zero\x00byte"


def test_what_is_removed_comes_back(folders: Folders, dog: Path) -> None:
    before = {one.name: one.read_bytes() for one in dog.iterdir()}
    removed = dataset_change_answers.remove_image(folders, "dog", "1.png").removed
    for elsewhere in ("user/lorasmith/removed", "input/dog", f"{removed}/..", removed.replace("-dog", "-cat"), "/etc"):
        with pytest.raises(UnknownFileError, match="there is nothing in"):
            dataset_change_answers.restore_removed(folders, "dog", removed=elsewhere)
    (dog / "1.txt").write_text("another one")
    with pytest.raises(dataset_change_answers.TakenNameError, match=r"there is a file 1\.txt in dog again"):
        dataset_change_answers.restore_removed(folders, "dog", removed=removed)
    (dog / "1.txt").unlink()
    assert dataset_change_answers.restore_removed(folders, "dog", removed=removed).changed == 2
    assert {one.name: one.read_bytes() for one in dog.iterdir()} == before
    with pytest.raises(UnknownFileError):
        dataset_change_answers.restore_removed(folders, "dog", removed=removed)


def test_a_check_says_what_is_wrong_with_each_picture(folders: Folders, dog: Path) -> None:
    noise((300, 60)).save(dog / "wide.png")
    (dog / "broken.png").write_bytes(b"x")
    square = {"resolution": 32, "bucket_min": 32, "bucket_max": 32, "batch_size": 2}
    found = dataset_answers.check_dataset(folders, "dog", model="lorasmith-tiny", settings=square)
    kinds = {one.kind: one for one in found.findings}
    assert kinds["cut pictures"].files == ("wide.png",) and kinds["cut pictures"].severity == "warning"
    assert kinds["missing captions"].files == ("10.png", "wide.png")
    assert all("--" not in one.message and one.message.endswith(".") for one in found.findings)
    assert [one.file for one in found.skipped] == ["broken.png"]
    wide = found.images["wide.png"]
    assert any("cut off" in one for one in wide.problems)
    assert wide.crop.x > 0 and wide.crop.width < 1 and wide.crop.height == 1 and wide.crop.y == 0
    assert wide.trained == (32, 32)
    assert found.images["1.png"].tokens and not found.images["1.png"].problems
    assert found.resolutions == (32,) and not found.assumed and found.samples_per_epoch == 4


def test_of_copies_the_one_with_a_mask_is_kept(folders: Folders, dog: Path) -> None:
    for copy in ("0.png", "3.png"):
        (dog / copy).write_bytes((dog / "2.png").read_bytes())
    Image.new("L", (48, 40), 255).save(dog / "3.mask.png")
    for settings in ({}, {"masks": "files"}):
        (finding,) = [one for one in dataset_answers.check_dataset(folders, "dog", settings=settings).findings
                      if one.kind == "copies"]  # fmt: skip
        assert set(finding.removes) == {"0.png", "2.png"}


def test_a_dataset_without_usable_pictures_is_a_finding(folders: Folders) -> None:
    dataset_change_answers.create_dataset(folders, "new")
    empty = dataset_answers.check_dataset(folders, "new")
    assert empty.findings == () and empty.images == {}
    (folders.place("input") / "new" / "a.png").write_bytes(b"x")
    (finding,) = dataset_answers.check_dataset(folders, "new").findings
    assert finding.severity == "problem" and "holds no usable image" in finding.message
    assert dataset_answers.check_dataset(folders, "new").skipped[0].file == "a.png"


def test_what_is_said_of_pairs_is_a_sentence_without_flags(folders: Folders, dog: Path) -> None:
    (dog / "control").mkdir()
    picture = next(iter(sorted(dog.glob("*.png"))))
    (dog / "control" / picture.name).write_bytes(picture.read_bytes())
    found = {one.kind: one.message for one in dataset_answers.check_dataset(folders, "dog").findings}
    assert found["missing controls"].endswith(
        "; add a file of the same name to the folder of controls, or choose controls optional."
    )
    assert found["unchanged pairs"].endswith("; replace it, as the model learns to change nothing.")


@pytest.fixture
def pairs(folders: Folders, dog: Path, tmp_path: Path) -> Path:
    """The controls of `1.png` and `2.png`, and one of no picture."""
    for number, name in enumerate(("1.png", "2.jpg", "other.png"), start=1):
        file = sent(tmp_path, noise(seed=20 + number), "jpeg" if name.endswith("jpg") else "png")
        answer = dataset_change_answers.add_image(folders, "dog", file=f"Before/control/{name}", temporary=file)
        assert answer == {"added": f"control/{name}"}
    return dog / "control"


def controls(folders: Folders) -> dict[str, list[str]]:
    found = questions.dataset(folders, "dog")
    rows = {one.file: [control.file for control in one.controls] for one in found.images}
    return rows | {"": [one.file for one in found.controls]}


def test_a_dataset_that_has_only_controls_is_listed(folders: Folders, dog: Path, pairs: Path) -> None:
    for path in [one for one in dog.iterdir() if one.is_file()]:
        path.unlink()
    row = next(row for row in questions.datasets(folders).datasets if row.name == "dog")
    assert (row.images, row.cover) == (0, None)
    assert controls(folders) == {"": ["1.png", "2.jpg", "other.png"]}


def test_controls_are_shown_beside_their_pictures(folders: Folders, dog: Path, pairs: Path) -> None:
    assert controls(folders) == {"1.png": ["1.png"], "2.png": ["2.jpg"], "10.png": [], "": ["other.png"]}
    (first, *_) = questions.dataset(folders, "dog").images
    assert [(one.width, one.height, one.fixed, one.problem) for one in first.controls] == [(48, 40, False, "")]
    assert questions.picture_file(folders, "dog", "2.jpg", control=True) == str((pairs / "2.jpg").resolve())
    with Image.open(io.BytesIO(questions.thumbnail(folders, "dog", "1.png", 16, control=True))) as small:
        assert small.width == 16
    (pairs / "1.png").write_bytes(b"<html>")
    (dog / "control_1").mkdir()
    noise().save(dog / "control_1" / "10.png")
    first, _, third = questions.dataset(folders, "dog").images
    assert "is not an image" in first.controls[0].problem
    assert third.controls[0].fixed and third.controls[0].file == str(dog / "control_1" / "10.png")
    with pytest.raises(UnknownFileError, match="there is no picture"):
        questions.picture_file(folders, "dog", "../1.png", control=True)


def test_controls_are_given_to_other_pictures(folders: Folders, pairs: Path) -> None:
    content = {one.name: one.read_bytes() for one in pairs.iterdir()}
    assert dataset_change_answers.pair_control(folders, "dog", "1.png", "2.png").changed == 2
    assert controls(folders)["1.png"] == ["1.jpg"] and controls(folders)["2.png"] == ["2.png"]
    assert (pairs / "2.png").read_bytes() == content["1.png"] and (pairs / "1.jpg").read_bytes() == content["2.jpg"]
    assert dataset_change_answers.pair_control(folders, "dog", "2.png", "2.png").changed == 0
    assert dataset_change_answers.pair_control(folders, "dog", "other.png", "10.png").changed == 1
    assert controls(folders) == {"1.png": ["1.jpg"], "2.png": ["2.png"], "10.png": ["10.png"], "": []}
    for control, image in (("gone.png", "1.png"), ("1.jpg", "gone.png"), ("../1.png", "1.png")):
        with pytest.raises(UnknownFileError, match="there is no picture"):
            dataset_change_answers.pair_control(folders, "dog", control, image)
    with pytest.raises(OutputError, match="belongs to Lorasmith"):
        dataset_change_answers.pair_control(folders, "fox", "1.png", "fox_1.png")


def test_a_control_is_replaced_and_removed(folders: Folders, pairs: Path, tmp_path: Path) -> None:
    before = (pairs / "1.png").read_bytes()
    file = sent(tmp_path, noise(seed=9), "jpeg")
    added = dataset_change_answers.add_image(folders, "dog", file="control/1.jpg", temporary=file)
    assert added["added"] == "control/1.jpg" and (folders.base / added["replaced"] / "1.png").exists()
    assert controls(folders)["1.png"] == ["1.jpg"]
    removed = folders.base / "user" / "lorasmith" / "removed"
    assert [one.read_bytes() for one in removed.rglob("1.png")] == [before]
    dataset_change_answers.remove_control(folders, "dog", "1.jpg")
    assert controls(folders)["1.png"] == [] and list(removed.rglob("1.jpg"))
    junk = sent(tmp_path, b"<html>")
    assert "skipped" in dataset_change_answers.add_image(folders, "dog", file="control/2.png", temporary=junk)


def test_a_folder_of_controls_elsewhere_is_left_alone(folders: Folders, dog: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    noise().save(tmp_path / "elsewhere" / "stray.png")
    (dog / "control").symlink_to(tmp_path / "elsewhere")
    assert controls(folders)[""] == []
    with pytest.raises(OutputError, match="is a link to somewhere else"):
        dataset_change_answers.add_image(folders, "dog", file="control/1.png", temporary=sent(tmp_path, noise()))
    with pytest.raises(UnknownFileError, match="is a link"):
        dataset_change_answers.remove_control(folders, "dog", "stray.png")
