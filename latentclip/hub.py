"""Where pretrained files come from when they are not local, and loading them without noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from latentclip.errors import UsageError


def snapshot(name: str, patterns: list[str], *, advice: str) -> Path:
    """Folder of the hub repository `name` with the files matching `patterns`, from the local cache where it is there.

    Raises UsageError, ending in `advice`, if there is no such repository or the hub cannot be reached.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"{name!r} is no local directory and cannot be fetched from the hub ({reason}); {advice}"
        ) from error


@contextmanager
def quiet(logging: ModuleType) -> Iterator[None]:
    """Silence transformers or diffusers (given by their `utils.logging`): both report on sound files, and draw bars."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
