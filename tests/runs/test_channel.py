"""Messages between the server and its children."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys

import pytest

from lorasmith.runs import child_process
from lorasmith.runs.child_process import AsyncChannel, BlockingChannel, BrokenChannelError, packed

MESSAGES = [({"type": "a", "text": "ü\n"}, b""), ({}, b"\x00\xff" * 1000), ({"n": [1, 2.5, None]}, b"x")]


def test_what_one_end_packs_the_blocking_end_reads() -> None:
    stream = io.BytesIO()
    for head, body in MESSAGES:
        BlockingChannel(io.BytesIO(), stream).send(head, body)
    stream.seek(0)
    reader = BlockingChannel(stream, io.BytesIO())
    assert [reader.receive() for _ in MESSAGES] == MESSAGES
    assert reader.receive() is None


def test_what_one_end_packs_the_asynchronous_end_reads_in_any_pieces() -> None:
    async def check() -> None:
        content = b"".join(packed(head, body) for head, body in MESSAGES)
        reader = asyncio.StreamReader()
        feeding = asyncio.get_running_loop()
        for place in range(0, len(content), 7):
            feeding.call_soon(reader.feed_data, content[place : place + 7])
        feeding.call_soon(reader.feed_eof)
        end = AsyncChannel(reader, None)  # type: ignore[arg-type]
        assert [await end.receive() for _ in MESSAGES] == MESSAGES
        assert await end.receive() is None

    asyncio.run(check())


def test_a_message_cut_short_is_no_message() -> None:
    whole = packed({"type": "a"}, b"body")
    for length in range(len(whole)):
        assert BlockingChannel(io.BytesIO(whole[:length]), io.BytesIO()).receive() is None


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 20, b"\0\0\0\2\0\0\0\0{]", b"\0\0\0\2\0\0\0\0[]", b"\0\0\0\2\xff\xff\xff\xff{}", b"Traceback (most)"],
)
def test_what_is_no_message_is_named(content: bytes) -> None:
    with pytest.raises(BrokenChannelError, match="a message must"):
        BlockingChannel(io.BytesIO(content), io.BytesIO()).receive()


def test_messages_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "MOST_JSON_BYTES", 10)
    with pytest.raises(ValueError, match="at most 10 bytes"):
        packed({"text": "longer than ten"})


def test_what_a_child_prints_is_no_message() -> None:
    code = """
import os, subprocess, sys
from lorasmith.runs.child_process import channel_of_child
channel = channel_of_child()
print("printed")
os.write(1, b"written")
assert sys.stdin.read() == "" and subprocess.run(["cat"], capture_output=True).stdout == b""
channel.send(channel.receive()[0])
"""
    done = subprocess.run([sys.executable, "-c", code], input=packed({"n": 1}), capture_output=True, check=True)
    assert done.stdout == packed({"n": 1})
    assert b"printed" in done.stderr and b"written" in done.stderr
