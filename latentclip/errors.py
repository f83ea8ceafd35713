"""The one error type that a user can mend."""


class UsageError(ValueError):
    """Something a user can mend; the message says in one sentence what is wrong and what to do.

    Programs print it as `error: ...` without a traceback. The stages then exit with status 2; `python -m latentclip
    verify`, whose 2 means corrupt, exits with 3.
    """
