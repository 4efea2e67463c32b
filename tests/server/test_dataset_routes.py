from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData
from PIL import Image

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.server import request_handling, server_disk
from lorasmith.server.datasets import dataset_routes
from lorasmith.server.dispatcher import RefusedError, UnavailableError
from lorasmith.server.request_handling import read_body
from tests.server.api_server import AT, Client, made_up, refusals_of

FOX = BUILT_IN_BASE / "input" / "fox"


def png(colour: str = "red", size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "png")
    return buffer.getvalue()


def form(*files: tuple[str, bytes]) -> FormData:
    data = FormData(quote_fields=False)  # as browsers send names
    for name, content in files:
        data.add_field("file", content, filename=name)
    return data


async def test_a_dataset_from_its_name_to_its_end(client: Client, tmp_path: Path) -> None:
    made = await client.ask("POST", "/datasets", {"name": "Mein Füchs: 1"}, status=201)
    assert made["name"] == "Mein Füchs_ 1"
    at = "/datasets/Mein%20F%C3%BCchs_%201"
    assert "multipart/form-data" in await client.error("POST", f"{at}/images", {})
    files = form(("a.png", png()), ("a.txt", b"a red box"), ("b.PNG", png("blue")), ("c.jpg", b"<html>"))
    answer = await client.ask("POST", f"{at}/images", data=files, status=200)
    assert answer["added"] == ["a.png", "b.png", "a.txt"] and answer["renamed"] == {"b.PNG": "b.png"}
    assert [one["file"] for one in answer["skipped"]] == ["c.jpg"]
    found = await client.ask("GET", at)
    assert [(one["file"], one["caption"], one["width"]) for one in found["images"]] == [
        ("a.png", "a red box", 40),
        ("b.png", "", 40),
    ]
    assert (await client.ask("PUT", f"{at}/captions", {"b.png": "a blue box", "a.png": ""}))["changed"] == 2
    assert [one["caption"] for one in (await client.ask("GET", at))["images"]] == ["", "a blue box"]
    with client.context.hub.subscribe(kinds=("check",)) as notices:
        checked = await client.ask("GET", f"{at}/check?trigger=box&resolution=32&upscale=true&token=x")
        for done in (1, 2):
            assert (await anext(notices)).data == {"name": "Mein Füchs_ 1", "done": done, "total": 2}
    assert set(checked["images"]) == {"a.png", "b.png"} and checked["resolutions"] == [32]
    await client.ask("DELETE", f"{at}/images/a.png")
    rows = {one["name"]: one for one in (await client.ask("GET", "/datasets"))["datasets"]}
    assert rows["Mein Füchs_ 1"]["images"] == 1 and rows["fox"]["builtin"]
    removed = await client.ask("DELETE", at)
    assert (tmp_path / removed["removed"] / "Mein Füchs_ 1" / "b.png").is_file()
    await client.error("GET", at, status=404)
    assert list((tmp_path / "user" / "lorasmith" / "uploads").iterdir()) == []


@pytest.fixture
def dog(tmp_path: Path) -> Path:
    """A dataset of three pictures, two of them with captions."""
    folder = tmp_path / "input" / "dog"
    folder.mkdir(parents=True)
    for number, colour in ((1, "red"), (2, "green"), (10, "blue")):
        (folder / f"{number}.png").write_bytes(png(colour))
    (folder / "1.txt").write_text("a dog\non grass\n")
    (folder / "2.caption").write_text("a dog in snow")
    return folder


CAPTIONS = "/datasets/dog/captions"


async def captions(client: Client) -> list[str]:
    return [one["caption"] for one in (await client.ask("GET", "/datasets/dog"))["images"]]


async def test_captions_are_written_and_taken_away(client: Client, tmp_path: Path, dog: Path) -> None:
    written = {"1.png": "a dog\non grass", "2.png": "", "10.png": "  ten  "}
    assert (await client.ask("PUT", CAPTIONS, written))["changed"] == 2
    assert await captions(client) == ["a dog\non grass", "", "ten"]
    assert not (dog / "2.caption").exists()
    assert len(list((tmp_path / "user/lorasmith/removed").rglob("2.caption"))) == 1


async def test_one_wrong_caption_writes_none(client: Client, dog: Path) -> None:
    for wrong, text, status, said in (
        ("gone.png", "x", 404, "no picture 'gone.png'"),
        ("2.png", "x" * 20_001, 400, "at most 20,000 characters"),
        ("../x.png", "x", 404, "no picture"),
    ):
        assert said in await client.error("PUT", CAPTIONS, {"1.png": "new", wrong: text}, status=status)
    assert (dog / "1.txt").read_text() == "a dog\non grass\n"


async def test_a_caption_is_replaced_if_it_is_the_one_that_was_seen(client: Client, tmp_path: Path, dog: Path) -> None:
    async def write(status: int = 200, **edits: Any) -> Any:
        """Store captions of pictures such as `1.png`, by number: a text, or a text and the one that was seen."""
        body = {f"{key[1:]}.png": {"caption": one[0], "seen": one[1]} for key, one in edits.items()}
        return await client.ask("PUT", CAPTIONS, body, status=status)

    first, snow = "a dog\non grass", "a dog in snow"
    assert (await write(_1=("from one tab", first)))["changed"] == 1
    error = (await write(409, _1=("from another", first), _2=("new", snow)))["error"]
    assert (error["kind"], error["details"]) == ("StaleCaptionError", {"1.png": "from one tab"})
    assert "1.png was changed elsewhere, and nothing" in error["message"]
    assert (await captions(client))[:2] == ["from one tab", snow]
    await write(409, _1=("", first))
    assert (await write(_1=("from one tab", first)))["changed"] == 0  # sent again after a lost answer
    # White space is stored as it is read.
    assert (await write(_1=("from  another ", " from one  tab\n")))["changed"] == 1
    assert (await client.ask("PUT", CAPTIONS, {"1.png": "last"}))["changed"] == 1  # by a script that has seen nothing
    await client.error("PUT", CAPTIONS, {"1.png": {"seen": "last"}})
    log = (tmp_path / "user" / "lorasmith" / "removed" / "dog-captions.jsonl").read_text().splitlines()
    replaced = [(one["file"], one["caption"]) for one in map(json.loads, log)]
    assert replaced == [("1.png", first), ("1.png", "from one tab"), ("1.png", "from another")]


GRAPHS: dict[str, dict[str, Any]] = {
    "its folder": {"folder": "Dog"},
    "a folder in it": {"folder": "dog/1_x"},
    "a picture": {"image": "dog/fox_1.png"},
    "another folder": {"folder": "dogs"},
    "another picture": {"image": "fox.png"},
    "a text": {"text": "dog"},
    "an output": {"folder": ["3", 0]},
}
"""Inputs of a graph's node; the first three are of the dataset."""


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        *(("train", state) for state in ("pending", "running", "paused", "interrupted", "completed")),
        *((kind, "paused") for kind in ("inside", "dog*", *GRAPHS)),
    ],
)
async def test_a_dataset_that_a_job_needs_is_not_removed(client: Client, tmp_path: Path, kind: str, state: Any) -> None:
    request: dict[str, Any] = {"prompt": {"1": {"class_type": "X", "inputs": GRAPHS.get(kind)}}}
    if kind not in GRAPHS:
        path = {"train": "input/dog", "inside": str(tmp_path / "input/Dog/1_x"), "dog*": "input/dog*"}[kind]
        request = {"name": "mine", "sources": [{"path": path}]}
    shutil.copytree(FOX, tmp_path / "input" / "dog")
    store = client.context.store
    job = store.add("graph" if kind in GRAPHS else "train", request)
    if state != "pending":
        store.claim("worker")
    if state not in ("pending", "running"):
        store.finish(job.id, state)
    if state == "completed" or kind in [*GRAPHS][3:] or kind == "dog*":
        await client.ask("DELETE", "/datasets/dog")
    else:
        said = await client.error("DELETE", "/datasets/dog", status=409)
        assert f"a job that is {state}; cancel that job first" in said
        assert (tmp_path / "input" / "dog").is_dir()


async def test_captions_and_masks_follow_their_picture_to_another_name(client: Client) -> None:
    await client.ask("POST", "/datasets", {"name": "dog"}, status=201)
    await client.ask("POST", "/datasets/dog/images", data=form(("x.png", png()), ("x.txt", b"first")))
    files = form(("folder/x.mask.png", png()), ("folder/x.txt", b"second"), ("folder/x.png", png("blue")))
    answer = await client.ask("POST", "/datasets/dog/images", data=files)
    assert answer["added"] == ["x-2.png", "x-2.mask.png", "x-2.txt"]
    images = (await client.ask("GET", "/datasets/dog"))["images"]
    found = {one["file"]: (one["caption"], one["mask"]) for one in images}
    assert found == {"x.png": ("first", ""), "x-2.png": ("second", "x-2.mask.png")}
    async with client.http.get(f"{AT}/datasets/dog/images/x-2.png?width=16&mask=true") as response:
        assert response.content_type == "image/webp"
    await client.ask("DELETE", "/datasets/dog/images/x-2.png/mask")
    await client.error("GET", "/datasets/dog/images/x-2.png?width=16&mask=true", status=404)


async def test_pictures_are_served_as_pictures_and_small_ones_are_cached(client: Client, tmp_path: Path) -> None:
    shutil.copytree(FOX, tmp_path / "input" / "dog")
    (tmp_path / "input" / "dog" / "evil.png").write_bytes(b"<script>alert(1)</script>")
    for file in ("fox_1.png", "evil.png"):
        async with client.http.get(f"{AT}/datasets/dog/images/{file}") as response:
            assert response.status == 200 and response.headers["Content-Type"] == "image/png"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert "sandbox" in response.headers["Content-Security-Policy"]
            assert await response.read() == (tmp_path / "input" / "dog" / file).read_bytes()
    url = f"{AT}/datasets/dog/images/fox_1.png?width=32"
    async with client.http.get(url) as response:
        assert response.content_type == "image/webp"
        with Image.open(io.BytesIO(await response.read())) as small:
            assert small.size == (32, 32)
        tag = response.headers["ETag"]
    asked = len(client.context.assistant.asked)  # type: ignore[attr-defined]
    async with client.http.get(url, headers={"If-None-Match": tag}) as response:
        assert response.status == 304
    assert client.context.assistant.asked[asked:] == [  # type: ignore[attr-defined]
        ("picture_file", {"name": "dog", "file": "fox_1.png"})
    ]
    async with client.http.get(f"{AT}/datasets/fox/images/fox_1.png?width=32") as response:
        assert response.status == 200, "of the package"
    await client.error("GET", "/datasets/dog/images/evil.png?width=32")
    await client.error("GET", "/datasets/dog/images/fox_1.png?width=9999999")
    await client.error("GET", "/datasets/dog/images/LICENSE.txt", status=404)
    await client.error("GET", "/datasets/dog/images/..%2F..%2Fuser%2Florasmith%2Fjobs.sqlite3", status=404)


REFUSED: dict[str, tuple[str, str, Any, int, str]] = {
    "no dataset": ("GET", "/datasets/gone", None, 404, "there is no dataset 'gone'"),
    "a path": ("GET", "/datasets/..%2F..", None, 404, "there is no dataset"),
    "a taken name": ("POST", "/datasets", {"name": "fox"}, 409, "already"),
    "no name": ("POST", "/datasets", {}, 400, "name is missing"),
    "a blank name": ("POST", "/datasets", {"name": "  "}, 400, "must have a name"),
    "another name": (
        "POST",
        "/datasets",
        {"nme": "x"},
        400,
        "unknown name 'nme' in the request (did you mean 'name'?)",
    ),
    "no text": ("POST", "/datasets", {"name": 3}, 400, "name must be text, got 3"),
    "a list": ("POST", "/datasets", [1], 400, "must be an object"),
    "captions of numbers": ("PUT", "/datasets/fox/captions", {"fox_1.png": 1}, 400, "must be text"),
    "the package": ("PUT", "/datasets/fox/captions", {"fox_1.png": "x"}, 400, "belongs to Lorasmith"),
    "the package as a whole": ("DELETE", "/datasets/fox", None, 400, "belongs to Lorasmith"),
    "a picture of the package": ("DELETE", "/datasets/fox/images/fox_1.png", None, 400, "belongs to Lorasmith"),
    "one more for the package": ("POST", "/datasets/fox/images", {}, 400, "belongs to Lorasmith"),
    "no optimizer": ("GET", "/datasets/fox/check?optimizer=os.system", None, 400, "would run code"),
    "no schedule": ("GET", "/datasets/fox/check?schedule=os:system", None, 400, "would run code"),
    "no loss": ("GET", "/datasets/fox/check?loss_function=os:system", None, 400, "would run code"),
    "no steps": ("GET", "/datasets/fox/check?steps=0", None, 400, "between"),
    "a setting": ("GET", "/datasets/fox/check?resolutoin=3", None, 400, "unknown option 'resolutoin'"),
    "a number": ("GET", "/datasets/fox/check?resolution=a", None, 400, "resolution must be a number"),
    "a folder of masks": ("GET", "/datasets/fox/check?masks=files&mask_folder=/etc", None, 400, "is not for requests"),
    "links": ("GET", "/datasets/fox/check?follow_links=true", None, 400, "follow_links is not for requests"),
    "a model": ("GET", "/datasets/fox/check?model=gone.safetensors", None, 400, "gone.safetensors"),
    **{
        f"no dataset {name}": ("GET", f"/datasets/{name}", None, 404, "there is no dataset")
        for name in ("..%2Fdog", "dog%2F..%2Fdog", "a%5Cb", "c%3A", ".hidden", "x%00")
    },
    **{
        f"no picture {file}, {method}{width}": (
            method, f"/datasets/dog/images/{file}{width}", None, 404, "there is no picture",
        )
        for file in ("..%2Fdog%2Ffox_1.png", "fox_1.txt", "gone.png", "x%00.png", ".fox_1.png", "a%2Ffox_1.png")
        for method, width in (("GET", ""), ("GET", "?width=32"), ("DELETE", ""))
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("refusals")
    shutil.copytree(FOX, base / "input" / "dog")
    return refusals_of(REFUSED, base)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_said(refusals: dict[str, str], case: str) -> None:
    assert REFUSED[case][-1] in refusals[case]


async def test_a_body_is_json_and_has_a_limit(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for body in (b"{", b"\xff", b'{"a": NaN}', b"[" * 5000, b'{"name": "a", "name": "b"}'):
        assert "the body of the request" in await client.error("POST", "/datasets", data=body)
    monkeypatch.setitem(read_body.__kwdefaults__, "at_most", 100)
    await client.error("POST", "/datasets", {"name": "x" * 200}, status=413)

    async def endless() -> Any:
        for _ in range(1000):
            yield b"x" * 100

    await client.error("POST", "/datasets", data=endless(), status=413)


LIMITS: dict[str, tuple[str, int, int, str]] = {
    "a large picture": ("MOST_FILE_BYTES", 10, 200, "is larger than"),
    "many files": ("MOST_FILES", 1, 413, "at most 1 files"),
    "a large request": ("MOST_REQUEST_BYTES", 20, 413, "an upload must have at most"),
    "many uploads": ("MOST_UPLOADS", 0, 429, "uploads at once"),
    "a full disk": ("SPARE_BYTES", 2**60, 507, "free some space"),
}


@pytest.mark.parametrize("case", LIMITS)
async def test_uploads_have_limits(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name, limit, status, message = LIMITS[case]
    monkeypatch.setattr(
        next(one for one in (dataset_routes, request_handling, server_disk) if hasattr(one, name)), name, limit
    )
    await client.ask("POST", "/datasets", {"name": "dog"}, status=201)
    files = form(("a.png", png()), ("b.png", png("blue")))
    if status == 200:
        answer = await client.ask("POST", "/datasets/dog/images", data=files)
        assert not answer["added"] and all(message in one["reason"] for one in answer["skipped"])
    else:
        assert message in await client.error("POST", "/datasets/dog/images", data=files, status=status)
    left = tmp_path / "user" / "lorasmith" / "uploads"
    assert not left.is_dir() or list(left.iterdir()) == []


async def test_a_form_that_was_cut_off_or_has_a_zero_byte_is_refused(client: Client) -> None:
    await client.ask("POST", "/datasets", {"name": "dog"}, status=201)
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    part = b"--x\r\nContent-Disposition: form-data; name=file; filename="
    for body in (
        b"",
        b"--x\r\n",
        part + b"a.png\r\n\r\nabc",
        b"junk",
        part + b'"a\0b.png"\r\n\r\n' + png() + b"\r\n--x--\r\n",
    ):
        async with client.http.post(f"{AT}/datasets/dog/images", data=body, headers=headers) as response:
            assert response.status == 400 or (response.status == 200 and b"\0" not in body)
            answer = await response.json()
            assert "error" in answer or not answer["added"]
    assert (await client.ask("GET", "/datasets/dog"))["images"] == []
    await client.error("POST", "/datasets/dog%00/images", data=form(("a.png", png())), status=404)


async def test_errors_of_the_assistant_have_a_status(client: Client) -> None:
    for error, status in (
        (UnavailableError("the assistant ended; try again"), 503),
        (RefusedError("InternalError", "the server failed"), 500),
        (RefusedError("GraphError", "it is wrong", ["one", "two"]), 400),
    ):
        made_up(client)["datasets"] = error
        answer = (await client.ask("GET", "/datasets", status=status))["error"]
        assert (answer["message"], answer["details"]) == (str(error), getattr(error, "details", None))


async def test_captions_leave_the_last_of_the_disk(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FOX, tmp_path / "input" / "dog")
    await client.ask("PUT", "/datasets/dog/captions", {"fox_1.png": "before"})
    monkeypatch.setattr(server_disk, "SPARE_BYTES", 2**60)
    await client.error("PUT", "/datasets/dog/captions", {"fox_1.png": "after"}, status=507)
    await client.ask("DELETE", "/datasets/dog/images/fox_1.png")
