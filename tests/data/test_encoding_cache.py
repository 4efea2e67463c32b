"""The encoding cache gives back what was put or nothing: whatever is damaged, removed, full or used by others."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorasmith.core import mapped_files
from lorasmith.core.mapped_files import place_on_file
from lorasmith.data import encoding_cache
from lorasmith.data.encoding_cache import EncodingCache, default_cache, key_of

ENCODER, OTHER = key_of(encoder=1), key_of(encoder=2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8)


def value(number: int) -> dict[str, Tensor]:
    """The encoding of a number: some tensors of several dtypes and shapes, empty and without dimensions too."""
    chance = random.Random(number)
    shapes = [tuple(chance.randrange(4) for _ in range(chance.randrange(4))) for _ in range(chance.randrange(4))]
    g = torch.Generator().manual_seed(number)
    return {
        f"part.{index}-{number % 3}": torch.randint(0, 100, shape, generator=g).to(chance.choice(DTYPES))
        for index, shape in enumerate(shapes)
    }


def latents(number: int, size: int = 256) -> dict[str, Tensor]:
    return {"latents": torch.randn(size, generator=torch.Generator().manual_seed(number))}


def same(found: Any, wanted: dict[str, Tensor]) -> bool:
    return (
        found is not None
        and found.keys() == wanted.keys()
        and all(torch.equal(found[name], one) and found[name].dtype == one.dtype for name, one in wanted.items())
    )


def cache(folder: Path, limit: int = 2**40) -> EncodingCache:
    return EncodingCache(folder / "encodings", limit_bytes=limit)


def filled(folder: Path, numbers: range, *, encoder: str = ENCODER, each: bool = False) -> list[Path]:
    """The shards of a new cache with these numbers, in one shard or one each."""
    made = cache(folder)
    with made.entries(encoder) as entries:
        for number in numbers:
            entries.put(key_of(number=number), latents(number))
            if each:
                entries.flush()
    return shards(folder)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def found(folder: Path, numbers: range, encoder: str = ENCODER) -> list[int]:
    """Those of the numbers that are in the cache; fails if one has other tensors."""
    with cache(folder).entries(encoder) as entries:
        got = {number: entries.get(key_of(number=number)) for number in numbers}
    assert all(one is None or same(one, latents(number)) for number, one in got.items()), "something else is used"
    return [number for number, one in got.items() if one is not None]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(0, 8), st.integers(0, 50)),
            st.tuples(st.just("get"), st.integers(0, 8), st.just(0)),
            st.tuples(st.sampled_from(["flush", "reopen", "other"]), st.just(0), st.just(0)),
        ),
        max_size=25,
    )
)
def test_it_is_a_dictionary(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]) -> None:
    folder = tmp_path_factory.mktemp("cache")
    expected: dict[tuple[str, int], dict[str, Tensor]] = {}
    encoder = ENCODER
    opened = cache(folder).entries(encoder)
    entries = opened.__enter__()
    for step, number, content in steps:
        if step == "put":
            entries.put(key_of(number=number), value(content))
            expected[encoder, number] = value(content)
        elif step == "flush":
            entries.flush()
        elif step in ("reopen", "other"):
            opened.__exit__(None, None, None)
            encoder = ENCODER if step == "reopen" else OTHER
            opened = cache(folder).entries(encoder)
            entries = opened.__enter__()
        else:
            got = entries.get(key_of(number=number))
            wanted = expected.get((encoder, number))
            assert got is None if wanted is None else same(got, wanted)
    assert len(entries) == len([one for one, _ in expected if one == encoder])
    opened.__exit__(None, None, None)


def test_tensors_lie_on_the_shard(tmp_path: Path) -> None:
    (path,) = filled(tmp_path, range(3))
    with cache(tmp_path).entries(ENCODER) as entries:
        got = entries.get(key_of(number=1))
        assert entries.get(key_of(number=9)) is None
        assert len(entries) == 3
    assert got is not None
    place = place_on_file(got["latents"])
    assert place is not None and place[0].path == os.path.realpath(path)
    path.unlink()
    assert same(got, latents(1)), "a shard that is removed while it is used stays"


def test_tensors_are_copied_where_no_more_mappings_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, range(3), each=True)
    monkeypatch.setattr(encoding_cache, "may_stay_mapped", lambda: False)
    before = len(mapped_files._STARTS)
    with cache(tmp_path).entries(ENCODER) as entries:
        got = [entries.get(key_of(number=number)) for number in range(3)]
    assert all(same(one, latents(number)) for number, one in enumerate(got))
    assert len(mapped_files._STARTS) == before


def test_what_is_put_or_got_may_change_without_harm(tmp_path: Path) -> None:
    with cache(tmp_path).entries(ENCODER) as entries:
        tensors = latents(1)
        entries.put(key_of(number=1), tensors)
        tensors["latents"].zero_()
        waiting = entries.get(key_of(number=1))
        assert waiting is not None
        waiting["latents"].zero_()
        assert same(entries.get(key_of(number=1)), latents(1))
        entries.flush()
        written = entries.get(key_of(number=1))
        assert written is not None
        written["latents"].zero_()
        assert entries.get(key_of(number=1)) is None, "changed tensors are not given out again"
    assert found(tmp_path, range(2)) == [1]


def test_nothing_is_lost_but_what_was_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_cache, "SHARD_BYTES", 3000)
    with pytest.raises(KeyboardInterrupt), cache(tmp_path).entries(ENCODER) as entries:
        for number in range(4):
            entries.put(key_of(number=number), latents(number))
            assert len(shards(tmp_path)) == (number >= 2)
        raise KeyboardInterrupt
    assert found(tmp_path, range(5)) == [0, 1, 2, 3]
    monkeypatch.setattr(encoding_cache, "SHARD_SECONDS", 0.0)
    with cache(tmp_path).entries(ENCODER) as entries:
        entries.put(key_of(number=4), latents(4))
        assert len(shards(tmp_path)) == 3


def test_one_encoder_has_nothing_of_another(tmp_path: Path) -> None:
    (path,) = filled(tmp_path, range(3))
    (tmp_path / "encodings" / OTHER).mkdir()
    shutil.copy(path, tmp_path / "encodings" / OTHER)
    assert found(tmp_path, range(3), OTHER) == []
    assert found(tmp_path, range(3)) == [0, 1, 2]


def test_digests_are_no_paths(tmp_path: Path) -> None:
    for wrong in ["", "../x", "A" * 64, "0" * 63, "g" * 64]:
        with pytest.raises(ValueError, match="64 hexadecimal digits"), cache(tmp_path).entries(wrong):
            pass
        with cache(tmp_path).entries(ENCODER) as entries:
            assert entries.get(wrong) is None
            with pytest.raises(ValueError, match="64 hexadecimal digits"):
                entries.put(wrong, {})
            with pytest.raises(ValueError, match="letters, digits"):
                entries.put(ENCODER, {"a/b": torch.zeros(1)})


def test_keys_depend_on_every_value_and_on_no_order() -> None:
    keys = [key_of(), key_of(a=1), key_of(a=1.5), key_of(a="1"), key_of(b=1), key_of(a=[1]), key_of(a=None)]
    assert len(set(keys)) == len(keys)
    assert key_of(a=1, b=(2, 3)) == key_of(b=[2, 3], a=1)
    with pytest.raises(ValueError, match="JSON"):
        key_of(a=float("nan"))


def test_each_flipped_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    numbers = range(3)
    (path,) = filled(tmp_path, numbers)
    content = path.read_bytes()
    body = 8 + int.from_bytes(content[:8], "little")
    lost = 0
    for place in range(len(content)):
        if place > body and place % 97:  # every byte of the header, some of the 3 KiB of numbers
            continue
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        left = found(tmp_path, numbers)  # fails if a tensor is another
        assert place < body or len(left) == 2, "the neighbours of a damaged entry are used"
        lost += len(left) < 3
    assert lost > body * 0.9


def test_a_file_cut_anywhere_is_never_used(tmp_path: Path) -> None:
    (path,) = filled(tmp_path, range(2))
    (tmp_path / "other").mkdir()
    (good,) = filled(tmp_path / "other", range(2, 4))
    shutil.copy(good, path.parent)
    content = path.read_bytes()
    for length in [*range(0, 700, 7), *range(700, len(content), 97)]:
        path.write_bytes(content[:length])
        assert found(tmp_path, range(4)) == [2, 3]
    path.write_bytes(content + b"\0")
    assert found(tmp_path, range(4)) == [2, 3]


def test_damage_is_one_note_and_an_older_copy_is_used(tmp_path: Path) -> None:
    first, second = (filled(tmp_path, range(4))[-1] for _ in range(2))
    content = bytearray(second.read_bytes())
    for place in range(1, 600, 40):
        content[-place] ^= 1
    second.write_bytes(content)
    with (made := cache(tmp_path)).entries(ENCODER) as entries:
        assert all(same(entries.get(key_of(number=number)), latents(number)) for number in range(4))
        assert len(made.notes) == 1 and str(second) in made.notes[0]
    first.unlink()
    assert len(found(tmp_path, range(4))) == 3
    second.write_bytes(b"torn")
    with (made := cache(tmp_path)).entries(ENCODER):
        assert len(made.notes) == 1 and "data cache clear" in made.notes[0]


def test_another_version_is_passed_over_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(encoding_cache, "_FORMAT", 2)
        filled(tmp_path, range(2))
    assert found(tmp_path, range(2)) == []
    with (made := cache(tmp_path)).entries(ENCODER):
        assert made.notes == []


def encode(folder: Path, numbers: list[int], barrier: Any) -> None:
    barrier.wait()
    with cache(folder).entries(ENCODER) as entries:
        for number in numbers:
            key = key_of(number=number)
            got = entries.get(key)
            assert got is None or same(got, latents(number))
            if got is None:
                entries.put(key, latents(number))
                entries.flush()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    halves = [list(range(30)), list(range(15, 45))]
    processes = [context.Process(target=encode, args=(tmp_path, numbers, barrier)) for numbers in halves]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert found(tmp_path, range(45)) == list(range(45))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_shard_that_another_process_removes_is_a_miss(tmp_path: Path) -> None:
    paths = filled(tmp_path, range(2), each=True)
    with (made := cache(tmp_path)).entries(ENCODER) as entries:
        cache(tmp_path).clear()
        assert not any(path.exists() for path in paths)
        assert entries.get(key_of(number=0)) is None
        entries.put(key_of(number=0), latents(0))
    assert made.notes == []
    assert found(tmp_path, range(2)) == [0]


def aged(path: Path, days: float) -> None:
    then = time.time() - days * 86400
    os.utime(path, (then, then))


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    paths = filled(tmp_path, range(4), each=True)
    for days, path in enumerate(paths, start=1):
        aged(path, days)
    size = paths[0].stat().st_size
    assert found(tmp_path, range(3, 4)) == [3], "the oldest is used, and becomes the newest"
    assert time.time() - paths[3].stat().st_mtime < 60
    with cache(tmp_path, limit=3 * size + 10).entries(OTHER) as entries:
        entries.put(key_of(number=9), latents(9))
    assert found(tmp_path, range(4)) == [0, 3]
    assert found(tmp_path, range(10), OTHER) == [9]


def test_what_this_process_uses_is_never_removed(tmp_path: Path) -> None:
    old, unused = filled(tmp_path, range(2), each=True)
    with (made := cache(tmp_path, limit=1)).entries(ENCODER) as entries:
        got = entries.get(key_of(number=0))
        aged(old, 9)
        for number in range(5, 8):
            entries.put(key_of(number=number), latents(number))
            entries.flush()
        assert same(got, latents(0))
    with made.entries(OTHER) as entries:
        entries.put(key_of(number=1), latents(1))
    assert old.exists() and not unused.exists()
    assert found(tmp_path, range(8)) == [0, 5, 6, 7]


def test_what_is_still_to_be_read_stays_until_the_end(tmp_path: Path) -> None:
    old = filled(tmp_path, range(4), each=True)
    for days, path in enumerate(old):
        aged(path, 9 - days)
    other = filled(tmp_path, range(1), encoder=OTHER)[-1]
    size = old[0].stat().st_size
    with cache(tmp_path, limit=4 * size + 10).entries(ENCODER) as entries:
        for number in range(2):
            entries.put(key_of(number=10 + number), latents(10 + number))
            entries.flush()
            assert same(entries.get(key_of(number=number)), latents(number))
        assert all(path.exists() for path in old)
    assert found(tmp_path, range(20)) == [0, 1, 10, 11]
    assert not other.exists()


def test_the_time_of_use_is_written_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, range(5))
    touched: list[object] = []
    monkeypatch.setattr(os, "utime", touched.append)
    with cache(tmp_path).entries(ENCODER) as entries:
        for number in range(5):
            entries.get(key_of(number=number))
        assert len(touched) == 1


def test_a_full_disk_is_one_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, range(1))
    written: list[object] = []

    def full(*arguments: object) -> Iterator[bytes]:
        written.append(arguments)
        yield b"half of it"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encoding_cache, "serialised", full)
    with (made := cache(tmp_path)).entries(ENCODER) as entries:
        for number in range(1, 4):
            entries.put(key_of(number=number), latents(number))
            entries.flush()
        assert same(entries.get(key_of(number=0)), latents(0))
    assert len(made.notes) == len(written) == 1
    assert "the disk is full" in made.notes[0]
    assert len(list(tmp_path.rglob("*.*"))) == 1, "nothing half-written stays"


def test_a_folder_that_cannot_be_written_is_one_note(tmp_path: Path) -> None:
    (tmp_path / "encodings").write_text("a file")
    for _ in range(2):
        with (made := cache(tmp_path)).entries(ENCODER) as entries:
            entries.put(key_of(number=0), latents(0))
            entries.flush()
            entries.put(key_of(number=1), latents(1))
        assert len(made.notes) == 1 and "is a file; choose another" in made.notes[0]
    assert made.summary() == []
    assert made.clear().files == 0


def test_what_else_is_in_the_folder_is_neither_read_nor_removed(tmp_path: Path) -> None:
    (path,) = filled(tmp_path, range(2))
    folder = path.parent
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in ("model.safetensors", path.name):
        shutil.copy(path, precious / name)
    (folder / "model.safetensors").write_bytes(b"somebody's")
    (folder / f"{1:020}-{'0' * 16}.safetensors").symlink_to(precious / path.name)
    (folder / f"{2:020}-{'0' * 16}.safetensors").symlink_to("/dev/zero")
    (folder / f"{3:020}-{'0' * 16}.safetensors").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / f"{4:020}-{'0' * 16}.safetensors")
    (tmp_path / "encodings" / OTHER).symlink_to(precious)
    (tmp_path / "encodings" / "notes.txt").write_text("mine")
    assert found(tmp_path, range(2)) == [0, 1]
    assert found(tmp_path, range(2), OTHER) == []
    with (made := cache(tmp_path, limit=1)).entries(OTHER) as entries:
        entries.put(key_of(number=0), latents(0))  # which would go through the link
    assert [one.encoder for one in made.summary()] == [ENCODER]
    assert made.clear().files == 1
    assert len(list(precious.iterdir())) == 2
    assert len(list(folder.iterdir())) == 5 - (not hasattr(os, "mkfifo"))


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    (path,) = filled(tmp_path, range(1))
    (left := path.with_name(".a shard.x.tmp")).mkdir()
    for name in ("lorasmith.lock", "new"):
        (left / name).touch()
    filled(tmp_path, range(1, 2))
    assert not left.exists()


def test_clear_by_age_and_summary(tmp_path: Path) -> None:
    first, second = filled(tmp_path, range(2), each=True)
    (third,) = [one for one in filled(tmp_path, range(5), encoder=OTHER) if one.parent.name == OTHER]
    aged(first, 40)
    aged(second, 20)
    third.with_name(f"{9:020}-{'0' * 16}.safetensors").write_bytes(b"torn")
    made = cache(tmp_path)
    newest, older = made.summary()
    assert (newest.encoder, newest.entries, newest.unreadable) == (OTHER, 5, 1)
    assert (older.entries, older.size_bytes) == (2, first.stat().st_size + second.stat().st_size)
    assert abs(time.time() - 20 * 86400 - older.last_used) < 60
    assert made.clear(unused_days=30).files == 1 and not first.exists()
    assert made.clear().files == 3
    assert made.summary() == [] and not second.parent.exists()


def test_a_limit_of_nothing_is_no_cache(tmp_path: Path) -> None:
    filled(tmp_path, range(2))
    with cache(tmp_path, limit=0).entries(ENCODER) as entries:
        assert entries.get(key_of(number=0)) is None
        entries.put(key_of(number=5), latents(5))
    assert found(tmp_path, range(6)) == [0, 1]


@contextmanager
def environment(**values: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in (encoding_cache.FOLDER_VARIABLE, "XDG_CACHE_HOME"):
            patch.delenv(name, raising=False)
        for name, one in values.items():
            patch.setenv(name, one)
        yield


def test_the_default_is_in_the_systems_folder_for_caches(tmp_path: Path) -> None:
    with environment(LORASMITH_CACHE_DIR=str(tmp_path)):
        made = default_cache(0.5)
    assert (made.folder, made.limit_bytes) == (tmp_path / "encodings", 2**29)
    with environment(XDG_CACHE_HOME=str(tmp_path)):
        made = default_cache()
    if sys.platform == "linux":
        assert made.folder == tmp_path / "lorasmith" / "encodings"
    assert made.limit_bytes == 20 * 2**30
    with environment(XDG_CACHE_HOME="relative"):
        assert default_cache().folder.is_absolute()


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with environment():
        assert default_cache().limit_bytes == 0


def test_tests_never_use_the_users_cache() -> None:
    home = Path(os.path.realpath(Path.home()))
    assert not Path(os.path.realpath(default_cache().folder)).is_relative_to(home / ".cache")


def test_others_cannot_read_the_folder(tmp_path: Path) -> None:
    filled(tmp_path, range(1))
    assert (tmp_path / "encodings").stat().st_mode & 0o077 == 0 or sys.platform == "win32"
