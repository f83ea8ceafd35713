"""The one error type that a user can mend."""

from __future__ import annotations

import math
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
        if value is not None and not least <= value < math.inf:  # NaN and infinity fail as well
            raise UsageError(f"--{name.replace('_', '-')} is {value}; give at least {least}")


def require_above_0(**values: float | None) -> None:
    """Raise UsageError for the first value that is not above 0; None passes."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; give a number above 0")


def require_between(least: float, most: float, **values: float | None) -> None:
    """Raise UsageError for the first value that is not in [least, most], NaN among them; None passes."""
    for name, value in values.items():
        if value is not None and not least <= value <= most:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; give a number from {least:g} to {most:g}")


def drop_stdout() -> None:
    """Let a program end quietly after BrokenPipeError (`... | head`): Python would write the rest at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
