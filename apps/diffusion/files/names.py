"""Names of files and classes, and reasons of errors, in messages of one line for any characters."""

from collections.abc import Iterable


def printable(name: object) -> str:
    """The name with escapes instead of line breaks, terminal codes and bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(name))


def first_names(names: Iterable[object], count: int = 5) -> str:
    """The first `count` names, and the number of further names."""
    known = list(names)
    more = f" and {len(known) - count} more" if len(known) > count else ""
    return ", ".join(map(printable, known[:count])) + more


def reason(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, or the name of its class if there is none."""
    return next((printable(line)[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)
