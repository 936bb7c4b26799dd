"""`meam push`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import tyro

from meam_policy.commands import parse
from meam_policy.console import print_json, print_mapping
from meam_policy.folder.publish import check_push
from meam_policy.folder.push_settings import MESSAGE, Pushed, PushSettings
from meam_policy.policy import MeamPolicy

__all__ = ["push", "run"]


def push(
    policy: Annotated[str, tyro.conf.Positional],
    repo: Annotated[str, tyro.conf.Positional],
    subfolder: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    private: bool = False,
    message: str = MESSAGE,
    parent_commit: str | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Publish a policy on the Hugging Face Hub, as one commit.

    The files that make up the policy are uploaded, and nothing else that lies in its folder, once it has been loaded
    here. The token is the one stored by `hf auth login`, or HF_TOKEN; it must be one that may write. Pushing again is
    safe: a branch that has these very files is left as it is.

    Examples:
      meam push policies/pockets owner/pockets --dry-run
      meam push policies/pockets owner/pockets --private --tag v1
      meam push policies/ant owner/mazes --subfolder ant --create-pr

    Args:
        policy: Policy folder, or Hub repo id owner/name.
        repo: Hub repo id owner/name to push to; created if there is none.
        subfolder: Folder of the repository to put the policy in, for several in one; by default its root.
        branch: Branch to commit to, created if there is none; by default main.
        create_pr: Propose the commit in a pull request.
        tag: New tag for the commit.
        private: Make a repository that is created private; by default it is public.
        message: First line of the commit.
        parent_commit: Commit that the branch must be at; otherwise nothing is pushed.
        revision: Branch, tag or commit of POLICY on the Hub.
        dry_run: Check everything, and write nothing.
        json: Print one line of JSON to stdout instead of a table.
    """
    settings = PushSettings(
        subfolder=subfolder,
        branch=branch,
        create_pr=create_pr,
        tag=tag,
        private=private or None,
        commit_message=message,
        parent_commit=parent_commit,
        dry_run=dry_run,
    )
    check_push(repo, settings, named=_option)  # before the policy is read
    pushed = MeamPolicy.from_pretrained(policy, revision=revision).push_to_hub(repo, **vars(settings))
    if json:
        print_json({**asdict(pushed), "url": pushed.url})
        return
    print_mapping(f"{pushed.repo_id}: {_what(pushed)}", _rows(pushed))


def _option(name: str) -> str:
    """What the command line calls an argument of `push_to_hub`."""
    return {"repo_id": "REPO", "commit_message": "--message"}.get(name, f"--{name.replace('_', '-')}")


def _what(pushed: Pushed) -> str:
    if not pushed.changed:
        return "nothing: the branch has these very files"
    created = "a new repository, and " if pushed.created else ""
    files = f"{created}{len(pushed.files)} files in one commit"
    return f"a dry run, which would make {files}" if pushed.dry_run else files


def _rows(pushed: Pushed) -> dict[str, object]:
    rows: dict[str, object] = {"branch": pushed.branch, "commit": pushed.commit, "tag": pushed.tag}
    rows |= {"pull request": pushed.pull_request, "page": pushed.url}
    shown = {name: value for name, value in rows.items() if value is not None}
    return {**shown, **{name: f"{size:,} bytes" for name, size in pushed.files.items()}}


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and push."""
    parse(push, arguments, prog)
