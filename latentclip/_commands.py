"""The commands of `python -m latentclip` that change or watch a folder of latents, or export a model."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from latentclip.clean import clean, parse_age
from latentclip.errors import UsageError
from latentclip.migrate import migrate
from latentclip.release import release
from latentclip.removal import remove
from latentclip.status import status
from latentclip.storage import read_bytes

Tars = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TARS")]
Shards = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SHARD...")]
Latents = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="LATENTS")]
Run = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
Out = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]


def remove_command(
    latents: Latents, keys: str | None = None, column: str = "url", purge: bool = True, json: bool = False
) -> int:
    """Take samples out (takedown, opt-out), and keep every later encode from storing them again.

    Each shard that stores one of them gets its next generation without them. May be killed and run again; a second
    run writes nothing. Exit status: 0 done; 1 if a shard could not be read, so that nothing was removed there.

    Args:
        latents: Folder or URL of the latents.
        keys: File of keys and URLs, one a line, compared exactly. Without it the removals so far are applied again.
        column: Metadata column that holds the URLs.
        purge: Delete the older generations' data files, which still hold what was removed. A training that reads
            them just now stops, and goes on when it is started again.
        json: Print one JSON object.
    """
    removal = remove(latents, _lines(keys) if keys else (), column, purge)
    _print(removal, json)
    return 1 if removal.problems else 0


def status_command(latents: Latents, pairs: str | None = None, records: bool = True, json: bool = False) -> int:
    """Show how far an encode is, running or stopped: shards, samples, rejects by reason, rate and last activity.

    Exit status: 0; 2 if a record cannot be read; 3 wrong usage.

    Args:
        latents: Folder or URL of the latents.
        pairs: The pair shards they are made of (folder, pattern or list); default: what the last encode was given.
        records: Read the records to count samples; without, file names alone are read.
        json: Print one JSON object.
    """
    found = status(latents, pairs, records)
    _print(found, json)
    return 2 if found.problems else 0


def release_command(latents: Latents, shards: Shards, json: bool = False) -> int:
    """Publish quarantined shards among the others, after you looked at them.

    May be killed and run again. To encode one again instead, delete its files in LATENTS/quarantine/ and run encode.
    Exit status: 0 done; 1 if a shard is not in quarantine or cannot be read; 3 wrong usage.

    Args:
        latents: Folder or URL of the latents.
        shards: Names of the shards, as verify lists them.
        json: Print one JSON object.
    """
    done = release(latents, shards)
    _print(done, json)
    return 1 if done.problems else 0


def clean_command(latents: Latents, older_than: str = "1h", dry_run: bool = False, json: bool = False) -> int:
    """Delete what killed writers and superseded generations left: nothing that counts, and nothing young.

    Args:
        latents: Folder or URL of the latents.
        older_than: Age from which a file is an orphan, with s, m, h or d. No writer of a job that still runs may
            stand still for longer, and no training may still read generations that were superseded so long ago.
        dry_run: Only name the files.
        json: Print one JSON object.
    """
    _print(clean(latents, parse_age(older_than), dry_run), json)
    return 0


def migrate_command(latents: Latents, dry_run: bool = False, json: bool = False) -> int:
    """Write records of an older format anew in the newest one. Older formats are read without it, too.

    Let no job of an older version run meanwhile. May be killed and run again. Exit status: 0; 2 if a file cannot be
    read and was left as it is; 3 wrong usage.

    Args:
        latents: Folder or URL of the latents.
        dry_run: Only count the files.
        json: Print one JSON object.
    """
    done = migrate(latents, dry_run)
    _print(done, json)
    return 2 if done.problems else 0


def import_command(
    tars: Tars,
    latents: Latents,
    space: str,
    image_size: int = 512,
    scaled: bool = False,
    kind: Literal["mean", "sample", "moments"] = "sample",
    container: Literal["parquet", "webdataset"] = "parquet",
    json: bool = False,
) -> int:
    """Make latent shards of tars with KEY.latent.pt (torch.save of a tensor), KEY.txt and KEY.json.

    Only tensors are unpickled; anything else is a reject. May be killed and run again. Exit status: 0 done; 1 if a
    tar could not be read whole; 3 wrong usage.

    Args:
        tars: The tars: a folder, a pattern or a list.
        latents: Folder or URL for the latent shards.
        space: What the latents mean: a .json file as LatentSpace.to_json gives it (a dataset.json will do), or the
            codec that made them, as for encode.
        image_size: Side of the images that were encoded, in pixels.
        scaled: The tensors have the codec's scaling and shift applied.
        kind: What the tensors are of the posterior.
        container: File format of the latent shards.
        json: Print one JSON object.
    """
    from latentclip.import_latents import import_latents, load_space  # torch takes seconds to import

    done = import_latents(tars, latents, load_space(space), image_size, scaled=scaled, kind=kind, container=container)
    _print(done, json)
    return 1 if done.problems else 0


def export_command(run: Run, out: Out, metrics: str | None = None) -> int:
    """Write a model in the layout of open_clip and the Hugging Face hub, with a model card. Uploads nothing.

    Exit status: 0 done; 3 wrong usage.

    Args:
        run: What latentclip.load takes: a run, a checkpoint, a published epoch_34.pt, a repository on the hub.
        out: New folder.
        metrics: metrics.json of pipelines/evaluate.py, for the model card.
    """
    from latentclip.exported import export  # torch takes seconds to import
    from latentclip.loaded import load

    print(f"exported to {export(load(run), Path(out), Path(metrics) if metrics else None)}")
    return 0


def _lines(file: str) -> list[str]:
    """The lines of a text file without the blank ones. Raises UsageError if there are none."""
    try:
        text = read_bytes(file).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"the list {file} does not exist; check the path") from None
    except UnicodeDecodeError:
        raise UsageError(f"the list {file} is not UTF-8; convert it") from None
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise UsageError(f"the list {file} is empty; give one key or URL a line")
    return lines


def _print(result: Any, json: bool) -> None:
    print(json_module.dumps(result.to_json(), indent=1) if json else result)


COMMANDS: dict[str, Callable[..., int]] = {
    "remove": remove_command,
    "status": status_command,
    "release": release_command,
    "clean": clean_command,
    "migrate": migrate_command,
    "import-latents": import_command,
    "export": export_command,
}
