"""Who may write into a run's folder: the newest to claim it. What an older one still writes never gets its final name.

    stage = claim(run)                      # from here on, every earlier claim of `run` is void
    (stage / "part").write_text(...)
    publish(stage / "part", run / "name")   # raises ClaimLostError once somebody else has claimed the run

A claim is a folder of its own, `.writer/<name>/`. Claiming swaps the whole `.writer` for a new one, and publishing is a
rename out of the claim's folder: a rename is atomic, and its source is gone once the claim is. So a writer that was cut
off, paused or forgotten for any time fails at its next step, without locks, clocks or leases, on every file system that
renames atomically (NFS too). A claim can be claimed in turn: a job claims the run, and each of its attempts the job's
claim, so that no attempt of an older job ever wins over a newer one. Nothing below a claim may be made together with
its parents (`mkdir(parents=True)`), which would bring a lost claim back.
"""

from __future__ import annotations

import errno
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from latentclip.errors import UsageError

WRITER = ".writer"
ABANDONED = 3600.0
"""Seconds after which a claim that was never put in place is removed; putting it there takes milliseconds."""


class ClaimLostError(UsageError):
    """Raised where a run's folder was claimed by somebody else in the meantime."""


def claim(folder: Path) -> Path:
    """Claim `folder`, a run's (made if need be) or a claim of it; returns the claim, an empty folder for drafts.

    Of claims made at the same time, the last counts. Raises ClaimLostError if `folder` is a claim that was lost.
    """
    if WRITER not in folder.parts:
        folder.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex[:12]
    fresh, writer = folder / f"{WRITER}-new-{name}", folder / WRITER
    try:
        fresh.mkdir()
        (fresh / name).mkdir()
        _put_in_place(fresh, writer)
    except FileNotFoundError as error:
        raise _lost(folder) from error
    _clean(folder)
    return writer / name


def release(stage: Path) -> None:
    """Give a claim up, with what is left in it; nothing happens if it was lost."""
    writer = stage.parent
    _discard(stage, writer)  # by its own name: another claim's folder may be in the place of `writer` by now
    with suppress(OSError):
        writer.rmdir()  # which leaves another claim's, as it is not empty


@contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """A claim of `folder` that is given up at the end of the `with`."""
    stage = claim(folder)
    try:
        yield stage
    finally:
        release(stage)


def publish(part: Path, final: Path) -> None:
    """Give a file or folder `part` of a claim its final name; a file of that name is replaced.

    Raises ClaimLostError, and changes nothing, if the claim was lost.
    """
    try:
        part.rename(final)
    except FileNotFoundError as error:
        require(part.parent)
        raise error


def require(stage: Path) -> None:
    """Raise ClaimLostError if the claim `stage` was lost."""
    if not stage.is_dir():
        raise _lost(stage)


def _put_in_place(fresh: Path, writer: Path) -> None:
    while True:
        _discard(writer, writer)
        try:
            fresh.rename(writer)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # or another claim came in between
                raise


def _discard(claims: Path, writer: Path) -> None:
    """Void `writer`, or one claim in it, by one rename to a name beside it, then remove what was prepared there."""
    void = writer.with_name(f"{WRITER}-void-{uuid.uuid4().hex[:12]}")
    with suppress(FileNotFoundError):
        claims.rename(void)
    shutil.rmtree(void, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Remove what those left who were killed while they claimed `folder`, or removed a claim of it."""
    for void in folder.glob(f"{WRITER}-void-*"):
        shutil.rmtree(void, ignore_errors=True)
    for fresh in folder.glob(f"{WRITER}-new-*"):
        with suppress(FileNotFoundError):  # it was put in place
            if time.time() - fresh.stat().st_mtime > ABANDONED:
                shutil.rmtree(fresh, ignore_errors=True)


def _lost(folder: Path) -> ClaimLostError:
    parts = folder.parts
    run = Path(*parts[: parts.index(WRITER)]) if WRITER in parts else folder
    return ClaimLostError(f"another training has taken over the run {run}; this one has stopped, wait for the other")
