"""Publishing a policy folder on the Hugging Face Hub: one commit of an explicit list of files.

Imported where that is done: the Hub's client takes a while.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_session

from meam_policy.errors import ConfigError, FormatError, HubError, MeamError
from meam_policy.folder import patience
from meam_policy.folder.hub import answer_status, git_hash
from meam_policy.folder.hub_names import is_repo_id
from meam_policy.folder.hub_token import token_to_send
from meam_policy.folder.policy_folder import CARD_FILE
from meam_policy.folder.push_settings import Pushed, PushSettings

__all__ = ["check_push", "push_files"]

DEADLINE_S, SLOWEST_BYTES_PER_S = 120.0, 20_000
"""A push is given up after this time, and that for its bytes at this rate."""

_NEWEST_REQUESTS = 20
"""Pull requests that are searched for the one whose answer was lost."""


def check_push(
    repo_id: str, settings: PushSettings, token: str | bool | None = None, *, named: Callable[[str], str] = str
) -> str:
    """Check what a push is asked to do, before any file is read and without a request.

    Args:
        repo_id: "owner/name".
        settings: How.
        token: Hub token; None or True is the stored one.
        named: What messages call an argument of `MeamPolicy.push_to_hub`.

    Returns:
        The token to send.

    Raises:
        ConfigError: the repo id or a setting is wrong.
        HubError: with `kind` "access": there is no token, or it cannot be sent.
    """
    settings.check(named)
    if not is_repo_id(repo_id):
        raise ConfigError(
            f'{named("repo_id")} is {repo_id!r}; expected "owner/name", with your name or an organisation\'s: letters, '
            "digits, -, _ and ., without -- and .., with no - or . at an end, and no .git."
        )
    found = token_to_send(token)
    if found is None:
        raise HubError(
            f"Pushing to {repo_id} needs a token that may write, and there is none. Log in with `hf auth login`, set "
            "HF_TOKEN, or pass token= in Python.",
            "access",
        )
    return found


def push_files(files: Mapping[str, bytes], repo_id: str, settings: PushSettings, token: str) -> Pushed:
    """Publish the files of a policy as one commit; see `MeamPolicy.push_to_hub`.

    Args:
        files: Contents by name, of `read_policy_files`.
        repo_id: "owner/name".
        settings: How; checked by `check_push`, as is the repo id.
        token: Hub token, of `check_push`. It is in no message.

    Raises:
        ConfigError: the repository exists, and `private` says otherwise.
        FormatError: the model card's metadata are not valid; nothing was uploaded.
        HubError: the Hub did not take it; `kind` "conflict" if the branch, or the tag, is elsewhere.
    """
    _check_card(files)
    seconds = DEADLINE_S + sum(map(len, files.values())) / SLOWEST_BYTES_PER_S
    try:
        return patience.within(seconds, lambda: _Push(files, repo_id, settings, token).run())
    except Exception as error:  # HTTP errors, whose base class the Hub client has changed twice
        problem = error if isinstance(error, MeamError) else _explain(error, repo_id)
        cause = error.__cause__ if isinstance(error, MeamError) else error
        # What the Hub said may repeat the token.
        told = "".join(traceback.format_exception(cause)) if isinstance(cause, BaseException) else ""
        if token in str(problem):
            raise HubError(f"The Hub refused the push to {repo_id}.", "server") from None
        raise problem from (None if token in told else cause)


class _Push:
    """One push: what it asks of the Hub, in order."""

    def __init__(self, files: Mapping[str, bytes], repo_id: str, settings: PushSettings, token: str) -> None:
        self.api, self.repo_id, self.settings = HfApi(token=token), repo_id, settings
        prefix = f"{settings.subfolder}/" if settings.subfolder else ""
        self.files = {prefix + name: data for name, data in files.items()}
        self.card = files.get(CARD_FILE)
        self.branch = settings.branch or hub_constants.DEFAULT_REVISION

    def run(self) -> Pushed:
        settings = self.settings
        self._check_token()
        exists, head = self._find_head()
        if settings.parent_commit is not None and head != settings.parent_commit:
            raise self._conflict(f"is at {head or 'no commit'}; expected {settings.parent_commit}, its parent_commit")
        same = head is not None and self._has_these_files(head)
        self._check_tag(exists, head if same else None)
        self._validate_card()
        done = Pushed(
            repo_id=self.repo_id,
            branch=self.branch,
            subfolder=settings.subfolder,
            files={path: len(data) for path, data in self.files.items()},
            commit=head if same else None,
            changed=not same,
            created=not exists,
            tag=settings.tag,
            dry_run=settings.dry_run,
        )
        if settings.dry_run:
            return done
        if head is None:
            head = self._create(exists)
        if not same:
            commit, request = self._commit(head)
            done = replace(done, commit=commit, pull_request=request)
        if settings.tag is not None:
            self._tag(settings.tag, str(done.commit))
        return done

    def _check_token(self) -> None:
        access = (self.api.whoami().get("auth") or {}).get("accessToken") or {}
        if access.get("role") == "read":
            raise HubError(
                f"The Hub token may only read; expected one that may write to {self.repo_id}. Make one at "
                f"{hub_constants.ENDPOINT}/settings/tokens, then log in with `hf auth login` or set HF_TOKEN.",
                "access",
            )

    def _find_head(self) -> tuple[bool, str | None]:
        """Whether the repository exists, and the commit of its branch."""
        try:
            info = self._info(self.branch)
        except hub_errors.GatedRepoError:
            raise
        except hub_errors.RepositoryNotFoundError:
            return False, None
        except hub_errors.RevisionNotFoundError:
            info = self._info(None)
            info.sha = None
        wanted = self.settings.private
        if wanted is not None and info.private is not None and info.private != wanted:
            seen, expected = ("private", "public") if info.private else ("public", "private")
            raise ConfigError(
                f"{self.repo_id} exists and is {seen}; expected a {expected} one. Change that on its page, "
                f"{hub_constants.ENDPOINT}/{self.repo_id}/settings, or leave private out."
            )
        return True, info.sha

    def _info(self, revision: str | None) -> huggingface_hub.ModelInfo:
        # Without a time of its own this request would wait for ever.
        return self.api.model_info(self.repo_id, revision=revision, timeout=patience.SILENCE_S)

    def _has_these_files(self, commit: str) -> bool:
        return not self._differing(commit)

    def _differing(self, commit: str) -> list[str]:
        """Paths of the files that a commit lacks, or has with other contents."""
        infos = self.api.get_paths_info(self.repo_id, list(self.files), revision=commit)
        there = {info.path: info for info in infos if isinstance(info, RepoFile)}
        return [path for path, data in self.files.items() if path not in there or not _is(there[path], data)]

    def _check_tag(self, exists: bool, commit: str | None) -> None:
        """Refuse a tag that is on another commit than the one that holds these files."""
        tag = self.settings.tag
        if tag is None or not exists:
            return
        at = {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.repo_id).tags}.get(tag)
        if at is not None and at != commit:
            raise HubError(
                f"{self.repo_id} has a tag {tag} already, at commit {at}; expected a new one for this policy. "
                "Choose another tag.",
                "conflict",
            )

    def _validate_card(self) -> None:
        """Let the Hub judge the metadata, before anything is created."""
        if self.card is None:
            return
        # Not by the client's ModelCard.validate, which in older versions asks huggingface.co whatever the endpoint.
        content = {"content": self.card.decode(), "repoType": "model"}
        response = get_session().post(f"{self.api.endpoint}/api/validate-yaml", json=content)
        if response.status_code == 400:
            raise _invalid_card(_server_text(response.text))
        if response.status_code >= 400:
            raise HubError(
                f"The Hub could not judge the model card's metadata: {self.api.endpoint}/api/validate-yaml answered "
                f"{response.status_code}. Nothing was uploaded. Try again later; a server that HF_ENDPOINT names must "
                "have this address, too.",
                "server",
            )

    def _create(self, exists: bool) -> str:
        """Create the branch, and its repository unless it exists; the commit that the branch begins at."""
        if not exists:
            self.api.create_repo(self.repo_id, private=self.settings.private)
        exists, head = self._find_head()
        if head is None and exists:
            self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)
            _, head = self._find_head()
        if head is None:
            raise HubError(f"The Hub created {self.repo_id}, but does not find it. Push again.", "server")
        return head

    def _commit(self, parent: str) -> tuple[str, str | None]:
        """Commit the files on top of `parent`; the commit, and the page of its pull request."""
        mark = self._mark(parent)
        if self.settings.create_pr and (landed := self._find_request(mark)):
            return landed  # the answer to an earlier push was lost
        try:
            made = self.api.create_commit(
                self.repo_id,
                [CommitOperationAdd(path, data) for path, data in self.files.items()],
                commit_message=self.settings.commit_message,
                commit_description=mark,
                revision=self.branch,
                create_pr=self.settings.create_pr,
                parent_commit=parent,
            )
            commit, request = made.oid, made.pr_url
        except Exception as error:
            if isinstance(error, ValueError) and "Invalid metadata" in str(error):
                raise _invalid_card(str(error)) from error
            status = answer_status(error)
            if status in (409, 412):
                raise self._conflict("moved while this was pushed: somebody else committed") from error
            if status is not None and 400 <= status < 500 and status not in (408, 429):
                raise
            landed = self._find_landed(mark, parent, error)
            if landed is None:
                raise
            commit, request = landed
        left_out = self._differing(commit)
        if left_out:
            raise HubError(
                f"{self.repo_id} at commit {commit} lacks {', '.join(left_out)}, which was pushed; expected every file "
                "of the policy. Does the repository's .gitignore name it? Change that, and push again.",
                "server",
            )
        return commit, request

    def _mark(self, parent: str) -> str:
        """Text by which this very push is recognised where its answer was lost."""
        hashes = {path: hashlib.sha256(data).hexdigest() for path, data in self.files.items()}
        pushed = json.dumps([parent, self.branch, hashes], sort_keys=True)
        return f"meam-policy push {hashlib.sha256(pushed.encode()).hexdigest()}"

    def _find_landed(self, mark: str, parent: str, error: Exception) -> tuple[str, str | None] | None:
        """The commit of this push, if there is one although no answer came."""
        try:
            if self.settings.create_pr:
                return self._find_request(mark)
            return self._find_commit(mark, self.branch, until=parent)
        except Exception:
            raise HubError(
                f"The Hub did not say whether the commit to {self.repo_id} was made, and cannot be asked now. "
                "Push again later: what was committed is not committed twice.",
                "timeout" if "Timeout" in type(error).__name__ else "server",
            ) from error

    def _find_commit(self, mark: str, revision: str, until: str) -> tuple[str, None] | None:
        for commit in self.api.list_repo_commits(self.repo_id, revision=revision):
            if commit.commit_id == until:
                return None
            if mark in commit.message:
                return commit.commit_id, None
        return None

    def _find_request(self, mark: str) -> tuple[str, str] | None:
        requests = self.api.get_repo_discussions(self.repo_id, discussion_type="pull_request", discussion_status="open")
        for _, request in zip(range(_NEWEST_REQUESTS), requests, strict=False):
            if request.title == self.settings.commit_message and request.git_reference is not None:
                found = self._find_commit(mark, request.git_reference, until="")
                if found is not None:
                    return found[0], request.url
        return None

    def _tag(self, tag: str, commit: str) -> None:
        try:
            self.api.create_tag(self.repo_id, tag=tag, revision=commit, exist_ok=True)
        except Exception as error:
            problem = _explain(error, self.repo_id)
            raise HubError(
                f"The policy is committed to {self.repo_id} as {commit}, but the tag {tag} was not made: {problem} "
                "Pushing again only makes the tag.",
                problem.kind,
            ) from error

    def _conflict(self, what: str) -> HubError:
        return HubError(
            f"{self.repo_id}: the branch {self.branch} {what}. Nothing was committed. Look at what is there, "
            "then push again.",
            "conflict",
        )


def _is(info: RepoFile, data: bytes) -> bool:
    if info.lfs is not None:
        return info.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return info.blob_id == git_hash(data)


def _check_card(files: Mapping[str, bytes]) -> None:
    """Refuse a model card that the Hub's client cannot read.

    Raises:
        FormatError: its text or its metadata are broken.
    """
    if CARD_FILE not in files:
        return
    try:
        ModelCard(files[CARD_FILE].decode())
    except Exception as error:  # of YAML, and whatever the metadata's fields raise
        raise _invalid_card(" ".join(str(error).split())[:200]) from error


def _invalid_card(reason: str) -> FormatError:
    said = " ".join(reason.split())
    return FormatError(
        f"{CARD_FILE}: the Hub does not take its metadata, between the lines of three dashes ({said}). "
        "Nothing was uploaded. Correct them, and push again."
    )


def _server_text(text: str) -> str:
    """The messages of an answer in JSON; the beginning of any other."""
    try:
        return "; ".join(str(item["message"]) for item in json.loads(text)["errors"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


def _explain(error: Exception, repo_id: str) -> HubError:
    # The client wraps what went wrong with an upload.
    cause: BaseException = error
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
        cause = cause.__cause__
    status, name = answer_status(cause), type(cause).__name__
    if isinstance(cause, hub_errors.OfflineModeIsEnabled):
        return HubError(f"HF_HUB_OFFLINE in the environment forbids to push {repo_id}. Unset it.", "offline")
    # The token is sent to the Hub itself, not to where it has files uploaded to.
    to_hub = str(getattr(getattr(cause, "response", None), "url", "")).startswith(
        (f"{hub_constants.ENDPOINT}/api/", f"{hub_constants.ENDPOINT}/{repo_id}")
    )
    if isinstance(cause, hub_errors.RepositoryNotFoundError) or (status in (401, 403) and to_hub):
        return HubError(
            f"The Hub does not let this token write to {repo_id} (answer {status or 404}). Check the owner's name, and "
            f"that the token is valid and may write, at {hub_constants.ENDPOINT}/settings/tokens.",
            "access",
        )
    if status in (409, 412):
        return HubError(f"{repo_id} was changed by somebody else meanwhile. Push again.", "conflict")
    if status is not None:
        return HubError(f"The Hub answered {status} to a push to {repo_id}. Try again later.", "server")
    if "Timeout" in name:
        return HubError(
            f"The Hub did not answer in time while {repo_id} was pushed. Check the network, and push again: what was "
            "committed is not committed twice.",
            "timeout",
        )
    if "Connect" in name:
        return HubError(f"The Hub cannot be reached to push {repo_id}. Check the network, and push again.", "offline")
    return HubError(
        f"Pushing to {repo_id} failed: {name}. Push again: what was committed is not committed twice.", "server"
    )
