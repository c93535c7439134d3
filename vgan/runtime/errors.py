"""The exception for mistakes of the user, and what errors have to say."""


class UserError(ValueError):
    """A mistake that the user can correct: one line with the key, its value, the rule and the fix.

    The console scripts print it without a traceback and exit with code 1.
    """


def is_out_of_memory(e: BaseException) -> bool:
    """Return whether an error means that memory ran out, on any device."""
    if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError":
        return True
    return "can't allocate memory" in str(e)


def first_line(e: BaseException) -> str:
    """Return the first line of an error's message, or its type where there is none."""
    lines = [line for line in str(e).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(e).__name__
