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


def first_line(e: BaseException) -> str:
    """Return the first line of an error's message, or its type without one."""
    lines = [line for line in str(e).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(e).__name__
