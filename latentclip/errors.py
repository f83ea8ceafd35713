"""The one error type that a user can mend."""


class UsageError(ValueError):
    """Something a user can mend; the message says in one sentence what is wrong and what to do.

    Programs print it without a traceback and exit with status 2.
    """
