from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core import foreign_json
from lorasmith.core.errors import LoraError, ModelError, OutputError
from lorasmith.formats.container import check_safetensors, read_safetensors, serialised, write_safetensors
from tests.processor_time import processor_time

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def header_file(path: Path, header: object, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@given(
    st.dictionaries(
        TEXT.filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3).map(tuple)),
        max_size=6,
    ),
    st.dictionaries(TEXT, TEXT, max_size=4),
)
def test_body_is_that_of_the_reference_writer(named, metadata) -> None:
    tensors = {name: tensor_of(dtype, shape) for name, (dtype, shape) in named.items()}
    ours = b"".join(serialised(tensors, metadata))
    reference = safetensors.torch.save(tensors, metadata or None)
    assert len(ours) == len(reference)
    start = 8 + int.from_bytes(ours[:8], "little")
    assert start % 8 == 0
    assert ours[start:] == reference[start:]
    assert json.loads(ours[8:start]) == json.loads(reference[8:start])
    shuffled = dict(reversed(metadata.items()))
    assert b"".join(serialised(dict(reversed(tensors.items())), shuffled)) == ours


def test_reads_what_was_written(tmp_path: Path) -> None:
    tensors = {f"t{i}": tensor_of(dtype, (2, 3)) for i, dtype in enumerate(DTYPES)}
    metadata = {"b": "ß", "a": "\x00\n\"'\\"}
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
    read, header = read_safetensors(tmp_path / "x.safetensors")
    assert header == metadata
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in tensors)
    checked = check_safetensors(tmp_path / "x.safetensors")
    assert checked.tensors["t9"] == ("F16", (2, 3))
    write_safetensors(tmp_path / "y.safetensors", read, header)
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_strided_tensors_and_lone_surrogates_are_written(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    write_safetensors(tmp_path / "x.safetensors", {"t": matrix.T}, {"caption": "a\udcff"})
    read, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert torch.equal(read["t"], matrix.T)
    assert metadata == {"caption": "a?"}


def test_never_writes_a_non_finite_tensor(tmp_path: Path) -> None:
    for dtype in [torch.float16, torch.float32, torch.float8_e5m2]:
        for value in [float("nan"), float("inf")]:
            target = tmp_path / "x.safetensors"
            target.write_bytes(b"old")
            with pytest.raises(LoraError, match=r"never written, and some\.name holds 1 such value"):
                write_safetensors(target, {"fine": torch.zeros(1), "some.name": torch.tensor([0, value]).to(dtype)})
            assert target.read_bytes() == b"old"
            assert list(tmp_path.iterdir()) == [target]


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="out must be a folder but is a file"):
        write_safetensors(tmp_path / "out" / "x.safetensors", {"t": torch.zeros(1)})


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="is a folder"):
        check_safetensors(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        check_safetensors(tmp_path / "nothing.safetensors", ModelError)


@pytest.mark.parametrize("save", [torch.save, None], ids=["zip", "pickle"])
def test_refuses_pickled_files_and_says_how_to_convert(tmp_path: Path, save) -> None:
    path = tmp_path / "model.ckpt"
    if save is None:
        path.write_bytes(pickle.dumps({"state_dict": list(range(10))}))
    else:
        save({"state_dict": {"w": torch.zeros(2)}}, path)
    with pytest.raises(ModelError, match=r"pickled PyTorch file.*safetensors\.torch\.save_file"):
        check_safetensors(path, ModelError)


def test_refuses_other_content(tmp_path: Path) -> None:
    for content, said in [
        (b"", "has only 0 bytes"),
        (b"12345678", "has only 8 bytes"),
        (b"GGUF\x03\x00\x00\x00\x00\x00", "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"just some text, no model at all", "not a safetensors file"),
        ((2**63).to_bytes(8, "little") + b"{", "9,223,372,036,854,775,808 bytes, more than the 100,000,000"),
        ((99_000_000).to_bytes(8, "little") + b"{", "cut short inside its header"),
    ]:
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(LoraError, match=said):
            read_safetensors(path)


def test_refuses_hostile_headers(tmp_path: Path) -> None:
    for header, said in [
        (b"{nonsense", "not valid JSON"),
        (b"{" * 50_000, "not valid JSON"),
        (b'{"a":' * 50_000, "nested deeper than 100"),
        (b"{\xff", "not text in UTF-8"),
        (b'{"a":1,"a":1}', "a name twice"),
        (b"{", "header of 1 bytes, which is none"),
        (b'{"a":NaN}', "not finite, NaN"),
        (rb'{"a\ud800":1}', "half of a surrogate pair"),
        ('{"a":1}'.encode("utf-16-le"), "not valid JSON"),
        ({"a": {**entry([1], 0, 4), "dtype": ["F32"]}}, "no known dtype"),
        ({"a": entry([2**40, 2**40, 0], 0, 0)}, "more numbers than any file holds"),
        ({"a": entry([1] * 70, 0, 4)}, "70 dimensions, and 16 are the most"),
        ({"a": entry([1] * 1_000_000, 0, 4)}, "1,000,000 dimensions"),
        ({"a" * 1_001: entry([1], 0, 4)}, "more than 1,000 characters"),
        ({"a": 1}, "no known dtype"),
        ({"a": entry([1], 0, 4, "F4")}, "no known dtype"),
        ({"a": entry([2], 0, 4)}, "does not match its bytes"),
        ({"a": entry([-1], 0, 4)}, "no proper shape"),
        ({"a": entry([2**24, 2**24], 0, 4)}, "does not match its bytes"),
        ({"a": entry([1], 4, 0)}, "does not match its bytes"),
        ({"a": entry([1], 4, 8)}, "do not follow"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, "do not follow"),
        ({"a": {**entry([1], 0, 4), "data_offsets": [0, True]}}, "no proper shape"),
        ({"a": {**entry([1], 0, 4), "shape": "1"}}, "no proper shape"),
        ({"__metadata__": {"a": 1}}, "metadata is not text"),
        ({"__metadata__": []}, "metadata is not text"),
        ({"a": entry([1], 0, 4)}, None),
        ({"a": entry([2**30], 0, 2**32)}, "is cut short: its header announces"),
        ({}, "bytes after its last tensor"),
    ]:
        path = header_file(tmp_path / "x.safetensors", header, b"\0\0\0\0")
        if said is None:
            assert check_safetensors(path).tensors == {"a": ("F32", (1,))}
        else:
            with pytest.raises(LoraError, match=said):
                check_safetensors(path)


@given(data=st.data())
def test_every_cut_and_every_flipped_byte_is_refused_or_read(tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    whole = b"".join(serialised({"a": torch.ones(3), "b": torch.ones(2, 2).half()}, {"k": "v"}))
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
        path.write_bytes(damaged)
        with pytest.raises(LoraError):
            read_safetensors(path)
    else:
        place = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:place] + bytes([data.draw(st.integers(0, 255))]) + whole[place + 1 :])
        try:
            tensors, _ = read_safetensors(path)
        except LoraError as error:
            assert "\n" not in str(error)
        else:
            assert sum(tensor.numel() for tensor in tensors.values()) >= 0


def test_a_large_file_is_checked_without_reading_its_tensors(tmp_path: Path) -> None:
    size = 2**33
    text = json.dumps({"a": entry([size], 0, size, "U8")}).encode()
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:  # sparse: takes no space
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    assert check_safetensors(path).tensors["a"].shape == (size,)


def test_a_giant_header_is_refused_before_it_is_taken_apart(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(foreign_json._DECODER, "decode", lambda _: pytest.fail("the header was parsed"))
    for header in (
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(100_001)) + b"}",
        b'{"a":{"dtype":"F32","shape":[' + b"1," * 2_000_000 + b'1],"data_offsets":[0,0]}}',
        b"{" + b'"0":0,' * 2_000_001 + b'"a":0}',
    ):
        with pytest.raises(LoraError, match=r"more tensors than any model|more than 2,000,000 values"):
            check_safetensors(header_file(tmp_path / "x.safetensors", header))


def test_tens_of_thousands_of_tensors_without_numbers_are_read_in_a_moment(tmp_path: Path) -> None:
    path = header_file(tmp_path / "x.safetensors", {f"t{index}": entry([0, 4], 0, 0) for index in range(20_000)})
    with processor_time(at_most_s=2):
        tensors, _ = read_safetensors(path)
    assert len(tensors) == 20_000


def test_a_sentence_stays_one_whatever_the_names(tmp_path: Path) -> None:
    path = header_file(tmp_path / "x.safetensors", {"a" * 1_000_000: 1})
    with pytest.raises(LoraError) as error:
        check_safetensors(path)
    assert len(str(error.value)) < 400


def test_large_metadata_is_read(tmp_path: Path) -> None:
    workflow = json.dumps({"nodes": [{"a": 1, "b": '"dtype"'}] * 300_000})
    write_safetensors(tmp_path / "x.safetensors", {"t": torch.ones(1)}, {"workflow": workflow})
    assert check_safetensors(tmp_path / "x.safetensors").metadata["workflow"] == workflow
