"""A folder that is there in full or not at all: its commit file, written last, holds size and hash of every other."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from latentclip.errors import UsageError

FORMAT_VERSION = 1
COMMIT = "checkpoint.json"
LARGEST_COMMIT = 16 << 20
"""Bytes of a commit file, at most: what is longer is none, and is not read."""


def verify_checkpoint(folder: Path) -> None:
    """Raise UsageError, naming the file, unless every file is there with the bytes it was written with."""
    for name, expected in read_commit(folder)["files"].items():
        file = folder / name
        try:
            whole = file.is_file() and file.stat().st_size == expected["bytes"]
            problem = "" if whole else "is missing or cut off"
            if whole and _sha256(file) != expected["sha256"]:
                problem = "has changed"
        except OSError as error:
            problem = f"cannot be read ({error})"
        if problem:
            raise UsageError(f"checkpoint {folder} is damaged: {name} {problem}; use an older checkpoint")


def is_good(folder: Path) -> bool:
    """Whether a checkpoint is whole and unchanged."""
    try:
        verify_checkpoint(folder)
    except UsageError:
        return False
    return True


def commit_text(files: dict[str, Any]) -> str:
    """The commit file's content. It holds its own digest, so that a flip in it is noticed as well."""
    body = json.dumps({"files": files, "format_version": FORMAT_VERSION}, sort_keys=True)
    return json.dumps({"commit": json.loads(body), "sha256": hashlib.sha256(body.encode()).hexdigest()}, sort_keys=True)


def commit(folder: Path) -> None:
    """Write the commit, last, with everything on the disk before it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        _sync(path)
    files = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in paths}
    (folder / COMMIT).write_text(commit_text(files))
    for path in (folder / COMMIT, folder / "tokenizer", folder):
        _sync(path)


def read_commit(folder: Path) -> dict[str, Any]:
    """The commit of a folder, whatever else is there; raises UsageError unless it is one as it was written."""
    file = folder / COMMIT
    try:
        text = file.read_text() if file.is_file() and file.stat().st_size <= LARGEST_COMMIT else ""
        commit = json.loads(text)["commit"]
        entries = commit["files"].items()
        sound = bool(entries) and commit_text(commit["files"]) == text and all(_is_inside(name) for name, _ in entries)
        sound = sound and all(set(value) == {"bytes", "sha256"} for _, value in entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise UsageError(f"{folder / COMMIT} is missing or damaged; use an older checkpoint")
    return commit


def _is_inside(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def put_in_place(partial: Path, folder: Path) -> None:
    """Give the finished folder its name; what was there, whatever it is, gives way."""
    if os.path.lexists(folder):
        folder.rename(partial.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"))
    partial.rename(folder)
    _sync(folder.parent)
    for old in partial.parent.glob(f".{folder.name}.*.partial"):
        remove(old)


def remove(path: Path) -> None:
    """Delete a folder or whatever else it is; what cannot be deleted stays, since no training need end for it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
