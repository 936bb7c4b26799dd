"""A run in a few lines: what it is when it begins, and what came of it when it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meam_policy.console import duration
from meam_training.config import TrainConfig
from meam_training.data.data_report import counted, data_report
from meam_training.data.dataset import OfflineDataset
from meam_training.data.reward_offset import fixed_horizon
from meam_training.learning.update_cost import RunStart
from meam_training.runs.csv_file import read_rows
from meam_training.runs.options import as_flag, option
from meam_training.runs.run_log import EVALUATIONS_FILE, METRICS_FILE
from meam_training.runs.watch import KNOWN_ENOUGH, warnings_of
from meam_training.setting_text import said

__all__ = ["opening", "own_options", "run_facts", "start_fact", "summary"]


WHOLE = 0.995
"""Share of the action box from which the policy reaches all of it."""


def own_options(config: TrainConfig) -> str:
    """The method, and the settings that differ from its preset as flags."""
    own = [word for name, value in config.own_settings.items() for word in option(name, value, not value)]
    return f"{config.method} with {' '.join(own)}" if own else f"{config.method}, all settings as preset"


def opening(
    config: TrainConfig, dataset: OfflineDataset, start: RunStart, lacking: str | None = None
) -> dict[str, Any]:
    """What a run is, on what it is trained, where, and how long it will take.

    Args:
        config: Settings of the run.
        dataset: Training data.
        start: Where and how it begins.
        lacking: What is missing for compiling its updates, where that would have paid.
    """
    episodes = counted(int(np.count_nonzero(dataset.episode_ends)), "episode")
    where = f"{start.device}, {start.threads} thread{'s' * (start.threads > 1)}"
    if start.processes > 1:
        where += f", {start.processes} processes"
    kept = "in the device's memory" if start.resident else "read batch by batch, as it does not fit into memory"
    facts: dict[str, Any] = {
        "method": own_options(config),
        "data": f"{dataset.dataset_id or 'arrays'}: {len(dataset)} transitions in {episodes}, observations "
        f"of {counted(dataset.observation_dim, 'number')}, actions of {dataset.action_dim}, {kept}",
        **({"left out": ", ".join(dataset.left_out)} if dataset.left_out else {}),
        **start_fact(start.started_from),
    }
    report = data_report(
        dataset, config.chunk_size, config.pad_chunks, quick=True, action_scaling=config.action_scaling
    )
    facts |= {
        name: report.facts[name]
        for name in ("environment", "chunks", "rewards", "actions", "clipped")
        if name in report.facts
    }
    if start.reward_offset:
        facts["offset"] = f"{start.reward_offset:.4g} is taken off every reward; values are told with it"
        if config.reward_offset is None:
            facts["offset"] += (
                f". All episodes that terminate do so after {fixed_horizon(dataset)} steps. If one could end sooner or "
                "later by what is done in it, give --reward-offset 0"
            )
    if start.reach < WHOLE:
        facts["reach"] = _reach(start.reach, config.online_steps > 0)
    # Imitation takes no notice of rewards.
    found = [text for text in report.warnings if config.trains_policy or text != report.indifferent]
    if found:
        facts["check"] = [said(text, as_flag) for text in found]
    facts["device"] = where
    if config.compile:
        again = ", and again where pretraining ends" if config.pretraining else ""
        facts["compiling"] = (
            f"takes up to a minute or two before the first update{again}; less where the same was compiled before. "
            "Ctrl-C waits for it (--no-compile: at once, but slower)"
        )
    if lacking is not None:
        facts["compiling"] = f"not here, so that updates take up to three times as long: {lacking}"
    if start.cost is None:
        facts["time"] = (
            "divided among processes: the parts of an update are not told apart; the time left is shown after the "
            "first ones"
        )
        return facts
    left = start.cost.left(config, start.step)
    also = [
        *(["evaluations"] if config.evaluate_every else []),
        *([f"{config.online_steps} online steps"] if config.online_steps else []),
    ]
    facts["time"] = f"about {duration(left)}" + (f", and {' and '.join(also)}" if also else "")
    if config.compile:
        facts["time"] += "; this is that of uncompiled updates, which compiled ones take a third to nine tenths of"
    if config.pretraining or not config.trains_policy:
        facts["time"] += f"; {1e3 * start.cost.pretraining:.3g} ms an update of pretraining"
    if start.cost.parts:
        shares = sorted(start.cost.parts.items(), key=lambda part: -part[1])
        total = sum(start.cost.parts.values())
        facts["time"] += f"; {1e3 * start.cost.joint:.3g} ms an update of all networks: " + ", ".join(
            f"{name} {seconds / total:.0%}" for name, seconds in shares
        )
    if start.smaller is not None:
        words = [word for name, value in start.smaller.changes.items() for word in option(name, value, False)]
        facts["smaller"] = f"about {duration(start.smaller.seconds)} with {' '.join(words)}, which do for so few data"
    return facts


def _reach(reach: float, online: bool) -> str:
    """How far the policy's actions reach, which is where it explores online."""
    text = f"actions reach {reach:.2g} of the box, the data's range and a tenth on either side, and no farther"
    return text + (", exploring online too" if online else "") + " (all of it: --action-scaling box)"


def start_fact(started_from: Mapping[str, str]) -> dict[str, str]:
    """From which policy a run started; empty if from random weights. See `PolicySpec.started_from`."""
    if not started_from:
        return {}
    text = f"{started_from['policy']} ({started_from['method']}), statistics {started_from['statistics']}"
    return {"from": text + (f"; {started_from['anew']} anew" if "anew" in started_from else "")}


def run_facts(folder: Path, config: TrainConfig) -> dict[str, str]:
    """The summary of a run and all of its warnings, from its files.

    Args:
        folder: Folder of the run.
        config: Settings of the run.
    """
    rows = read_rows(folder / METRICS_FILE)
    facts = summary(config, rows, read_rows(folder / EVALUATIONS_FILE))
    warnings = warnings_of(config, rows)
    for number, warning in enumerate(warnings, 1):
        name = "warning" if len(warnings) == 1 else f"warning {number}"
        facts[name] = f"at {warning.step}, {warning.text(as_flag)}"
    return facts


def summary(
    config: TrainConfig, rows: Sequence[Mapping[str, float]], evaluations: Sequence[Mapping[str, float]]
) -> dict[str, str]:
    """The numbers of a run that mean something, from its files.

    Args:
        config: Settings of the run.
        rows: Rows of `metrics.csv`, each with its step.
        evaluations: Rows of `evaluations.csv`.
    """
    if not rows:
        return {}
    last = rows[-1]
    judged = next((row for row in reversed(rows) if "td_bias" in row), {})
    facts = {"updates": f"{last['step']:.0f} of {config.steps + config.online_steps}"}
    if evaluations:
        facts["evaluation"] = _evaluation(evaluations)
    losses = {"critic": "critic_loss", "prior": "prior_loss", "policy": "policy_loss"}
    facts["losses"] = ", ".join(f"{label} {last[name]:.3g}" for label, name in losses.items() if name in last)
    if judged:
        gain = judged["value_gain"]
        relation = f"{abs(gain):.3g} {'more' if gain >= 0 else 'less'}"
        facts["values"] = f"{judged['policy_value'] - gain:.3g} for the data's actions, {relation} for the policy's"
        if "value_limit" in judged:
            facts["values"] += f"; rewards allow {judged['value_limit']:.3g}"
        facts["returns"] = _returns(judged)
    facts["temperature"] = _temperature(config, last, judged)
    if "kl_average" in last and getattr(config, "kl_budget", None) is not None:
        facts["KL budget"] = _budget(config, last)
    if "mixture_gain" in last:
        facts["mixture"] = (
            f"Q-maximised chunks gain {last['mixture_gain']:.2g}; the critics disagree by "
            f"{last['mixture_disagreement']:.2g} there and by {last.get('value_std', 0.0):.2g} at the data's"
        )
    return {name: fact for name, fact in facts.items() if fact}


def _evaluation(evaluations: Sequence[Mapping[str, float]]) -> str:
    last = evaluations[-1]
    if "return_mean" not in last:
        return f"the policy's chunks differ by {last['action_difference']:.3g} from the data's"
    best = max(evaluations, key=lambda row: row.get("return_mean", -math.inf))
    text = f"return {last['return_mean']:.4g}"
    if "success" in last:
        text += f", success {last['success']:.0%}"
    if best["return_mean"] > last["return_mean"]:
        text += f"; the best was {best['return_mean']:.4g} at {best['step']:.0f}"
    return text


def _returns(row: Mapping[str, float]) -> str:
    tail = row["calibration_tail"]
    if tail > KNOWN_ENOUGH:
        text = f"not compared, as {tail:.0%} of a return is not recorded: episodes are short for the discount"
        # What is left to say of the critics: whether they agree with themselves.
        if not row.get("td_reward"):
            return text
        return f"{text}; targets differ from values by {row['td_bias'] / row['td_reward']:+.0%} of a chunk's reward"
    text = f"{row['calibration_return']:.3g} ± {row['calibration_return_std']:.2g} in the data"
    if "calibration_slope" in row and "calibration_correlation" in row:
        text += (
            f"; values correlate {row['calibration_correlation']:.2f} with them, slope {row['calibration_slope']:.2g}, "
            f"bias {row['calibration_bias']:+.2g}"
        )
    return text + (f"; {tail:.0%} of a return is not recorded" if tail >= 0.01 else "")


def _temperature(config: TrainConfig, last: Mapping[str, float], judged: Mapping[str, float]) -> str:
    if not config.trains_policy:
        return ""
    tau = last.get("inverse_temperature", config.inverse_temperature)
    parts = [f"tau {tau:.3g}"]
    if "value_spread" in judged:
        parts.append(f"tau Q varies by {tau * judged['value_spread']:.2g} nats over the prior's chunks")
    if "effective_samples" in last:
        parts.append(f"{last['effective_samples']:.0%} of the samples are effective")
    return ", ".join(parts)


def _budget(config: TrainConfig, last: Mapping[str, float]) -> str:
    budget: float = getattr(config, "kl_budget", math.nan)
    text = f"{last['kl_average']:.2g} of {budget:.2g} nats per action used; {budget * config.chunk_size:.2g} a chunk"
    if config.mixture_weight:
        text += f", where moving wholly to Q-maximised chunks costs {-math.log(config.mixture_weight):.2g}"
    return text
