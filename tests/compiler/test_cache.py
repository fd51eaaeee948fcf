"""The cache of compiled code on disk: what goes wrong is a miss, never an error."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nitinol.compiler import cache


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that does not exist yet."""
    monkeypatch.setenv("NITINOL_CACHE_DIR", str(tmp_path / "a" / "cache"))
    monkeypatch.setattr(cache, "_warned", False)
    monkeypatch.setattr(cache, "_swept", False)
    return tmp_path / "a" / "cache"


def entries(place: Path) -> list[Path]:
    return sorted(place.iterdir()) if place.exists() else []


def test_round_trip(place):
    data = np.random.default_rng().bytes(1000)
    assert cache.get("key") is None
    cache.put("key", data)
    cache.put("empty", b"")
    assert cache.get("key") == data
    assert cache.get("empty") == b""
    assert cache.get("other") is None
    cache.put("key", b"newer")
    assert cache.get("key") == b"newer"
    strange = "../../etc/x\0ü" * 100
    cache.put(strange, b"1")
    assert cache.get(strange) == b"1"
    assert len(entries(place)) == 3
    if os.name == "posix":
        assert place.stat().st_mode & 0o077 == 0


def test_every_damage_is_a_miss_and_removes_the_entry(place):
    rng = np.random.default_rng()
    data = rng.bytes(100)
    cache.put("key", data)
    (path,) = entries(place)
    good = path.read_bytes()
    damaged = [good[:n] for n in (0, 1, 8, 47, 48, 100, len(good) - 1)] + [good + b"x", b"\0" * len(good)]
    for position in (0, 9, 20, 60, len(good) - 1):
        flipped = bytearray(good)
        flipped[position] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    for bad in damaged:
        path.write_bytes(bad)
        assert cache.get("key") is None
        assert not path.exists()
    cache.put("key", data)
    assert cache.get("key") == data


def test_an_entry_under_another_name_is_a_miss(place):
    cache.put("one", b"code of one")
    (path,) = entries(place)
    cache.put("two", b"code of two")
    (other,) = [p for p in entries(place) if p != path]
    other.write_bytes(path.read_bytes())
    assert cache.get("two") is None
    assert cache.get("one") == b"code of one"


def test_places(monkeypatch, tmp_path):
    monkeypatch.setenv("NITINOL_CACHE_DIR", "")
    assert cache.folder() is None
    cache.put("key", b"data")
    assert cache.get("key") is None
    monkeypatch.delenv("NITINOL_CACHE_DIR")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.folder() == tmp_path / ".cache" / "nitinol"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.folder() == tmp_path / "x" / "nitinol"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.folder() == tmp_path / "Library" / "Caches" / "nitinol"


def test_no_home_is_no_cache(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NITINOL_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "home", no_home)
    cache.put("key", b"data")
    assert cache.get("key") is None


@pytest.mark.parametrize("obstacle", ("file", "name"))
def test_an_impossible_folder_costs_one_line(place, capsys, monkeypatch, obstacle):
    if obstacle == "file":  # as a read-only home, but also for root
        place.parent.mkdir()
        place.write_bytes(b"")
    else:
        monkeypatch.setenv("NITINOL_CACHE_DIR", str(place / ("long" * 1000)))
    for _ in range(3):
        cache.put("key", b"data")
        assert cache.get("key") is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "NITINOL_CACHE_DIR" in lines[0]


def test_a_full_disk(place, capsys, monkeypatch):
    cache.put("old", b"stays")

    class Full:
        def __init__(self, handle, mode):
            os.close(handle)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "open", Full, raising=False)
    cache.put("key", b"data" * 1000)
    monkeypatch.delattr(cache, "open")
    assert cache.get("key") is None
    assert cache.get("old") == b"stays"
    assert len(entries(place)) == 1  # the temporary file is gone
    assert "No space left" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="owners are POSIX")
def test_a_folder_of_somebody_else_is_not_used(place, monkeypatch, capsys):
    cache.put("key", b"data")
    monkeypatch.setattr(os, "getuid", lambda: place.stat().st_uid + 1)
    assert cache.get("key") is None
    cache.put("other", b"data")
    assert "another user" in capsys.readouterr().err
    assert len(entries(place)) == 1


posix = pytest.mark.skipif(os.name != "posix", reason="modes and links are POSIX")


def refused(capsys, because: str) -> None:
    """The cache does not give what is there, and says why, once."""
    assert cache.get("key") is None
    assert cache.get("key") is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and because in lines[0] and "NITINOL_CACHE_DIR" in lines[0]


@posix
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o720, 0o702])
def test_a_folder_that_others_may_write_to_is_not_used(place, capsys, mode):
    cache.put("key", b"data")
    place.chmod(mode)
    refused(capsys, f"mode {mode:04o}")
    cache.put("other", b"data")
    assert len(entries(place)) == 1
    place.chmod(0o755)
    assert cache.get("key") == b"data"


@posix
@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_an_entry_that_others_may_write_to_is_not_used(place, capsys, mode):
    cache.put("key", b"data")
    (path,) = entries(place)
    path.chmod(mode)
    refused(capsys, f"mode {mode:04o}")
    cache.put("key", b"newer")  # takes its place
    assert cache.get("key") == b"newer"


@posix
def test_links_are_not_followed(place, tmp_path, monkeypatch, capsys):
    cache.put("key", b"data")
    (path,) = entries(place)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    refused(capsys, "symbolic link")
    monkeypatch.setattr(cache, "_warned", False)
    path.unlink()
    elsewhere.rename(path)
    assert cache.get("key") == b"data"
    link = tmp_path / "link"
    link.symlink_to(place)
    monkeypatch.setenv("NITINOL_CACHE_DIR", str(link))
    refused(capsys, "symbolic link")
    cache.put("other", b"data")
    assert len(entries(place)) == 1


@posix
def test_only_regular_files_are_read(place, capsys):
    cache.put("key", b"data")
    (path,) = entries(place)
    path.unlink()
    os.mkfifo(path, 0o600)
    refused(capsys, "not a regular file")  # and nobody waits for a writer
    path.unlink()
    path.mkdir()
    assert cache.get("key") is None


@posix
def test_an_entry_of_somebody_else_is_not_used(place, monkeypatch, capsys):
    cache.put("key", b"data")
    (path,) = entries(place)
    check = cache._check

    def other(which, status, *rest):
        if which == path:
            status = os.stat_result((*status[:4], status.st_uid + 1, *status[5:]))
        check(which, status, *rest)

    monkeypatch.setattr(cache, "_check", other)
    refused(capsys, "belongs to another user")


def test_the_oldest_go_first(place):
    now = time.time()
    for i in range(10):
        cache.put(str(i), bytes(952))  # 1000 with the header
    paths = {}
    for i in range(10):
        path = cache._path(str(i))
        assert path is not None
        paths[i] = path
        os.utime(path, (now - 1000 + i, now - 1000 + i))
    assert cache.get("0") is not None  # used: now the youngest
    (place / ".new-left").write_bytes(b"x")
    (place / ".new-busy").write_bytes(b"x")
    os.utime(place / ".new-left", (now - 7200, now - 7200))
    (place / "notes.txt").write_bytes(bytes(100000))
    cache.sweep(place, 10_000)
    assert len(entries(place)) == 12
    cache.sweep(place, 8_000)
    assert [i for i in range(10) if paths[i].exists()] == [0, 5, 6, 7, 8, 9]
    assert (place / ".new-busy").exists() and (place / "notes.txt").exists()


def test_processes_at_once(place):
    """Four processes write and read the same keys with data that differs: what they read is always whole."""
    script = """
import sys
from nitinol.compiler import cache
for i in range(60):
    key = str(i % 3)
    cache.put(key, (key + sys.argv[1]).encode() * 3000)
    data = cache.get(key)
    assert data is None or data in [(key + str(n)).encode() * 3000 for n in range(4)], data[:20]
print("done")
"""
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for n in range(4)]
    for process in running:
        out, err = process.communicate(timeout=60)
        assert (out.strip(), err) == (b"done", b"")
    assert len(entries(place)) == 3
