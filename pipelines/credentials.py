"""Credentials of object stores, from the program that starts a job to its workers, and to nothing else.

Variables in a `runtime_env` come back from Ray's jobs API and stand in its logs. These travel as an object in the
object store instead: workers get a reference, fetch the values and set them in their own environment. No log, job
record, configuration or exception shows them, since what holds them prints only their names.

The program finds them in its own environment: on a submitted job that is the head node's, where a Kubernetes secret or
an instance's role puts them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import ray

PREFIXES = ("AWS_", "GOOGLE_", "AZURE_", "FSSPEC_", "HF_TOKEN", "HF_ENDPOINT", "WANDB_", "LATENTCLIP_")
"""Beginnings of the variables that stores, hubs and Weights & Biases read: keys, tokens, endpoints, regions."""


@dataclass(frozen=True)
class Credentials:
    """Environment variables whose values are never printed. Reading them takes `reveal`."""

    names: tuple[str, ...]
    _values: tuple[str, ...] = field(repr=False)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Credentials:
        """Those among an environment."""
        names = tuple(sorted(name for name in environment if name.startswith(PREFIXES)))
        return cls(names, tuple(environment[name] for name in names))

    def reveal(self) -> dict[str, str]:
        """The variables with their values."""
        return dict(zip(self.names, self._values, strict=True))


class Sealed:
    """A reference to credentials in Ray's object store, to be handed to actors and tasks."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._reference = ray.put(Credentials.of(environment))

    def open(self) -> None:
        """Set the variables in this process; the ones it has already stay, since a node may have a role of its own."""
        for name, value in ray.get(self._reference).reveal().items():
            os.environ.setdefault(name, value)
