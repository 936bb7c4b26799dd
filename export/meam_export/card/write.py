"""Writing the model card of a policy folder that exists."""

from __future__ import annotations

import os
from collections.abc import Sequence

from meam_export.card.evaluation import Evaluation, read_evaluation
from meam_export.card.export_record import ExportRecord
from meam_export.card.render import is_unchanged, render_card
from meam_policy.atomic_files import given_folder, write_atomically
from meam_policy.errors import ConfigError, MeamError, NotFoundError, OutputError
from meam_policy.folder.hub_names import is_repo_id
from meam_policy.folder.policy_folder import CARD_FILE, read_config, read_contract, verify_files
from meam_policy.given_files import given_path, read_regular

__all__ = ["write_card"]


def write_card(
    policy_folder: str | os.PathLike[str],
    results: Sequence[str | os.PathLike[str]],
    *,
    replace: bool = False,
    datasets: Sequence[str] = (),
) -> tuple[Evaluation, ...]:
    """Write the model card of a policy folder, with what `meam eval` measured of that policy.

    Nothing else in the folder is touched, and the card is the old one or the new one, whatever fails. Its words are
    those of the template, its figures those of the folder and of the results.

    Args:
        policy_folder: The folder.
        results: Files that `meam eval --json` wrote, one or more.
        replace: Replace a card that was changed by hand, or that an earlier version wrote.
        datasets: Ids on the Hub, "owner/name", of the data sets that the policy was trained on.

    Returns:
        What stands in the card.

    Raises:
        NotFoundError: there is no such folder, or no such file.
        IntegrityError: a file of the folder is not the one that was exported.
        FormatError: the folder is broken, or a file is not what `meam eval --json` writes.
        ConfigError: results are of another policy, given twice, or missing; the card was changed by hand; or a data
            set's id is none that the Hub can have.
        OutputError: the card cannot be written.
        MissingExtraError: jinja2 is not installed.
    """
    for dataset in datasets:
        if not is_repo_id(dataset):
            raise ConfigError(f'datasets has {dataset!r}; expected ids on the Hub, each "owner/name".')
    folder = given_folder("policy_folder", policy_folder)
    if not folder.is_dir():
        raise NotFoundError(
            f"{folder} is not a folder on this machine; expected a policy folder that `meam export` wrote. Of a policy "
            "on the Hub, write the card before it is pushed."
        )
    config = read_config(folder)
    missing = [name for name in verify_files(folder, config.spec) if name in config.spec.files]
    if isinstance(results, (str, os.PathLike)):
        raise ConfigError(f"results is {results!r}; expected a list of files, such as [{str(results)!r}].")
    if not results:
        raise ConfigError("No results are given; expected one or more files of `meam eval --json`. Give --results.")
    evaluations = tuple(read_evaluation(given_path("results", file), config) for file in results)
    lines = [
        (e.env_id, e.seed, e.num_envs, e.machine, e.version, e.provider, rule) for e in evaluations for rule in e.rules
    ]
    for line in lines:
        if lines.count(line) > 1:
            raise ConfigError(f"The results of {line[-1].acting} in {line[0]} are given twice; expected each once.")
    card = folder / CARD_FILE
    try:
        if not replace and card.exists() and not is_unchanged(read_regular(card)):
            raise ConfigError(
                f"{card} was changed since it was written, or an earlier version wrote it. Keep a copy of your own "
                "words, and give --replace (replace=True) to write it anew."
            )
        record, robot = ExportRecord.read(folder, config.spec), read_contract(folder, config.spec)
        text = render_card(config.spec, record, evaluations, missing, datasets, robot)
        write_atomically(card, text)
    except OSError as error:
        if isinstance(error, MeamError):
            raise
        raise OutputError(f"The model card {card} cannot be written: {error.strerror or error}.") from error
    return evaluations
