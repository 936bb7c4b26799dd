"""What a push to the Hugging Face Hub is asked to do, and what it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from meam_policy.errors import ConfigError
from meam_policy.folder.hub_names import COMMIT, is_ref_name
from meam_policy.folder.policy_folder import checked_subfolder

__all__ = ["MESSAGE", "PushSettings", "Pushed"]

MESSAGE = "Upload policy with meam-policy"
"""First line of a commit without a message of its own."""

_REF_RULE = 'a name that git allows, such as "v1.2" or "robots/arm": no spaces, no ".." and none of ~^:?*[\\'


@dataclass(frozen=True)
class PushSettings:
    """How to push; see `MeamPolicy.push_to_hub`, whose arguments these are."""

    subfolder: str | None = None
    branch: str | None = None
    create_pr: bool = False
    tag: str | None = None
    private: bool | None = None
    commit_message: str = MESSAGE
    parent_commit: str | None = None
    dry_run: bool = False

    def check(self, named: Callable[[str], str] = str) -> None:
        """Check every setting alone and against the others.

        Args:
            named: What messages call a setting.

        Raises:
            ConfigError: one is out of range, or contradicts another.
        """
        checked_subfolder(self.subfolder, named("subfolder"))
        for name in ("branch", "tag"):
            value = getattr(self, name)
            if value is not None and not (is_ref_name(value) and value.isprintable()):
                raise ConfigError(f"{named(name)} is {value!r}; expected {_REF_RULE}.")
        message, parent = self.commit_message, self.parent_commit
        if not message.strip() or not message.isprintable():
            raise ConfigError(f"{named('commit_message')} is {message!r}; expected one line of text.")
        if parent is not None and not COMMIT.fullmatch(parent):
            raise ConfigError(f"{named('parent_commit')} is {parent!r}; expected a commit's 40 hexadecimal digits.")
        if self.create_pr and self.tag is not None:
            raise ConfigError(
                f'{named("tag")} is "{self.tag}", but {named("create_pr")} asks for a pull request, whose commit is on '
                "no branch yet; expected one of them. Tag it once it is merged."
            )


@dataclass(frozen=True)
class Pushed:
    """What a push did; what it would do, if it was a dry run.

    Attributes:
        repo_id: The repository.
        branch: The branch; of a pull request, the one that it is for.
        subfolder: Folder of the repository that the policy is in; None is its root.
        files: Sizes of the policy's files in bytes, by path in the repository.
        commit: The commit that holds them; None before one is made.
        changed: Whether a commit was needed: False if the branch had these very files already.
        created: Whether the repository was created.
        pull_request: Page of the pull request; None if none was asked for, or needed.
        tag: The tag that was put on the commit.
        dry_run: Whether nothing was written.
    """

    repo_id: str
    branch: str
    subfolder: str | None
    files: Mapping[str, int] = field(repr=False)
    commit: str | None
    changed: bool
    created: bool
    pull_request: str | None = None
    tag: str | None = None
    dry_run: bool = False

    @property
    def url(self) -> str:
        """Page of the policy on the Hub."""
        place = f"tree/{self.commit}" if self.commit else ""
        from huggingface_hub import constants as hub_constants

        return "/".join(filter(None, (hub_constants.ENDPOINT, self.repo_id, place, self.subfolder if place else "")))
