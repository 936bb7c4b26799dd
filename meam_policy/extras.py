"""Imports of what the extras bring: which one is missing, or why what is installed cannot be imported."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from meam_policy.errors import MeamError, MissingExtraError

__all__ = ["needs", "raise_interrupt"]

_MOST_SHOWN = 300
"""Of the reason of a failed import, characters."""


@contextlib.contextmanager
def needs(what: str, library: str | None, extra: str, also: str = "") -> Iterator[None]:
    """Say of imports that fail what installs them, or why they fail although they are installed.

    Args:
        what: What needs the library, the beginning of a sentence.
        library: Its name; None takes that of whichever fails.
        extra: The extra that brings it.
        also: Put after the command that installs the extra.

    Raises:
        MissingExtraError: an import failed.
        KeyboardInterrupt: Ctrl-C stopped it, whatever the library made of that.

    Example:
        >>> with needs("The report", "jinja2", "export"):
        ...     import jinja2
    """
    try:
        yield
    except MeamError:
        raise
    except ImportError as error:
        raise_interrupt(error)
        install = f"pip install 'meam-policy[{extra}]'{also}"
        if _is_missing(error):
            raise MissingExtraError(f"{what} needs {error.name}, which is not installed: {install}.") from error
        library = library or (error.name or "").partition(".")[0] or "a library"
        reason = " ".join(str(error).split())[:_MOST_SHOWN]
        raise MissingExtraError(
            f"{what} needs {library}, which cannot be imported: {reason}. Mend what that names, or uninstall the "
            f"library and install it again: {install}."
        ) from error


def raise_interrupt(error: BaseException) -> None:
    """Raise the Ctrl-C that stands behind an error: a compiled module whose import is stopped raises an ImportError.

    Raises:
        KeyboardInterrupt: there is one.
    """
    cause: BaseException | None = error
    while cause is not None:
        # Older compiled modules keep only its text.
        if isinstance(cause, KeyboardInterrupt) or str(cause).startswith("KeyboardInterrupt"):
            raise KeyboardInterrupt from error
        cause = cause.__cause__


def _is_missing(error: ImportError) -> bool:
    """Whether a whole package is missing, rather than a part of one, or of Python."""
    name = error.name or "."
    return isinstance(error, ModuleNotFoundError) and "." not in name and name not in sys.stdlib_module_names
