"""Ray for a stage: join a running cluster, or start a local one and stop it again.

A cluster is joined only through RAY_ADDRESS (which `ray job submit` sets) or `--ray-address`. Nothing else is looked
for, so that a laptop's stray cluster is never used by accident.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import ray
import ray.data  # before its loggers are silenced, since importing it sets their levels

from latentclip import allocator
from latentclip.errors import UsageError, drop_stdout

LOCAL_ENVIRONMENT = {
    **allocator.ENVIRONMENT,
    # The machine is the user's own, and its work is what the user waits for.
    "RAY_worker_niceness": "0",
}
"""Environment of a local cluster's processes, where the user has not set it."""

QUIET = {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_IGNORE_UNHANDLED_ERRORS": "1"}
"""Environment of this program's own core of Ray, which complains of what Ray Data makes of lost actors."""

LOCAL_OBJECT_STORE = 256 * 2**20
"""Bytes of shared memory of a local cluster: only names and records cross it, never pixels or latents."""


@contextmanager
def cluster(address: str | None = None) -> Iterator[None]:
    """Run a block with Ray connected; a cluster that this call started ends with it.

    Nested calls share the outer connection. Raises UsageError if `address` cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = joins(address)
    for name in ("ray", "ray.data", "ray._private.authentication"):  # a stage has a progress bar of its own
        logging.getLogger(name).setLevel(logging.ERROR)
    _default_environment(QUIET)
    try:
        if address:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        else:
            _default_environment(LOCAL_ENVIRONMENT)  # Ray's processes inherit it
            # Logical CPUs: two training workers and their helpers must fit on two cores, where waiting is cheap.
            cpus = max(8, os.cpu_count() or 1)
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=LOCAL_OBJECT_STORE,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except (ConnectionError, ValueError) as error:
        raise UsageError(
            f"no Ray cluster answers at {address!r} ({error}); start one, unset RAY_ADDRESS, or set "
            "RAY_AUTH_MODE=token if it asks for a token"
        ) from None
    try:
        with _stopped_by(signal.SIGTERM):
            yield
    finally:
        ray.shutdown()


def joins(address: str | None) -> str | None:
    """The address of the cluster that is joined, which may grow; None for a local one, which cannot."""
    return address or os.environ.get("RAY_ADDRESS")


def _default_environment(values: dict[str, str]) -> None:
    for name, value in values.items():
        os.environ.setdefault(name, value)


@contextmanager
def _stopped_by(number: int) -> Iterator[None]:
    """Let a signal end the block as Ctrl-C does, so that both run the same clean-up."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)


def absolute(path: str) -> str:
    """A local path made absolute, since workers may run in another directory; URLs stay."""
    return path if "://" in path else str(Path(path).absolute())


def absolute_source(source: str) -> str:
    """What `storage.list_shards` reads, with its local paths made absolute."""
    one = "{" in source or Path(source).exists()  # commas inside braces, or in a name, separate nothing
    return absolute(source) if one else ",".join(absolute(item.strip()) for item in source.split(","))


def check_output(path: str) -> None:
    """Refuse an output that cannot be written, or would be lost; call it before any work.

    What would be lost is a relative path in a submitted job, whose working directory Ray deletes.
    """
    if "://" in path:
        return
    if not Path(path).is_absolute() and "working_dir_files" in Path.cwd().parts:
        raise UsageError(
            f"the output {path!r} is relative and would land in the job's temporary directory; "
            "give an absolute path or a URL"
        )
    there = next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UsageError(f"the output {path!r} cannot be a folder, since {there} is a file; give another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"the output {path!r} cannot be written, since {there} is read-only; give another")


def warn_unless_shared(path: str) -> None:
    """Warn of a local output on a cluster of several nodes, which is right only if all of them share it."""
    if "://" not in path and sum(node["Alive"] for node in ray.nodes()) > 1:
        warnings.warn(
            f"the output {path!r} is a local path on a cluster of several nodes; it must be shared by all", stacklevel=2
        )


def run_program(program: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> None:
    """Run a stage as a program: exit status 0 for done, 1 for incomplete, 2 for wrong input, 130 when interrupted."""
    try:
        status = program(sys.argv[1:] if arguments is None else arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:
        drop_stdout()
        status = 1
    except OSError as error:
        if not _names_a_file(error):
            raise
        print(f"error: {error}; check that it can be reached and written, and run the same command", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("stopped; run the same command to go on", file=sys.stderr)
        _exit_now(130)
    sys.exit(status)


def _exit_now(status: int) -> NoReturn:
    """End without tearing the interpreter down: a thread may still wait inside Ray's core, which can crash then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _names_a_file(error: OSError) -> bool:
    """Whether a disk or a store refused: those errors name the file, or the URL. Ray's own carry tracebacks."""
    return not isinstance(error, ray.exceptions.RayError) and (error.filename is not None or "://" in str(error))
