"""A local disk that is full, a writer that fails anywhere, and writers that do not know of each other."""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from demo_pairs import emoji_shards
from encoded import content, encode_all
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from latent_samples import fill, make_dataset, make_outcome, make_rows

from latentclip.dataset import LatentDataset
from latentclip.records import DATASET_FILE, Record
from latentclip.shards import LatentRows, ShardCorrupt, find_record, finished, read_shard, write_shard
from latentclip.storage import Folder
from latentclip.verify import verify


@pytest.mark.timeout(60)
@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_a_full_output_disk_names_the_shard_and_a_rerun_completes(
    small_disk: Path, tmp_path: Path, container: str
) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=2, rows=12)
    encode_all(pairs, tmp_path / "expected", container=container)
    expected, out = content(tmp_path / "expected"), small_disk / "latents"
    room = sum(map(len, expected.values())) // 2
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_bsize - room))
    with pytest.raises(OSError, match=rf"No space left on device.*{out}/0000") as error:
        encode_all(pairs, out, container=container)
    assert error.value.errno == errno.ENOSPC
    assert content(out).items() < expected.items()
    assert not [name for name in os.listdir(out) if name.startswith(".")], "a staged file takes up the full disk"
    ballast.unlink()
    encode_all(pairs, out, container=container)
    assert content(out) == expected


def test_a_full_spool_is_named(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=1, rows=12)
    (small_disk / "ballast").write_bytes(bytes(8 * 2**20 - 2**16))
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    with pytest.raises(OSError, match=rf"No space left on device.*{small_disk}"):
        encode_all(pairs, tmp_path / "out")
    assert [*content(tmp_path / "out")] == [DATASET_FILE]


CALLS = ("mkdir", "open", "fsync", "link", "unlink", "close")
"""The calls to the system that publishing makes."""


class Breaks:
    """Lets the n-th of a writer's calls to the system fail, before it acts or after."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, at: int, after: bool, error: int) -> None:
        self.folder, self.at, self.after, self.error = str(folder), at, after, error
        self.count = 0
        self.broken = ""
        self.close = os.close
        for name in CALLS:
            patch.setattr(os, name, self._wrap(name, getattr(os, name)))
        patch.setattr(io, "open", self._wrap("open", io.open))  # what pathlib reads by
        patch.setattr(builtins, "open", self._open)

    def _open(self, file: Any, mode: str = "r", *rest: Any, call: Callable[..., Any] = open, **options: Any) -> Any:
        """As `open` does it; writes into the descriptor of a staged file count."""
        if mode != "wb" or not self._concerns(file):
            return call(file, mode, *rest, **options)
        raw = io.FileIO(file, mode)
        raw.write = self._wrap("write", raw.write, concerned=True)  # type: ignore[method-assign]
        return io.BufferedWriter(raw)

    def _wrap(self, name: str, call: Callable[..., Any], concerned: bool = False) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            if not concerned and not self._concerns(args[0]):
                return call(*args, **options)
            self.count += 1
            if self.count != self.at:
                return call(*args, **options)
            self.broken = name
            if self.after:
                made = call(*args, **options)
                if name == "open":
                    self.close(made) if isinstance(made, int) else made.close()
            raise OSError(self.error, os.strerror(self.error))

        return wrapped

    def _concerns(self, target: object) -> bool:
        """Whether a path, or the file of a descriptor, lies in the folder."""
        try:
            path = f"/proc/self/fd/{target}" if isinstance(target, int) else os.fspath(target)  # type: ignore[call-overload]
            path = os.readlink(path) if path.startswith("/proc/self/fd/") else path
        except (OSError, TypeError):
            return False
        return str(path).startswith(self.folder)


def publish(path: Path) -> None:
    fill(path, shards=2, rows=3)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_writer_that_fails_at_any_call_leaves_nothing_partial(tmp_path: Path, after: bool, error: int) -> None:
    publish(tmp_path / "expected")
    expected = content(tmp_path / "expected")
    points: list[str] = []
    for at in range(1, 200):
        out = tmp_path / f"out{at}"
        with pytest.MonkeyPatch.context() as patch:
            breaks = Breaks(patch, out, at, after, error)
            raised = None
            try:
                publish(out)
            except OSError as failure:
                raised = failure
        if not breaks.broken:
            break
        points.append(breaks.broken)
        assert content(out).items() <= expected.items(), f"call {at}, {breaks.broken}, left something partial"
        assert raised is None or str(out) in str(raised), f"call {at}, {breaks.broken}, failed without a name: {raised}"
        publish(out)
        assert content(out) == expected, f"the rerun after call {at}, {breaks.broken}, differs"
    assert len(points) >= 20
    assert {"open", "write", "fsync", "link", "close"} <= set(points)


class Crash(BaseException):
    """The process has ended."""


class CrashingStore:
    """A store of which the n-th operation is the writer's last: it is done or not, but nothing comes after it."""

    def __init__(self, store: Any, at: int, done: bool) -> None:
        self.store, self.at, self.done, self.count = store, at, done, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = getattr(self.store, name)

        def last(*args: Any, **options: Any) -> Any:
            self.count += 1
            if self.count != self.at:
                return operation(*args, **options)
            if self.done:
                with suppress(OSError):
                    operation(*args, **options)
            raise Crash

        return last


def crashing(path: Path | str, at: int, done: bool) -> Folder:
    folder = Folder(path)
    folder._store = CrashingStore(folder._store, at, done)  # type: ignore[assignment]
    return folder


def write(folder: Folder, rows: LatentRows) -> Record:
    return write_shard(folder, make_dataset(), rows, make_outcome("00000", rows))


@pytest.mark.parametrize("done", [False, True])
def test_a_writer_that_ends_after_any_operation_is_made_good_by_the_next(tmp_path: Path, done: bool) -> None:
    rows, crashes = make_rows(), 0
    record = write(Folder(tmp_path / "expected"), rows)
    expected = content(tmp_path / "expected")
    for at in range(1, 20):
        out = tmp_path / f"out{at}"
        try:
            write(crashing(out, at, done), rows)
            break
        except Crash:
            crashes += 1
        assert content(out).items() <= expected.items()
        assert write(Folder(out), rows) == record
        assert content(out) == expected
    assert crashes >= 4


def test_a_zombie_changes_nothing_and_adopts(tmp_path: Path) -> None:
    """An old attempt that was cut off after any operation goes on when its successor has finished."""
    rows, other = make_rows(), make_rows(seed=9)
    for at in range(1, 6):
        for zombie_rows in (rows, other):
            out = tmp_path / f"{at}-{zombie_rows is other}"
            folder, winner, before = Folder(out), None, {}
            operations = 0

            class Interrupted(CrashingStore):
                def __getattr__(self, name: str) -> Callable[..., Any]:
                    operation = getattr(self.store, name)

                    def interrupted(*args: Any, **options: Any) -> Any:
                        nonlocal operations, winner, before
                        operations += 1
                        if operations == at:  # noqa: B023 - used within the loop's body only
                            winner = write(Folder(out), rows)  # noqa: B023
                            before = content(out)  # noqa: B023
                        return operation(*args, **options)

                    return interrupted

            folder._store = Interrupted(folder._store, 0, False)  # type: ignore[assignment]
            result = write(folder, zombie_rows)
            if operations < at:
                continue
            assert winner is not None
            assert before.items() <= content(out).items(), "a published byte has changed"
            newest = find_record(Folder(out), "00000", "parquet")
            assert newest == result, "the zombie was told of another record than the one that counts"
            if zombie_rows is rows:
                assert (result, content(out)) == (winner, before)
            stored = read_shard(f"{out}/{result.data}", checksum=result.sha256)
            assert stored.keys == rows.keys


class CommitProtocol(RuleBasedStateMachine):
    """Writers of the same and of other bytes begin, crash at any operation and begin again, on one folder."""

    @initialize()
    def start(self) -> None:
        import uuid

        self.url = f"memory://protocol-{uuid.uuid4().hex}"
        self.published: dict[str, bytes] = {}

    def now(self) -> dict[str, bytes]:
        return content(self.url)

    @rule(seed=st.integers(0, 2), at=st.integers(1, 12), done=st.booleans())
    def write_and_crash(self, seed: int, at: int, done: bool) -> None:
        with suppress(Crash):
            write(crashing(self.url, at, done), make_rows(seed=seed))

    @rule(seed=st.integers(0, 2))
    def write_to_the_end(self, seed: int) -> None:
        before = find_record(Folder(self.url), "00000", "parquet")
        record = write(Folder(self.url), make_rows(seed=seed))
        assert before is None or record == before, "a finished shard was written again"
        assert find_record(Folder(self.url), "00000", "parquet") == record

    @invariant()
    def published_bytes_never_change(self) -> None:
        if not hasattr(self, "url"):
            return
        now = self.now()
        assert self.published.items() <= now.items()
        self.published = now

    @invariant()
    def what_has_a_record_reads(self) -> None:
        if not hasattr(self, "url"):
            return
        folder = Folder(self.url)
        for name in finished(folder).values():
            record = Record.read(folder, name)
            read_shard(folder.path(record.data), checksum=record.sha256, size=record.bytes, dataset=make_dataset())


CommitProtocol.TestCase.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)
TestCommitProtocol = CommitProtocol.TestCase


FLIPPED_FILES = 500


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_one_flipped_byte_in_each_of_many_files_is_noticed(tmp_path: Path, container: str) -> None:
    """In pages, footers, headers and members of data files, and anywhere in a record."""
    folder, records = fill(tmp_path, shards=25, rows=6, container=container)
    generator = random.Random(f"flips {container}")
    noticed = {"data": 0, "footer": 0, "record": 0}
    for number in range(FLIPPED_FILES // 2):
        record = records[number % len(records)]
        part = ("data", "footer", "record")[number // len(records) % 3]
        name = record.name if part == "record" else record.data
        intact = folder.read(name)
        position = generator.randrange(max(0, len(intact) - 400) if part == "footer" else 0, len(intact))
        flipped = bytearray(intact)
        flipped[position] ^= 1 << generator.randrange(8)
        folder.replace(name, bytes(flipped))
        with pytest.raises(ShardCorrupt, match=record.shard):
            LatentDataset(folder.path(record.data)).read(0)
        if part != "record":
            with pytest.raises(ShardCorrupt, match="was changed"):
                read_shard(folder.path(name), checksum=record.sha256)
        noticed[part] += 1
        folder.replace(name, intact)
        if number % len(records) == len(records) - 1:
            _all_noticed_by_verify(folder, records, part, generator)
    assert sum(noticed.values()) == FLIPPED_FILES // 2


def _all_noticed_by_verify(folder: Folder, records: list[Record], part: str, generator: random.Random) -> None:
    """Flip a byte in every shard at once, let verify say which are bad, and restore them."""
    intact = {}
    for record in records:
        name = record.name if part == "record" else record.data
        intact[name] = folder.read(name)
        flipped = bytearray(intact[name])
        flipped[generator.randrange(max(0, len(flipped) - 400) if part == "footer" else 0, len(flipped))] ^= 0x10
        folder.replace(name, bytes(flipped))
    assert [bad["shard"] for bad in verify(folder.url).bad_shards] == [record.shard for record in records]
    for name, data in intact.items():
        folder.replace(name, data)
