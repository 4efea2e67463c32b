from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from lorasmith.data.metadata_files import (
    MAX_CAPTIONS,
    Metadata,
    MetadataError,
    is_metadata_name,
    preferred_metadata,
    read_metadata,
)
from tests.processor_time import processor_time

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def read(folder: Path, content: str | bytes, name: str = "metadata.jsonl") -> Metadata:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_metadata(folder / name)


def lines(*entries: Any) -> str:
    return "\n".join(json.dumps(entry) for entry in entries) + "\n"


def test_json_lines_of_hugging_face(tmp_path: Path) -> None:
    content = lines(
        {"file_name": "1.png", "text": "a dog"},
        {"file_name": "sub/2.png", "text": ["a cat", "two cats"], "extra": 3},
        {"file_name": "./3.png", "text": None},
        {"file_name": "4.png"},
        {"file_name": "1.png", "text": "another dog"},
    )
    assert read(tmp_path, "\ufeff" + content).captions == {
        "1.png": ("a dog", "another dog"),
        "sub/2.png": ("a cat", "two cats"),
        "3.png": (),
        "4.png": (),
    }


def test_which_column_has_the_text(tmp_path: Path) -> None:
    found = read(
        tmp_path, lines({"file_name": "1.png", "prompt": "p", "caption": "c"}, {"image_path": "2", "text": "t"})
    )
    assert found.captions == {"1.png": ("c",), "2": ("t",)}


def test_csv(tmp_path: Path) -> None:
    content = 'text,file_name,n\r\n"a dog, on a beach",1.png,1\r\n"two\r\nlines",2.png,2\r\n,3.png,3\r\n'
    found = read(tmp_path, content, "metadata.csv")
    assert found.captions == {"1.png": ("a dog, on a beach",), "2.png": ("two\r\nlines",), "3.png": ()}


def test_kohya_s_json(tmp_path: Path) -> None:
    content = {
        "1": {"caption": "a dog", "tags": "beach, sea", "train_resolution": [512, 512]},
        str(tmp_path / "sub" / "2.png"): {"tags": ["red", "blue"]},
        "3.png": {"caption": ["a", "b"], "tags": "c"},
        "4.png": {"image_size": [1, 2]},
    }
    found = read(tmp_path, json.dumps(content), "meta_lat.json")
    assert found.captions == {
        "1": ("a dog, beach, sea",),
        "sub/2.png": ("red, blue",),
        "3.png": ("a, c", "b, c"),
        "4.png": (),
    }
    assert [found.entry(key) for key in ("1.png", "1.jpg", "sub/2.png", "2.png")] == ["1", "1", "sub/2.png", None]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"file_name": ["1.png", "2.png"], "caption": [["a", "b"], None]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    assert read_metadata(tmp_path / "metadata.parquet").captions == {"1.png": ("a", "b"), "2.png": ()}
    with pytest.raises(MetadataError, match="is not valid parquet"):
        read(tmp_path, (tmp_path / "metadata.parquet").read_bytes()[:-9], "metadata.parquet")


REPEATED: dict[str, tuple[dict[str, Any], str]] = {
    "a long caption": ({"text": ["x"]}, "unpacks to more than 536,870,912 bytes"),
    "a list of nothing": ({"text": ["a"] * 200, "control": [[None] * 10_000] * 200}, "has 2,000,400 values in file_n"),
    "a row": ({"text": ["a"] * 600_000}, "has 1,200,000 values in file_name, text, and 1,000,000 are the most"),
}


@pytest.mark.parametrize("name", REPEATED)
def test_what_is_repeated_in_parquet_is_not_unpacked(tmp_path: Path, name: str) -> None:
    """Valid files of a few kilobytes, which are gigabytes or minutes as rows."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns, sentence = REPEATED[name]
    if len(columns["text"]) == 1:
        columns = {"text": pyarrow.DictionaryArray.from_arrays([0] * 200, ["x" * 20_000_000])}
    table = pyarrow.table({"file_name": ["1.png"] * len(columns["text"]), **columns})
    parquet.write_table(table, tmp_path / "metadata.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "metadata.parquet").stat().st_size < 200_000
    with pytest.raises(MetadataError, match=sentence), processor_time(at_most_s=3):
        read_metadata(tmp_path / "metadata.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MetadataError, match="needs pyarrow, which is not installed; run pip install pyarrow"):
        read(tmp_path, b"PAR1", "metadata.parquet")


def test_names_never_leave_the_folder(tmp_path: Path) -> None:
    for name in ["../1.png", "a/../../1.png", "/etc/passwd", "..\\1.png", "C:\\1.png", "..", ".", "", "//host/x.png"]:
        found = read(tmp_path, lines({"file_name": name, "text": "x"}))
        assert (found.captions, found.outside) == ({}, [name])


def test_names_inside_of_the_folder(tmp_path: Path) -> None:
    names = ("a/../1.png", "a\\2.png", f"{tmp_path}/3.png", f"{tmp_path}/x/../4.png")
    found = read(tmp_path, lines(*({"file_name": name, "text": "x"} for name in names)))
    assert list(found.captions) == ["1.png", "a/2.png", "3.png", "4.png"]


def test_names_in_another_form_of_unicode(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    for written, stored in ((composed, decomposed), (decomposed, composed)):
        found = read(tmp_path, lines({"file_name": written, "text": "x"}))
        assert found.captions[str(found.entry(stored))] == ("x",)


def test_captions_that_cannot_be_used(tmp_path: Path) -> None:
    for text, reason in [
        (3, "has a caption that is not text"),
        ({"en": "x"}, "has a caption that is not text"),
        (["a", 1], "has a caption that is not text"),
        ("a\x00b", "has a caption that is not text, as it holds zero bytes"),
        ("x" * 20_001, "has a caption of more than 20,000 characters"),
        (["x"] * (MAX_CAPTIONS + 1), f"has more than {MAX_CAPTIONS} captions"),
    ]:
        found = read(tmp_path, lines({"file_name": "1.png", "text": text}, {"file_name": "2.png", "text": "a"}))
        assert (found.refused, found.captions) == ({"1.png": reason}, {"2.png": ("a",)})
        assert found.entry("1.png") == "1.png"


def test_what_is_no_metadata(tmp_path: Path) -> None:
    for name, content, reason, damaged in [
        ("metadata.jsonl", lines({"file_name": "1"}) + "{", "is not valid JSON in line 2", True),
        ("metadata.jsonl", lines({"file_name": "1"}, ["x"]), "has no file_name in line 2", True),
        ("metadata.jsonl", "{}", "has no file_name in line 1", False),
        ("metadata.jsonl", b"\xff\xfe\x00", "is not text in UTF-8", True),
        ("metadata.jsonl", '{"file_name": ' + "[" * 100_000, "nested deeper than 100 in line 1", True),
        ("metadata.json", "[1, 2]", "holds no captions by image", False),
        ("metadata.json", '{"version": 1}', "holds no captions by image", False),
        ("metadata.json", "{}", "holds no captions by image", False),
        ("metadata.json", '{"1": {}, "1": {}}', "has a name twice in one object", True),
        ("metadata.json", '{"a":' * 200 + "1" + "}" * 200, "nested deeper than 100", True),
        ("metadata.csv", "name,text\na,b\n", "has no column file_name", False),
        ("metadata.csv", "file_name,label\na,b\n", "has none of the columns text, caption, prompt", False),
        ("metadata.csv", "", "has no column file_name", False),
        ("metadata.csv", "file_name,text\na\n", "has too few values in line 2", True),
        ("metadata.csv", 'file_name,text\na,"' + "x" * 200_000, "is not valid CSV", True),
    ]:
        with pytest.raises(MetadataError, match=reason) as caught:
            read(tmp_path, content, name)
        assert caught.value.damaged is damaged


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").mkdir()
    with pytest.raises(MetadataError, match=r"cannot be read \(it is a folder, not a file\)"):
        read_metadata(tmp_path / "metadata.json")


def test_the_examples_of_the_page(tmp_path: Path) -> None:
    blocks = dict(re.findall(r"```(jsonl|csv|json)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL))
    found = {form: read(tmp_path, content, f"metadata.{form}").captions for form, content in blocks.items()}
    assert found == {
        "jsonl": {"1.jpg": ("a dog on a beach",), "more/2.png": ("a cat", "a cat on a chair")},
        "csv": {"1.jpg": ("a dog, on a beach",), "more/2.png": ("a cat",)},
        "json": {"1": ("a dog on a beach, outdoors, sea",), "more/2.png": ("cat, chair",)},
    }


def test_which_files_are_metadata() -> None:
    names = ("metadata.json", "meta_lat.json", "metadata.jsonl", "metadata.csv", "metadata.parquet")
    assert all(map(is_metadata_name, names))
    assert not any(map(is_metadata_name, ("meta.json", "metadata.txt", "config.json", "my_metadata.csv")))
    assert preferred_metadata(names) == "metadata.jsonl"
    assert preferred_metadata(["meta_cap.json", "meta_lat.json", "meta_clean.json"]) == "meta_lat.json"
    assert preferred_metadata(["meta_cap.json", "metadata.json"]) == "metadata.json"
