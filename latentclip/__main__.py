"""`python -m latentclip`: what is done with latents without a cluster."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import tyro

from latentclip import _commands
from latentclip.errors import UsageError, drop_stdout
from latentclip.verify import verify

USAGE_ERROR = 3
STATUS = {"complete": 0, "incomplete": 1, "duplicates": 1, "corrupt": 2}


Latents = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="LATENTS")]


def verify_command(
    latents: Latents,
    pairs: str | None = None,
    records: bool = False,
    deep: bool = False,
    codec: str | None = None,
    json: bool = False,
) -> int:
    """Prove that no sample was lost: planned = stored + rejected + filtered + removed + pending.

    Exit status: 0 complete; 1 incomplete (samples pending, shards missing, unfinished or not to be read, or the input
    truncated) or, with --deep, keys in two shards; 2 corrupt (a record or shard is not what was written, or keys were
    lost); 3 wrong usage.

    Args:
        latents: Folder or URL of the latents.
        pairs: The pair shards they were made of (folder, pattern or list): check every input key.
        records: Read only the records: no data, and of pairs only which shards there are.
        deep: Find keys in two shards too, and with a codec decode samples.
        codec: Codec that decodes samples of each shard, compared with their images if pairs are given.
        json: Print one JSON object.
    """
    if records and deep:
        raise UsageError("--records reads no data and --deep all of it; give one of them")
    report = verify(latents, pairs, "records" if records else "deep" if deep else "bytes", codec)
    print(json_module.dumps(report.to_json(), indent=1) if json else report)
    return STATUS[report.state]


COMMANDS: dict[str, Callable[..., int]] = {"verify": verify_command, **_commands.COMMANDS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status; a UsageError is one sentence on stderr and status 3."""
    try:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS, args=arguments, prog="python -m latentclip", description=__doc__
        )
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:
        drop_stdout()
        return USAGE_ERROR
    except SystemExit as error:  # tyro's 2 for unknown options would read as "corrupt"
        return USAGE_ERROR if error.code else 0


if __name__ == "__main__":
    sys.exit(main())
