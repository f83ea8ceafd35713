"""Format versions of records, dataset files and shard headers: older ones are upgraded in memory when they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from latentclip import lineage
from latentclip.errors import UsageError

FORMAT_VERSION = 3


def _keys_by_filter(values: dict[str, Any]) -> dict[str, Any]:
    """Filtered keys have the name of their filter since version 2; version 1 had a list, and nothing that filled it."""
    return {**values, "filtered_keys": {}} if "filtered_keys" in values else values


def _row_ids(values: dict[str, Any]) -> dict[str, Any]:
    """Rows have ids since version 3. Those of older records count as new in their generation.

    What a later generation of an older format kept of an earlier one is unknown, so that nothing is taken for the row
    that it was: to a training pinned before, such a rewritten shard has lost all its rows. Shapes of bucketed
    latents stand in the shard alone, and `migrate` fills them in. Without an XXH3, readers compare the SHA-256.
    """
    if "keys_sha256" not in values:
        return values
    row_ids = lineage.fresh(values["generation"], values["counts"]["stored"])
    return {**values, "row_ids": row_ids, "shapes": {}, "xxh3": ""}


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _keys_by_filter, 2: _row_ids}
"""What makes the next version of each, for files of every kind."""


def upgrade(values: dict[str, Any]) -> dict[str, Any]:
    """The same content in the newest format; raises UsageError for a version that is unknown here."""
    version = values.get("format_version")
    if version != FORMAT_VERSION and version not in UPGRADES:
        raise UsageError(f"it is of format {version}; update latentclip to read it")
    while (version := values["format_version"]) != FORMAT_VERSION:
        values = {**UPGRADES[version](values), "format_version": version + 1}
    return values
