"""Checkpoints of a run in a second place, an object store or another folder: copied there, and fetched from there.

    URL/checkpoints/step_00001000/    the files of the checkpoint; its commit, written last, makes it one
    URL/samples.jsonl, ...            the logs that a training which goes on from there needs, and its configuration

A copy that was cut off has no commit and counts for nothing; what is fetched is checked as any checkpoint is.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from latentclip._commit import COMMIT, LARGEST_COMMIT, put_in_place, read_commit, remove, verify_checkpoint
from latentclip.checkpoint import outdated, step_folder, step_of
from latentclip.claim import ClaimLostError, publish
from latentclip.errors import UsageError
from latentclip.fetch import fetch
from latentclip.records import ShardCorrupt
from latentclip.step_log import LOG, SKIPS
from latentclip.storage import Buffer, Folder, locate
from latentclip.tracker import ID
from latentclip.validation_log import FILE as VALIDATION
from latentclip.validation_log import best_step

LOGS = (LOG, SKIPS, VALIDATION, ID)
"""What a training goes on with beside a checkpoint: losses, skips, what validation found, its id at W&B."""


class Uploaded:
    """The uploads at a URL, or in a local folder. Failures of a store are OSErrors that name the object."""

    def __init__(self, url: str) -> None:
        self.folder = Folder(url)
        self.url = self.folder.url

    def checkpoints(self) -> dict[int, dict[str, int]]:
        """Bytes of each file of each checkpoint, whole or not, by its step; the newest first."""
        found: dict[int, dict[str, int]] = {}
        for path, size in Folder(self.folder.path("checkpoints")).tree().items():
            name, _, file = path.partition("/")
            if (step := step_of(name)) is not None:
                found.setdefault(step, {})[file] = size
        return dict(sorted(found.items(), reverse=True))

    def place(self, step: int) -> Folder:
        """The folder of a checkpoint."""
        return Folder(self.folder.path(f"checkpoints/{step_folder(Path(), step).name}"))

    def holds(self, checkpoint: Path, step: int) -> bool:
        """Whether a checkpoint is there already: the same commit, and files of the sizes in it."""
        there = self.checkpoints().get(step, {})
        files = read_commit(checkpoint)["files"]
        same = {name: entry["bytes"] for name, entry in files.items()}.items() <= there.items()
        return same and COMMIT in there and self.place(step).read(COMMIT) == (checkpoint / COMMIT).read_bytes()

    def upload(self, checkpoint: Path, step: int, check: Callable[[], None]) -> None:
        """Copy a checked checkpoint, in place of what is there; `check` may raise before each file."""
        place = self.place(step)
        place.delete(COMMIT)
        for name in read_commit(checkpoint)["files"]:
            check()
            folder, last = locate(place.path(name))
            folder.upload(last, checkpoint / name)
        check()
        place.upload(COMMIT, checkpoint / COMMIT)

    def upload_logs(self, run: Path, names: Iterable[str]) -> None:
        """Copy the files of a run with these names that are there and have another size here."""
        with TemporaryDirectory() as scratch:
            for name in names:
                if (run / name).is_file():
                    copy = Path(shutil.copyfile(run / name, Path(scratch) / name))  # a training may be adding to it
                    if copy.stat().st_size != self._size(name):
                        self.folder.upload(name, copy)

    def delete_old(self, run: Path, step: int, keep: int, sound_until: float, metric: str | None) -> None:
        """Delete of the uploads of a run up to `step` what `checkpoint.delete_old` would; those with a commit count."""
        there = {number: files for number, files in self.checkpoints().items() if number <= step}
        best = best_step(run, metric, there) if metric else None
        for number in outdated(list(there), lambda number: COMMIT in there[number], keep, sound_until, best):
            self.place(number).delete(COMMIT)  # first, so that what is deleted in part is none
            self.place(number).remove()

    def fetch_newest(self, run: Path, stage: Path, after: int, say: Callable[[str], None]) -> list[int]:
        """Put the newest good checkpoint of a later step than `after` into a run, with its logs.

        `stage` is a claim of the run. Returns the steps of those that are spoiled and were passed over, with a line.
        """
        spoiled = []
        for step, files in self.checkpoints().items():
            if step <= after:
                break
            if COMMIT not in files:
                continue
            try:
                self._fetch(step, run, stage)
            except ClaimLostError:
                raise
            except UsageError as error:
                say(f"train: {self.place(step)} is passed over: {error}")
                spoiled.append(step)
            else:
                say(f"train: {self.place(step)} was fetched")
                break
        return spoiled

    def _fetch(self, step: int, run: Path, stage: Path) -> None:
        place, final = self.place(step), step_folder(run, step)
        partial = stage / f".{final.name}.fetched.partial"
        partial.mkdir()
        try:
            if place.size(COMMIT) <= LARGEST_COMMIT:
                (partial / COMMIT).write_bytes(place.read(COMMIT))
            for name, entry in read_commit(partial)["files"].items():
                (partial / name).parent.mkdir(exist_ok=True)
                _download(place.path(name), entry["bytes"], partial / name)
            verify_checkpoint(partial)
            self._fetch_logs(run, stage)
            final.parent.mkdir(exist_ok=True)
            put_in_place(partial, final)
        finally:
            remove(partial)

    def _fetch_logs(self, run: Path, stage: Path) -> None:
        """Take over the logs that are longer here: they only grow while a training goes on."""
        for name in LOGS:
            here = (run / name).stat().st_size if (run / name).is_file() else -1
            if self._size(name) > here:
                (stage / name).write_bytes(self.folder.read(name))
                publish(stage / name, run / name)

    def _size(self, name: str) -> int:
        """Bytes of a log; -1 if it is not here."""
        try:
            return self.folder.size(name)
        except FileNotFoundError:
            return -1


def _download(url: str, size: int, file: Path) -> None:
    """Fetch an object of `size` bytes; raises UsageError if there is none of that size."""
    lock = threading.Lock()
    with file.open("wb") as opened:

        def write(start: int, part: Buffer) -> None:
            try:
                with lock:
                    opened.seek(start)
                    opened.write(part)
                    opened.flush()
            except OSError as error:  # which names no file
                raise OSError(error.errno, error.strerror, str(file)) from error

        try:
            fetch(url, size, write)
        except ShardCorrupt:
            raise UsageError(f"{url} is missing or cut off") from None
