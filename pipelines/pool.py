"""A pool of actors that works through shards and outlives what happens to a cluster. Ray Data schedules it.

    for answer in answers(Encoder, (config, threads), rows, actors, {"num_gpus": 1.0}): ...

Actors and nodes that are lost are replaced, and what they were at is done again. A shard that takes every actor with
it is given up in the end: it comes back as a problem with its cause, the others go on.
"""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning

from latentclip.errors import UsageError
from pipelines.worker_exit import end_at_once

IN_FLIGHT = 2
"""Shards an actor has at once: one is read or written while the codec works for the other. Losing it repeats both."""
RETRIES = 4
"""Times that a shard is begun again after its actor was lost. Ray Data's default is for ever, which a shard that kills
its actor would take."""
RESTARTS = 1000
"""Times that one actor is replaced: enough for weeks on preempted nodes, yet an end where it cannot even start."""
TOLERATED = 100
"""Shards that may be given up at first, or 1 % of them, beside some for each actor. More is the actors' fault."""
HOPELESS = 3
"""Shards given up one after the other, with nothing done between them, before it is the actors' fault, not theirs."""
_REFUSED, _FAILED = "refused", "failed"

Worker = Callable[[dict[str, Any]], dict[str, list[Any]]]


class ActorsLost(UsageError):  # noqa: N818 - what became of them
    """The actors die whatever they work on; the message says of what."""


class WorkerFailed(RayError):  # noqa: N818 - what became of it
    """A worker raised what is no answer; it is treated as if it had died."""


class _Started:
    """What Ray Data starts: the worker itself is made by the first call, so that starting counts as a try of a shard.

    A constructor that fails for good ends a restarted actor without Ray Data noticing, and one that is killed again
    and again is restarted for ever. A call has `RETRIES`.
    """

    def __init__(self, make: Callable[..., Worker], arguments: tuple[Any, ...]) -> None:
        end_at_once()
        self._make = make
        self._arguments = arguments
        self._worker: Worker | None = None
        self._starting = Lock()
        self._failed = False

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        try:
            with self._starting:
                self._worker = self._worker or self._make(*self._arguments)
        except UsageError as error:  # as an answer, since Ray Data forgets the type of an exception
            return {"shard": list(batch["shard"]), _REFUSED: [str(error)] * len(batch["shard"])}
        except Exception:  # a broken device, say: another process, perhaps on another node, may do better
            traceback.print_exc()
            os._exit(1)
        try:
            answer = self._worker(batch)
            self._failed = False
            return answer
        except Exception as error:
            traceback.print_exc()
            if self._failed:  # twice in turn: this process may be what is broken, as after some errors of CUDA
                os._exit(1)
            self._failed = True
            return {"shard": list(batch["shard"]), _FAILED: [f"{type(error).__name__}: {error}"] * len(batch["shard"])}


def answers(
    make: Callable[..., Worker],
    arguments: tuple[Any, ...],
    rows: list[dict[str, Any]],
    actors: int,
    resources: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Run `actors` of what `make(*arguments)` makes over `rows`, each with its shard as `row["shard"]`.

    Yields one answer a row, in the order in which they end: the worker's own, or `{"shard", "problem"}` for a shard
    that no actor survived. Raises ActorsLost if they survive none, and a worker's UsageError in starting.
    """
    waiting = {row["shard"]: row for row in rows}
    tolerated = 2 * IN_FLIGHT * actors + min(len(rows) // 100, TOLERATED)
    try:
        for answer in _stream(make, arguments, rows, min(actors, len(rows)), resources, IN_FLIGHT, tolerated):
            del waiting[answer["shard"]]
            yield answer
    except RayError as error:
        raise _lost(error) from error
    # What was lost too often, be it only beside a bad shard, has one more chance, alone with a new actor.
    hopeless = 0
    for shard, row in waiting.items():
        try:
            yield from _stream(make, arguments, [row], 1, resources, in_flight=1, tolerated=0)
            hopeless = 0
        except RayError as error:
            hopeless += 1
            if hopeless == min(HOPELESS, len(rows)):
                raise _lost(error) from error
            problem = f"{shard} is given up, since every actor fails or dies with it ({_cause(error)})"
            yield {"shard": shard, "problem": problem}


def _stream(
    make: Callable[..., Worker],
    arguments: tuple[Any, ...],
    rows: list[dict[str, Any]],
    actors: int,
    resources: dict[str, Any],
    in_flight: int,
    tolerated: int,
) -> Iterator[dict[str, Any]]:
    """One execution of Ray Data; shards that were lost too often, up to `tolerated`, do not appear in it."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = tolerated
    # By default the first actor that does not start ends the job.
    context.max_consecutive_actor_init_deaths = RETRIES
    # By default a job without a result in half an hour fails, and a shard may take longer.
    context.execution_no_progress_timeout_s = -1
    for name in ("_internal.execution.streaming_executor_state", "exceptions"):  # a traceback for each shard given up
        logging.getLogger(f"ray.data.{name}").setLevel(logging.CRITICAL)
    strategy = ray.data.ActorPoolStrategy(
        size=actors,
        max_tasks_in_flight_per_actor=in_flight,
        max_concurrent_calls_per_actor=in_flight,
        enable_true_multi_threading=True,
    )
    with warnings.catch_warnings():
        # The two options have no other name yet.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Started,
            fn_constructor_args=(make, arguments),
            batch_size=1,
            compute=strategy,
            max_restarts=RESTARTS,
            max_task_retries=RETRIES,
            **resources,
        )
    failed = 0
    for answer in results.iter_rows():
        if _REFUSED in answer:
            raise UsageError(answer[_REFUSED])
        if _FAILED not in answer:
            yield answer
            continue
        failed += 1
        if failed > tolerated:
            raise WorkerFailed(answer[_FAILED])


def _lost(error: RayError) -> ActorsLost:
    return ActorsLost(
        f"the actors fail or die whatever they work on ({_cause(error)}); Ray's worker logs say more; see that they "
        "start and fit in memory, and run the same command"
    )


def _cause(error: RayError) -> str:
    """What Ray, or the worker, says first."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
