"""The Hub token that goes with requests. It is in no message."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants as hub_constants

from meam_policy.errors import HubError
from meam_policy.given_files import require_regular

__all__ = ["token_to_send"]

_SENDABLE = re.compile(r"[!-~]+")
"""What the header of a request can hold, without spaces."""

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def token_to_send(token: str | bool | None) -> str | None:
    """The token that goes with a request.

    Args:
        token: As in `huggingface_hub`: text is the token, None or True the stored one, False none.

    Returns:
        The token; None if there is none.

    Raises:
        HubError: with `kind` "access": it cannot be read, or has a character that cannot be sent.
    """
    if token is False:
        return None
    try:
        if not isinstance(token, str) and not any(map(os.environ.get, _VARIABLES)):
            _require_readable(Path(hub_constants.HF_TOKEN_PATH))
        found = token if isinstance(token, str) else huggingface_hub.get_token()
    except UnicodeError:
        raise _unsendable("", given=False) from None
    except Exception as error:  # of its file, or of a server that issues it
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise HubError(
            f"The stored Hub token cannot be read: {reason}. Log in again with `hf auth login`, or set HF_TOKEN.",
            "access",
        ) from None  # what the server said may repeat it
    if found is None or _SENDABLE.fullmatch(found):
        return found
    raise _unsendable(found, given=isinstance(token, str))


def _require_readable(file: Path) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        require_regular(file)  # nobody might ever write into a pipe


def _unsendable(token: str, given: bool) -> HubError:
    variable = next((name for name in _VARIABLES if token and _same(os.environ.get(name), token)), None)
    place, remedy = "that is stored", "log in again with `hf auth login`, or set HF_TOKEN to it"
    if given:
        place, remedy = "that was given (token=)", "give that"
    elif variable is not None:
        place, remedy = f"in the variable {variable}", "set the variable to it"
    elif Path(hub_constants.HF_TOKEN_PATH).is_file():
        place, remedy = f"in the file {hub_constants.HF_TOKEN_PATH}", "log in with it: `hf auth login`"
    what = "has a character that cannot be sent" if token.strip() or not given else "is empty"
    return HubError(
        f"The Hub token {place} {what}; expected printable ASCII without spaces, such as hf_ and letters. Copy it "
        f"again from {hub_constants.ENDPOINT}/settings/tokens, and {remedy}.",
        "access",
    )


def _same(text: str | None, token: str) -> bool:
    """Whether a variable holds a token, from which the client takes spaces and line breaks."""
    return text is not None and "".join(text.split()) == "".join(token.split())
