"""The one error type that a user can mend."""

from __future__ import annotations

import os
import sys


class UsageError(ValueError):
    """Something a user can mend; the message says in one sentence what is wrong and what to do.

    Programs print it as `error: ...` without a traceback. The stages then exit with status 2; `python -m latentclip
    verify`, whose 2 means corrupt, exits with 3.
    """


def require_at_least(least: float, **values: float | None) -> None:
    """Raise UsageError for the first value below `least`, naming it as its flag is called; None passes."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; give at least {least}")


def drop_stdout() -> None:
    """Let a program end quietly after BrokenPipeError (`... | head`): Python would write the rest at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
