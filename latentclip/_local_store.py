"""A folder on a local disk: files that are published whole, under a free name, and synced."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

STAGED = ".staging-"
"""What the names of files begin with that are being written, or were left by a killed writer."""

_COPIED = 1 << 20
"""Bytes of a file that are copied at a time."""

Buffer = bytes | memoryview
"""What is published: a shard may lie in a mapped file."""


class LocalStore:
    """obstore's own local store neither syncs what it links nor accepts a folder that does not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        try:
            with os.scandir(self.path) as entries:
                return [entry.name for entry in entries if entry.is_file() and not entry.name.startswith(STAGED)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def tree(self) -> dict[str, int]:
        found = {}
        for folder, _, names in os.walk(self.path):
            for name in names:
                if name.startswith(STAGED):
                    continue
                path = Path(folder, name)
                with suppress(FileNotFoundError):  # it was published under its name, or deleted, meanwhile
                    found[path.relative_to(self.path).as_posix()] = path.stat().st_size
        return found

    def exists(self, name: str) -> bool:
        return (self.path / name).is_file()

    def modified(self) -> dict[str, float]:
        found = {}
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):  # its writer published it under its name meanwhile
                        if entry.is_file():
                            found[entry.name] = entry.stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            pass
        return found

    def read(self, name: str) -> bytes:
        with self._named(name):
            return (self.path / name).read_bytes()

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def read_range(self, name: str, start: int, stop: int) -> Buffer:
        with self._named(name), self.open(name) as file:
            file.seek(start)
            return file.read(stop - start)

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")

    def upload(self, name: str, file: Path) -> None:
        with file.open("rb") as source:
            self.write(name, source, overwrite=True)

    def write(self, name: str, data: Buffer | BinaryIO, overwrite: bool) -> bool:
        with self._named(name):
            self.path.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.path, os.O_RDONLY)
            try:
                with self._staged(data) as staged:
                    self._publish(staged, name, folder, overwrite)
                os.fsync(folder)
            except FileExistsError:
                return False
            finally:
                os.close(folder)
            return True

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a failing read or write names no file, and a link names the staged one
            raise OSError(error.errno, error.strerror, str(self.path / name)) from error

    def _publish(self, staged: str, name: str, folder: int, overwrite: bool) -> None:
        if not overwrite:
            os.link(staged, name, dst_dir_fd=folder)  # follows the link in /proc, since a folder is given
            return
        free = f"{STAGED}{uuid.uuid4().hex}"
        os.link(staged, free, dst_dir_fd=folder)
        os.replace(free, name, src_dir_fd=folder, dst_dir_fd=folder)

    @contextmanager
    def _staged(self, data: Buffer | BinaryIO) -> Iterator[str]:
        """The path of a synced file, one without a name wherever possible: a killed writer leaves nothing behind."""
        try:
            descriptor = os.open(self.path, os.O_TMPFILE | os.O_WRONLY, 0o666)
            staged = f"/proc/self/fd/{descriptor}"
        except OSError:  # NFS, for one, has only files with names
            staged = str(self.path / f"{STAGED}{uuid.uuid4().hex}")
            descriptor = os.open(staged, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            with open(descriptor, "wb") as file:
                if isinstance(data, Buffer):
                    file.write(data)
                else:
                    shutil.copyfileobj(data, file, _COPIED)
                file.flush()
                os.fsync(file.fileno())
                yield staged
        finally:
            if not staged.startswith("/proc/"):
                Path(staged).unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def remove(self) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self.path)
