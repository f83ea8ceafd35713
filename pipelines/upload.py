"""Checkpoints copied to a second place while the training goes on, by a thread of the program.

    RUN/checkpoints/step_N  ->  one at a time, the newest  ->  URL/checkpoints/step_N, a line

The program does it, and not rank 0: it reads what is committed in the run's folder, so that workers come, go and train
as if there were no upload, and whoever runs the command again uploads what is missing. Whatever befalls an upload, the
training goes on.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from latentclip._commit import COMMIT
from latentclip.checkpoint import checkpoint_folders, newest_good
from latentclip.claim import ClaimLostError, claimed, require
from latentclip.errors import UsageError
from latentclip.fit import say_aloud
from latentclip.resume import reached
from latentclip.step_log import sound_until
from latentclip.storage import Folder
from latentclip.uploaded import LOGS, Uploaded
from pipelines.configs import TRAIN_FILE, TrainConfig

RETRY_SECONDS = 60.0
"""Seconds after which an upload that failed is begun again; the store was asked several times by then."""

LAST_ATTEMPTS = 3
"""Times that the last checkpoint's upload is tried. Each takes as long as the deadlines of its files at most."""

Present = frozenset[tuple[str, int]]
"""Checkpoints of a run: name, and when it was committed in ns."""


class NotUploadedError(Exception):
    """Raised where the last checkpoint could not be uploaded; the message is for the user."""


@dataclass(frozen=True)
class Outcome:
    """What an upload came to."""

    present: Present
    """Checkpoints that were there when it began."""
    step: int | None
    """The step that was uploaded; None if nothing was to be."""


class Uploads:
    """The uploads of a run to `config.upload`; without one nothing happens.

    A claim of the run and where its lines go are given by `join`, once there is a claim.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.run = config, Path(config.run)
        self.stage: Path | None = None
        self.say: Callable[[str], None] = say_aloud
        self.spoiled: list[int] = []
        """Steps whose uploads are not what was uploaded."""
        self.done: Present = frozenset()
        self.under_way: Future[Outcome] | None = None
        self.not_before = float("-inf")
        if config.upload and Folder(config.upload).url == str(self.run):
            raise UsageError(f"--upload {config.upload} is the run itself; give another folder or URL")

    def join(self, stage: Path, say: Callable[[str], None]) -> None:
        """Say what happens through `say`, and upload only as long as `stage`, a claim of the run, is not lost."""
        self.stage, self.say = stage, say

    def fetch(self, check: Callable[[Folder], None]) -> None:
        """Fetch the newest good checkpoint there if it is later than the newest good one of the run.

        `check` may refuse the folder there before. Raises OSError if the store fails, unless the run can go on without.
        """
        if not self.config.upload:
            return
        there = Uploaded(self.config.upload)
        good = newest_good(self.run)
        after = int(good.name.removeprefix("step_")) if good else 0
        try:
            check(there.folder)
            if next(iter(there.checkpoints()), 0) > after:
                with claimed(self.run) as stage:
                    self.spoiled = there.fetch_newest(self.run, stage, after, self.say)
        except OSError as error:
            if not good:
                raise
            self.say(f"train: newer checkpoints could not be looked for, going on from {good.name}: {error}")

    def poll(self) -> None:
        """Take in the upload that has ended, and begin one if there is a newer checkpoint; waits for nothing."""
        if not self.config.upload:
            return
        if self.under_way and self.under_way.done():
            self._take_in()
        if not self.under_way and time.monotonic() > self.not_before and self._present() - self.done:
            self._begin()

    def finish(self) -> None:
        """Upload the last checkpoint and the logs, and wait for it; raises NotUploadedError if that fails again."""
        if not self.config.upload:
            return
        if self.under_way:
            self._take_in()
        for attempt in range(LAST_ATTEMPTS):
            time.sleep(attempt)
            self._begin()
            if self._take_in():
                return
        raise NotUploadedError(
            f"the last checkpoint of {self.run} is not at {self.config.upload}, whose store failed {LAST_ATTEMPTS} "
            "times; run the same command again to upload it"
        )

    def _begin(self) -> None:
        future: Future[Outcome] = Future()

        def work() -> None:
            try:
                future.set_result(self._upload())
            except BaseException as error:  # raised where it is taken in
                future.set_exception(error)

        # A daemon, so that a signal need not wait for the store.
        threading.Thread(target=work, name="upload", daemon=True).start()
        self.under_way = future

    def _take_in(self) -> bool:
        """Wait for the upload under way and say what came of it; returns whether nothing is missing there."""
        assert self.under_way
        future, self.under_way = self.under_way, None
        try:
            outcome = future.result()
        except ClaimLostError:
            raise
        except Exception as error:  # file systems of fsspec raise what they like
            if self.stage:
                require(self.stage)
            self.not_before = time.monotonic() + RETRY_SECONDS
            self.say(f"train: the upload to {self.config.upload} failed, and will be tried again: {error}")
            return False
        self.done |= outcome.present
        if outcome.step is not None:
            self.say(f"train: step {outcome.step:,} uploaded to {self.config.upload}")
        return True

    def _present(self) -> Present:
        found = set()
        for _, folder in checkpoint_folders(self.run):
            with suppress(OSError):  # it was deleted meanwhile, or is none
                found.add((folder.name, (folder / COMMIT).stat().st_mtime_ns))
        return frozenset(found)

    def _upload(self) -> Outcome:
        """Upload the newest good checkpoint, unless it is there, and delete old ones there."""
        assert self.config.upload
        present, settings, there = self._present(), self.config.settings, Uploaded(self.config.upload)
        last = reached(self.run, settings)
        there.upload_logs(self.run, (TRAIN_FILE, *LOGS))  # first, as they reach to the last checkpoint at least
        if last is None:
            return Outcome(present, None)
        new = last.step in self.spoiled or not there.holds(last.checkpoint, last.step)
        if new:
            with _pinned(last.checkpoint, self.stage) if self.stage else nullcontext(last.checkpoint) as checkpoint:
                there.upload(checkpoint, last.step, lambda: require(self.stage) if self.stage else None)
            self.spoiled = [step for step in self.spoiled if step != last.step]
        there.delete_old(
            self.run, last.step, settings.keep_checkpoints, sound_until(self.run, settings), settings.keep_best
        )
        return Outcome(present, last.step if new else None)


@contextmanager
def _pinned(checkpoint: Path, stage: Path) -> Iterator[Path]:
    """The files of a checkpoint under further names in a claim, since the training deletes old checkpoints."""
    pinned = stage / f"{checkpoint.name}.upload"
    shutil.rmtree(pinned, ignore_errors=True)
    try:
        pinned.mkdir()
        for path in sorted(checkpoint.rglob("*")):
            name = pinned / path.relative_to(checkpoint)
            name.mkdir() if path.is_dir() else _link(path, name)
        yield pinned
    finally:
        shutil.rmtree(pinned, ignore_errors=True)


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # a disk without links
        shutil.copyfile(file, name)
