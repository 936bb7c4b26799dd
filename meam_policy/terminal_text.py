"""Text from elsewhere as a terminal may be given it."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: object) -> str:
    r"""Text in one line, with what is no visible character in Python's notation, such as \x1b, \n or \udcff.

    A path, a name from the Hub or a text of a policy folder may hold what moves a terminal's cursor, passes for a line
    of ours, or cannot be encoded. A backslash stays one: this is for reading, not for undoing.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)
