"""`meam card`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro

from meam_export.card.write import write_card
from meam_policy.commands import parse
from meam_policy.console import print_json, say
from meam_policy.folder.policy_folder import CARD_FILE

__all__ = ["card", "run"]


def card(
    policy: Annotated[Path, tyro.conf.Positional],
    results: tuple[Path, ...],
    replace: bool = False,
    datasets: tuple[str, ...] = (),
    json: bool = False,
) -> None:
    """Write the model card of a policy folder, with what was measured of it.

    Everything on the card comes from the folder and from the results, each of which must be of this very export. The
    other files stay as they are.

    Examples:
      meam eval policies/pockets --episodes 100 --json > pockets.json
      meam card policies/pockets --results pockets.json

    Args:
        policy: Policy folder.
        results: Files that `meam eval --json` wrote.
        replace: Write anew a card that was changed by hand, or that an earlier version wrote.
        datasets: Ids on the Hub, owner/name, of the data sets that the policy was trained on.
        json: Print one line of JSON to stdout.
    """
    evaluations = write_card(policy, results, replace=replace, datasets=datasets)
    file = policy.expanduser() / CARD_FILE
    if json:
        print_json({"card": str(file), "evaluations": [asdict(evaluation) for evaluation in evaluations]})
        return
    count = sum(len(evaluation.rules) for evaluation in evaluations)
    say(f"Wrote {file}, with {count} result{'' if count == 1 else 's'}.")


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and write the card."""
    parse(card, arguments, prog)
