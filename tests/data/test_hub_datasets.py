"""Datasets of the package `datasets`; most of these tests need it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.core.errors import DataError
from lorasmith.data.data_config import ImageSource
from lorasmith.data.encoding import load_dataset
from lorasmith.data.folder import scan_folder, scan_sources
from lorasmith.data.hub_datasets import dataset_folder, is_saved_dataset, unpacked_folder
from lorasmith.families.model import Model
from tests.data.folder_cases import add_image
from tests.processor_time import processor_time


def picture(form: str, shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (shade, 0, 0)).save(file, form)
    return file.getvalue()


@pytest.fixture
def datasets() -> Any:
    return pytest.importorskip("datasets")


def made(datasets: Any, **columns: list[Any]) -> Any:
    features = datasets.Dataset.from_dict(columns).features
    features["image"] = datasets.Image()
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def rows(*contents: bytes | None) -> list[Any]:
    return [content and {"bytes": content, "path": None} for content in contents]


def test_a_dataset_becomes_a_folder(datasets: Any, tmp_path: Path) -> None:
    contents = [picture("PNG"), picture("JPEG")]
    data = made(datasets, image=rows(*contents), text=["a dog", "a cat"], label=[1, 2])
    folder = dataset_folder(data, tmp_path / "cache")
    scan = scan_folder(folder)
    assert [(image.path.name, image.caption) for image in scan.images] == [("0.png", "a dog"), ("1.jpeg", "a cat")]
    assert [image.path.read_bytes() for image in scan.images] == contents
    assert dataset_folder(data, tmp_path / "cache") == folder
    assert dataset_folder(data.select([1]), tmp_path / "cache") != folder
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")] == []


def test_a_list_of_captions_and_the_caller_s_own_files(datasets: Any, tmp_path: Path) -> None:
    path = add_image(tmp_path / "own.png")
    data = made(datasets, image=[str(path)], caption=[["a", "b"]])
    (image,) = scan_folder(dataset_folder(data, tmp_path / "cache")).images
    assert image.captions == ("a", "b")
    path.unlink()
    with pytest.raises(DataError, match=r"own\.png of a dataset cannot be read"):
        dataset_folder(data, tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_a_saved_dataset_is_a_source(datasets: Any, tmp_path: Path) -> None:
    data = made(datasets, image=rows(picture("PNG"), None), text=["a dog", "gone"])
    data.save_to_disk(tmp_path / "saved")
    assert is_saved_dataset(tmp_path / "saved")
    source = ImageSource(str(tmp_path / "saved"), repeats=3)
    scan = scan_sources([source], cache=tmp_path / "cache")
    assert [(image.caption, image.repeats) for image in scan.images] == [("a dog", 3)]
    assert scan.notes == ("1 entry of metadata files has no image here, such as row 1 without a picture",)
    with pytest.raises(DataError, match="needs a folder for its images"):
        scan_sources([source])


def test_a_saved_dataset_names_no_files_elsewhere(
    datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = add_image(tmp_path / "secret.png")
    data = made(datasets, image=[str(secret)], text=["x"])
    # As a stranger may write it: with the path alone.
    monkeypatch.setattr("datasets.Image.embed_storage", lambda self, storage, *_, **__: storage)
    data.save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(str(tmp_path / "saved")).cast_column("image", datasets.Image(decode=False))
    assert loaded[0]["image"] == {"bytes": None, "path": str(secret)}
    with pytest.raises(DataError, match="holds no images"):
        scan_sources([ImageSource(str(tmp_path / "saved"))], cache=tmp_path / "cache")


@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "/etc/x.arrow", "..", 3])
def test_a_saved_dataset_lists_no_files_elsewhere(tmp_path: Path, name: object) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match=r"cannot be read \(state\.json: .*\); save it again"):
        unpacked_folder(tmp_path, tmp_path / "cache")
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(DataError, match=r"cannot be read \(dataset_dict\.json: .*\); save it again"):
        unpacked_folder(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("name", ["data.arrow", "state.json"])
def test_a_saved_dataset_has_no_files_behind_links(tmp_path: Path, name: str) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    for file, content in (("dataset_info.json", "{}"), ("state.json", '{"_data_files": [{"filename": "data.arrow"}]}')):
        (saved / file).write_text(content)
    (saved / name).unlink(missing_ok=True)
    (tmp_path / name).write_text('{"_data_files": []}')
    (saved / name).symlink_to(tmp_path / name)
    with pytest.raises(DataError, match="a file of it is a link out of its folder"):
        unpacked_folder(saved, tmp_path / "cache")


def test_a_forged_fingerprint_gives_no_other_dataset(datasets: Any, tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        made(datasets, image=rows(picture("PNG", number)), text=[name]).save_to_disk(tmp_path / name)
        state = json.loads((tmp_path / name / "state.json").read_text())
        (tmp_path / name / "state.json").write_text(json.dumps({**state, "_fingerprint": "same"}))
    scans = [scan_sources([ImageSource(str(tmp_path / name))], cache=tmp_path / "cache") for name in "ab"]
    assert [scan.images[0].caption for scan in scans] == ["a", "b"]


def test_a_small_file_does_not_fill_the_disk(datasets: Any, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    made(datasets, image=rows(bytes(2**20))).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    table = arrow.ipc.open_stream(file.read_bytes()).read_all()
    with arrow.ipc.new_stream(file, table.schema, options=arrow.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_table(table)
    with pytest.raises(DataError, match="more bytes of pictures and captions than its files"):
        unpacked_folder(tmp_path / "saved", tmp_path / "cache")
    assert not [*(tmp_path / "cache").iterdir()]


@pytest.mark.parametrize("column", ["image", "text"])
def test_a_value_that_is_repeated_fills_neither_disk_nor_memory(datasets: Any, tmp_path: Path, column: str) -> None:
    """A run-length or a dictionary has a million rows in a few bytes."""
    arrow = pytest.importorskip("pyarrow")
    made(datasets, image=rows(picture("PNG", 1)), text=["a"]).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    table = arrow.ipc.open_stream(file.read_bytes()).read_all()
    count = 100_000 if column == "image" else 50
    if column == "image":
        repeated = arrow.table({"image": arrow.nulls(count), "text": arrow.nulls(count)})
    else:
        texts = arrow.DictionaryArray.from_arrays([0] * count, ["x" * 10_000])
        repeated = arrow.table({"image": table.column("image").combine_chunks().take([0] * count), "text": texts})
    with arrow.ipc.new_stream(file, repeated.schema) as stream:
        stream.write_table(repeated)
    with processor_time(at_most_s=5), pytest.raises(DataError, match="cannot be read"):
        unpacked_folder(tmp_path / "saved", tmp_path / "cache")


def test_damage_that_its_rows_show_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        """Stands for `datasets`, whose rows raise what pyarrow does for offsets that lead nowhere."""

        @staticmethod
        def load_from_disk(folder: str, keep_in_memory: bool) -> Any:
            return Package()

        @property
        def features(self) -> Any:
            raise SystemError("Negative size passed to PyBytes_FromStringAndSize")

    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text('{"_data_files": []}')
    monkeypatch.setitem(sys.modules, "datasets", Package)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"cannot be read \(Negative size"):
        unpacked_folder(tmp_path, tmp_path / "cache")


def test_splits(datasets: Any, tmp_path: Path) -> None:
    one, two = (made(datasets, image=rows(picture("PNG", n)), text=[str(n)]) for n in (1, 2))
    datasets.DatasetDict({"test": one, "train": two}).save_to_disk(tmp_path / "both")
    assert scan_sources([ImageSource(str(tmp_path / "both"))], cache=tmp_path / "c").images[0].caption == "2"
    datasets.DatasetDict({"test": one, "x": two}).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match="has no split train; name the folder of one of its splits"):
        unpacked_folder(tmp_path / "other", tmp_path / "c")
    assert is_saved_dataset(tmp_path / "other" / "x")


def test_what_is_no_dataset_of_images(datasets: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must have a column of images, got the columns text"):
        dataset_folder(datasets.Dataset.from_dict({"text": ["a"]}), tmp_path)
    with pytest.raises(DataError, match=r"must be a datasets\.Dataset, got dict"):
        dataset_folder({}, tmp_path)
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=r"cannot be read .*save it again with save_to_disk"):
        unpacked_folder(tmp_path, tmp_path / "cache")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": []}))
    assert not is_saved_dataset(tmp_path)
    (tmp_path / "dataset_info.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match="needs the package of this name; run pip install datasets"):
        scan_sources([ImageSource(str(tmp_path))], cache=tmp_path / "cache")


def test_a_dataset_that_streams_is_read_as_items(datasets: Any, tiny: Model) -> None:
    data = made(datasets, image=rows(picture("PNG"), picture("PNG", 90)), text=["a dog", "a cat"])
    found = load_dataset(data.to_iterable_dataset(), tiny, resolution=32)
    assert [sample.conditioning.text for sample in found] == ["a dog", "a cat"]
    with pytest.raises(DataError, match=r"must be a datasets\.Dataset, got DatasetDict; choose a split"):
        load_dataset(datasets.DatasetDict({"train": data}), tiny)


def test_columns_of_controls(datasets: Any, tmp_path: Path) -> None:
    columns = {
        "control": rows(picture("PNG", 1), picture("JPEG", 2)),
        "image": rows(picture("PNG", 3), picture("PNG", 4)),
        "edit_image": [rows(picture("PNG", 5)), rows(picture("PNG", 6), picture("PNG", 7))],
        "prompt": ["make it blue", "again"],
        "control_path": ["/etc/hostname", "x"],  # not of pictures
    }
    features = datasets.Dataset.from_dict(columns).features
    features["image"] = features["control"] = datasets.Image()
    features["edit_image"] = datasets.Sequence(datasets.Image())
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    folder = dataset_folder(data, tmp_path / "cache")
    scan = scan_folder(folder)
    assert [one.caption for one in scan.images] == ["make it blue", "again"]
    assert [[c.path.relative_to(folder).as_posix() for c in one.controls] for one in scan.images] == [
        ["control/0.png", "control_1/0.png"],
        ["control/1.jpeg", "control_1/1.png", "control_2/1.png"],
    ]
    data.save_to_disk(tmp_path / "saved")
    again = scan_sources([ImageSource(str(tmp_path / "saved"))], cache=tmp_path / "other")
    assert [len(one.controls) for one in again.images] == [2, 3]
