from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from latentclip.errors import UsageError
from latentclip.storage import Folder, list_shards, locate, read_bytes, shard_stem

SUFFIXES = (".tar", ".parquet")


@pytest.fixture(params=["local", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    local = tmp_path / "a spåce" / "deep"
    urls = {"local": local, "file": local.as_uri(), "memory": f"memory://{uuid.uuid4().hex}/deep"}
    return Folder(urls[request.param])


def test_folder_creates_only_what_is_absent(folder: Folder) -> None:
    assert folder.names() == []
    assert folder.create("ü 1%20#.bin", b"one")
    assert folder.create("ü 1%20#.bin", b"one"), "equal bytes are our own lost acknowledgement"
    assert not folder.create("ü 1%20#.bin", b"two")
    assert folder.create("a.bin", b"")
    assert folder.names() == ["a.bin", "ü 1%20#.bin"]
    assert folder.read("ü 1%20#.bin") == b"one"
    assert folder.exists("a.bin")
    assert read_bytes(folder.path("a.bin")) == b""


def test_folder_replaces_and_deletes(folder: Folder) -> None:
    folder.replace("log", b"one")
    folder.replace("log", b"two")
    assert folder.read("log") == b"two"
    folder.delete("log")
    folder.delete("log")
    assert not folder.exists("log")
    with pytest.raises(FileNotFoundError):
        folder.read("log")


def test_folder_tells_sizes_and_reads_ranges(folder: Folder) -> None:
    folder.create("a b", b"0123456789")
    assert folder.size("a b") == 10
    assert [bytes(folder.read_range("a b", start, stop)) for start, stop in ((0, 1), (3, 7), (9, 10))] == [
        b"0",
        b"3456",
        b"9",
    ]
    for absent in (lambda: folder.size("absent"), lambda: folder.read_range("absent", 0, 1)):
        with pytest.raises(FileNotFoundError, match="absent"):
            absent()


@pytest.mark.parametrize("size", [0, 5, 40 << 20], ids=["empty", "small", "in parts"])
def test_a_file_is_uploaded_whatever_its_size(folder: Folder, size: int, tmp_path: Path) -> None:
    upload_and_compare(folder, size, tmp_path)


@pytest.mark.parametrize("size", [0, 5, 40 << 20], ids=["empty", "small", "in parts"])
def test_a_file_is_uploaded_to_an_object_store_whatever_its_size(bucket: str, size: int, tmp_path: Path) -> None:
    upload_and_compare(Folder(bucket), size, tmp_path)


def upload_and_compare(folder: Folder, size: int, scratch: Path) -> None:
    source = scratch / "source"
    source.write_bytes(os.urandom(size))
    folder.replace("copy", b"before")
    folder.upload("copy", source)
    assert folder.size("copy") == size
    assert folder.read("copy") == source.read_bytes()


def test_a_tree_is_listed_and_removed(folder: Folder) -> None:
    list_and_remove(folder)


def test_a_tree_of_an_object_store_is_listed_and_removed(bucket: str) -> None:
    list_and_remove(Folder(bucket))


def list_and_remove(folder: Folder) -> None:
    assert folder.tree() == {}
    for place, name in (("b", "one"), ("a/deep", "two"), ("a", "zwölf 12%"), ("c", "one")):
        Folder(folder.path(place)).replace(name, name.encode())
    folder.replace("b.bin", b"")
    assert folder.tree() == {"a/deep/two": 3, "a/zwölf 12%": 10, "b/one": 3, "b.bin": 0, "c/one": 3}
    for place in ("a", "c", "absent"):
        Folder(folder.path(place)).remove()
    assert folder.tree() == {"b/one": 3, "b.bin": 0}


def test_folder_travels_to_another_process(tmp_path: Path) -> None:
    folder = pickle.loads(pickle.dumps(Folder(tmp_path)))
    assert folder.create("a", b"1")
    assert folder.is_local
    assert folder.url == str(tmp_path)


def test_one_of_many_concurrent_writers_wins(tmp_path: Path) -> None:
    contents = [bytes([index]) * 100_000 for index in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda data: Folder(tmp_path).create("shard", data), contents))
    assert won.count(True) == 1
    assert Folder(tmp_path).read("shard") == contents[won.index(True)]
    assert os.listdir(tmp_path) == ["shard"]


def test_failed_write_leaves_nothing_and_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full name") as error:
        Folder(tmp_path).create("full name" + "x" * 300, b"data")
    assert error.value.errno == errno.ENAMETOOLONG
    assert os.listdir(tmp_path) == []


def test_unknown_scheme_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="nosuch://x"):
        Folder("nosuch://x")


def test_locate_splits_paths_and_urls(tmp_path: Path) -> None:
    assert locate("a.tar")[0].url == "."
    assert locate("/a.tar")[0].url == "/"
    folder, name = locate((tmp_path / "é b.tar").as_uri())
    assert (folder.url, name) == (str(tmp_path), "é b.tar")


def test_stem_keeps_dots() -> None:
    assert shard_stem("memory://a/part.0001.tar", SUFFIXES) == "part.0001"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    names = ["00001.tar", "00000.tar", "00000_stats.json", "_odd.tar", ".hidden.tar", "x,y.parquet", "00000.json"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_list_shards_reads_folders_patterns_and_lists(shards: Path) -> None:
    def names(source: str | Path) -> list[str]:
        found = list_shards(source, SUFFIXES)
        assert all(Path(path).is_file() for path in found)
        return [Path(path).name for path in found]

    assert names(shards) == ["00000.tar", "00001.tar", "x,y.parquet"]
    assert names(f"{shards}/0000[1-9].tar") == ["00001.tar"]
    assert names(shards / "x,y.parquet") == ["x,y.parquet"]
    assert names(f"{shards}/00001.tar, {shards}/00000.tar") == ["00000.tar", "00001.tar"]
    assert names(f"{shards}/{{00000..00001}}.tar") == ["00000.tar", "00001.tar"]
    (shards / "list.txt").write_text(f"{shards}/00001.tar\n\n{shards}/x,y.parquet\n")
    assert names(shards / "list.txt") == ["00001.tar", "x,y.parquet"]


def test_list_shards_gives_full_paths(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards)
    assert list_shards("00001.tar", SUFFIXES) == [f"{shards}/00001.tar"]


def test_list_shards_refuses_a_file_that_is_none(shards: Path) -> None:
    with pytest.raises(UsageError, match=r"00000\.json is no shard, since its name ends in none of \.tar, \.parquet"):
        list_shards(shards / "00000.json", SUFFIXES)


def test_list_shards_reads_urls() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    for name in ("b.tar", "a.tar", "c.json"):
        Folder(url).create(name, b"x")
    assert list_shards(url, SUFFIXES) == [f"{url}/a.tar", f"{url}/b.tar"]
    assert list_shards(f"{url}/b*", SUFFIXES) == [f"{url}/b.tar"]
    assert list_shards(f"{url}/b.tar,{url}/a.tar", SUFFIXES) == [f"{url}/a.tar", f"{url}/b.tar"]
    with pytest.raises(UsageError, match=r"z\.tar does not exist"):
        list_shards(f"{url}/z.tar", SUFFIXES)


@pytest.mark.parametrize("source", ["absent", "absent.tar", "absent.txt", "0000[7-9].tar", "empty"])
def test_list_shards_refuses_what_is_not_there(shards: Path, source: str) -> None:
    (shards / "empty").mkdir()
    with pytest.raises(UsageError, match=source[:5].replace("[", r"\[")):
        list_shards(f"{shards}/{source}", SUFFIXES)


def test_list_shards_refuses_two_of_one_stem(shards: Path) -> None:
    (shards / "00001.parquet").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"00001\.parquet and .*00001\.tar are two shards of one name"):
        list_shards(shards, SUFFIXES)


def test_a_killed_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    program = (
        "import os, sys; from latentclip.storage import Folder; os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "Folder(sys.argv[1]).create('shard', bytes(10**6))"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_has_only_files_with_names_serves_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_TMPFILE | os.O_EXCL | os.O_CREAT)  # the kernel refuses it, as NFS would
    folder = Folder(tmp_path)
    assert folder.create("shard", b"one")
    assert not folder.create("shard", b"two")
    folder.replace("log", b"first")
    folder.replace("log", b"second")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"shard": b"one", "log": b"second"}
