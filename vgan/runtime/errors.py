"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """A mistake the user can mend: one line that names the key, its value, the rule and the fix.

    The console scripts print it without a traceback and leave with exit code 1.
    """


def is_out_of_memory(e: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    return (
        isinstance(e, MemoryError)
        or type(e).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(e)
    )
