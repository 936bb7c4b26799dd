"""Warnings about a run, read off its metrics: what was seen, what was expected, what to do.

A `Watch` reads the rows of `metrics.csv` in their order and knows nothing else but the settings, so the same warnings
follow from the files of a run as while it trains. A threshold is chosen so that a run that learns well crosses none:
a needless warning costs the trust in all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean, stdev

from meam_training.config import TrainConfig
from meam_training.networks.trust_region import REFERENCE_RANGE, REFERENCE_UNIT
from meam_training.setting_text import Notation, SettingText

__all__ = ["RunWarning", "Watch", "warnings_of"]

LEAST_UPDATES = 1000
"""Updates of policy and critics before they are judged; until then critics have hardly left their initial values."""

LEAST_UPDATES_AT_END = 100
"""The same where no more updates follow, so that a warning cannot be premature."""

IDLE_SAMPLES = 0.98
"""Effective samples, as a share, above which weights are almost uniform: their variation is sqrt(1 / 0.98 - 1) = 0.14,
a target within 0.01 nats of the samples. A policy that has left its prior is below by what is drawn from there, a
quarter or an eighth."""

IDLE_TILT = 0.1
"""Standard deviation of tau Q over the prior's chunks, nats, below which it moves the prior by 0.1^2 / 2 = 0.005 nats,
and raises the mean of Q by a tenth of its standard deviation."""

COLLAPSED_SAMPLES = 1.5
"""Effective samples, as a number, below which a single candidate has most of the weight, and its errors decide. Runs on
mazes that reach their goals keep 1.9 to 2.1 of 8."""

UNLEARNED_REWARD = 0.5
"""Mean TD error, as a share of the mean reward, above which critics have not found the level of the returns: they begin
with 1 if their values begin at 0, and end near 0 whatever the policy."""

KNOWN_ENOUGH = 0.5
"""Largest mean weight of the unknown tail with which values are compared with returns: the tail is their own."""

COMPRESSED = 3.0
"""Slope of returns on values above which values differ far less than the returns that they predict."""

RELATED = 0.5
"""Correlation of returns and values above which their slope means something."""

BEYOND = 0.5
"""How far the policy's values may exceed the largest recorded return, as a share of the range of the returns: a policy
that combines the best of several episodes does exceed it somewhat."""

ROUNDING = 0.1
"""How far the policy's values may exceed what rewards allow, as a share of the returns' standard deviation: where 0 is
the limit, critics that begin near 0 are not wrong by much."""

FALLING = 0.03
"""Fall of the flow-matching loss from the third to the last quarter, as a share, from which it has not converged. Most
of the loss is the variance of the noise, which no prior explains, so that a small share of it is much."""

STANDARD_ERRORS = 4.0
"""Standard errors by which this fall must differ from 0."""

LEAST_ROWS = 4
"""Rows in a quarter of which the mean and its standard error are taken."""

UNSEEN = 2.0
"""Disagreement of the critics at Q-maximised chunks over that at the data's, from which these are unlike the data."""

HUGE = 20.0
"""The same, from which no gain is believed."""

BUDGET_SHARES = (0.15, 2.5)
"""Share of the KL budget that is used: 1 once its temperature has been found. Runs of 3,000 updates that reach their
goals use 0.21 and more of it on the way (mazes), or up to 1.93 (a bandit with a rare best action); one that learned
hardly anything used 0.04."""

LOSS = 0.1
"""By how much the policy's actions must be worth less than the data's for the penalty to be why it stays at its prior,
as a share of the spread of the returns."""

CONTRARY = -0.3
"""Correlation of the critics' values with the data's returns below which these contradict them."""

OFF_SCALE = "critics not at the scale of the returns"

REFERENCE_TEMPERATURES = tuple(1 / (REFERENCE_UNIT * nu) for nu in reversed(REFERENCE_RANGE))
"""Least and largest temperature tau that the published dual step can find, 1 / unit of value."""

WORSE = 2.0
"""Factor by which the cause must have grown for a warning to be repeated."""

LOOKS = 50
"""Times that a run's rows are judged, besides the rows that have the critics' calibration."""


@dataclass(frozen=True)
class RunWarning:
    """A warning about a run.

    Attributes:
        name: Short name of what is wrong, by which warnings of one kind are recognised.
        step: Step of the metrics it is read from.
        seen: The number seen, in words.
        expected: The number expected, in words.
        remedy: What to do; the template of a `SettingText`.
        severity: How far the threshold is passed, as a factor of 1 or more.
    """

    name: str
    step: int
    seen: str
    expected: str
    remedy: str
    severity: float

    def text(self, notation: Notation) -> str:
        """The warning in words.

        Args:
            notation: How settings are shown: `as_flag` for the command line, `as_argument` for Python.
        """
        remedy = SettingText(self.remedy).shown(notation)
        return f"{self.name}: {self.seen}; expected {self.expected}. {remedy}."


class Watch:
    """Watches the metrics of a run.

    Args:
        config: Settings of the run.
        rows: Rows of metrics from before this process began, whose warnings were given then.
    """

    def __init__(self, config: TrainConfig, rows: Sequence[Mapping[str, float]] = ()) -> None:
        self._config = config
        self._rows: list[Mapping[str, float]] = []
        self._given: dict[str, float] = {}
        for row in rows:
            self.see(int(row["step"]), row)

    def see(self, step: int, row: Mapping[str, float]) -> list[RunWarning]:
        """Take the next row of metrics.

        Args:
            step: Step of the row.
            row: Metrics by name; those that are missing are not judged.

        Returns:
            Warnings that are new, or whose cause has become worse by a factor of `WORSE`.
        """
        config, before = self._config, self._rows[-1]["step"] if self._rows else 0
        self._rows.append({**row, "step": step})
        every = max(1, (config.steps + config.online_steps) // LOOKS)
        marks = (every * (step // every), config.pretraining, config.steps)
        if "td_bias" not in row and not any(before < mark <= step for mark in marks):
            return []
        # Where all policies are worth the same, there is no remedy for what the critics' errors do.
        limits = next((row for row in reversed(self._rows) if "value_floor" in row), {})
        same = bool(limits) and limits["value_floor"] == limits["value_limit"]
        checks = [_unconverged_prior] if same else _CHECKS
        found = [warning for check in checks for warning in check(self._config, self._rows)]
        new = [warning for warning in found if warning.severity > WORSE * self._given.get(warning.name, 0.0)]
        self._given |= {warning.name: warning.severity for warning in new}
        return new


def warnings_of(config: TrainConfig, rows: Sequence[Mapping[str, float]]) -> list[RunWarning]:
    """All warnings about a run, the last of each kind, in the order in which they first occurred."""
    watch, found = Watch(config), {}
    for row in rows:
        found |= {warning.name: warning for warning in watch.see(int(row["step"]), row)}
    return list(found.values())


Check = Callable[[TrainConfig, Sequence[Mapping[str, float]]], Iterator[RunWarning]]
"""Reads the rows up to now, of which the last one has just been logged, and yields what is wrong."""


def _ripe(config: TrainConfig, rows: Sequence[Mapping[str, float]]) -> bool:
    """Whether there were enough updates of policy and critics to judge them."""
    step = int(rows[-1]["step"])
    least = LEAST_UPDATES_AT_END if step >= config.steps else LEAST_UPDATES
    return config.trains_policy and min(step, config.steps) - config.pretraining >= least


def _recent(config: TrainConfig, rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Mean of a metric over the last quarter of the updates since pretraining; None without it."""
    last = rows[-1]["step"]
    since = config.pretraining + 0.75 * (last - config.pretraining)
    values = [row[name] for row in takewhile(lambda row: row["step"] > since, reversed(rows)) if name in row]
    return fmean(values) if values else None


def _temperature(config: TrainConfig, rows: Sequence[Mapping[str, float]]) -> float:
    found = _recent(config, rows, "inverse_temperature")
    return config.inverse_temperature if found is None else found


def _unlearned(rows: Sequence[Mapping[str, float]]) -> float:
    """Mean TD error as a share of the mean reward, when it was last measured; 0 if it never was."""
    row = next((row for row in reversed(rows) if row.get("td_reward")), {})
    return abs(row.get("td_bias", 0.0)) / row["td_reward"] if row else 0.0


def _idle_temperature(config: TrainConfig, rows: Sequence[Mapping[str, float]]) -> Iterator[RunWarning]:
    tau = _temperature(config, rows)
    if not _ripe(config, rows) or tau == 0:  # 0 asks for the prior
        return
    if _unlearned(rows) > UNLEARNED_REWARD:  # values are about to change, and with them what tau does
        return
    if config.kl_budget is None:
        remedy = f"Raise {{inverse_temperature}}, now {tau:.3g}, or set {{kl_budget}}"
    else:
        remedy = f"Raise {{kl_budget}}, now {config.kl_budget:.3g}"
    step, spread = int(rows[-1]["step"]), rows[-1].get("value_spread")
    samples = _recent(config, rows, "effective_samples")
    if samples is not None and samples > IDLE_SAMPLES:
        seen = f"tau Q hardly changes the weights of the samples ({samples:.3g} of them are effective)"
        severity = (1 - IDLE_SAMPLES) / max(1 - samples, 1e-12)
        yield RunWarning("tau does nothing", step, seen, f"below {IDLE_SAMPLES}", remedy, severity)
    elif spread is not None and tau * spread < IDLE_TILT:
        seen = f"tau Q varies by {tau * spread:.2g} nats over the prior's chunks"
        severity = IDLE_TILT / max(tau * spread, 1e-12)
        yield RunWarning("tau does nothing", step, seen, f"above {IDLE_TILT:g}, better 1 or more", remedy, severity)


def _collapsed_weights(config: TrainConfig, rows: Sequence[Mapping[str, float]]) -> Iterator[RunWarning]:
    samples = _recent(config, rows, "effective_samples")
    if not _ripe(config, rows) or samples is None or samples * config.candidates >= COLLAPSED_SAMPLES:
        return
    setting = "inverse_temperature" if config.kl_budget is None else "kl_budget"
    yield RunWarning(
        "weights collapse",
        int(rows[-1]["step"]),
        f"of {config.candidates} weighted samples, {samples * config.candidates:.2g} are effective",
        f"{COLLAPSED_SAMPLES:g} or more",
        f"Lower {{{setting}}}, or raise {{candidates}}",
        COLLAPSED_SAMPLES / (samples * config.candidates),
    )


def _unlearned_level(config: TrainConfig, rows: Sequence[Mapping[str, float]]) -> Iterator[RunWarning]:
    """Critics that are still on their way, and whose values contradict the data's rewards."""
    row = rows[-1]
    left = _unlearned(rows)
    if not _ripe(config, rows) or "td_bias" not in row or left <= UNLEARNED_REWARD:
        return
    value = row["calibration_value"]
    floor, ceiling = row.get("return_floor", -math.inf), row.get("return_ceiling", math.inf)
    compressed = (
        row["calibration_tail"] <= KNOWN_ENOUGH
        and row.get("calibration_correlation", 0.0) >= RELATED
        and row.get("calibration_slope", 0.0) > COMPRESSED
    )
    margin = row.get("calibration_return_std", 0.0) / 2
    if not compressed and floor - margin <= value <= ceiling + margin:
        return
    low, high = (f"{bound:.3g}" for bound in (floor, ceiling))
    expected = f"{low} to {high}" if low != high else low
    if compressed and floor - margin <= value <= ceiling + margin:
        seen = f"the data's returns differ {row['calibration_slope']:.2g} times as much as their values"
        expected = "about as much"
    else:
        seen = f"values at the data's actions are {value:.3g} on average"
        expected += ", what its rewards allow"
    # In units of the returns, critics start at their scale.
    scale = "" if config.normalise_values else "Set {normalise_values:True} in a new run; or raise"
    yield RunWarning(
        OFF_SCALE,
        int(row["step"]),
        f"{seen}, and targets differ from them by {left:.0%} of a chunk's reward",
        expected,
        f"{scale or 'Raise'} {{steps}} or {{learning_rate}}, or lower {{discount}}",
        left / UNLEARNED_REWARD,
    )


def _contrary_critics(config: TrainConfig, rows: Sequence[Mapping[str, float]]) -> Iterator[RunWarning]:
    row = rows[-1]
    correlation = row.get("calibration_correlation", 0.0)
    if not _ripe(config, rows) or correlation >= CONTRARY or row.get("calibration_tail", 1.0) > KNOWN_ENOUGH:
        return
    yield RunWarning(
        "critics contradict the returns",
        int(row["step"]),
        f"values correlate {correlation:.2f} with the data's returns",
        "above 0",
        "Raise {steps}; if the critics came from a policy that was trained on other rewards, start anew",
        correlation / CONTRARY,
    )


def _unpayable_values(config: TrainConfig, rows: Sequence[Mapping[str, float]]) -> Iterator[RunWarning]:
    row = rows[-1]
    if not _ripe(config, rows) or "policy_value" not in row:
        return
    value = row["policy_value"]
    limit, step = row.get("value_limit", math.inf), int(row["step"])
    setting = "inverse_temperature" if config.kl_budget is None else "kl_budget"
    lower = f"lower {{{setting}}}" + (" and {mixture_weight}" if config.mixture_weight else "")
    remedy = f"{'Raise {pessimism}' if config.num_critics > 1 else 'Take several critics ({num_critics})'}, or {lower}"
    name, seen = "values too high", f"the policy's actions are worth {value:.3g} on average"
    largest, smallest = row.get("return_largest"), row.get("return_smallest")
    scale = max(row.get("calibration_return_std", 0.0), 1e-12)
    if value > limit + ROUNDING * scale:
        expected = f"at most {limit:.3g}, what rewards like the data's can pay"
        yield RunWarning(name, step, seen, expected, remedy, (value - limit) / (ROUNDING * scale))
    elif largest is not None and smallest is not None and value > largest + BEYOND * (largest - smallest):
        expected = f"about {largest:.3g}, the largest return in the data, or less"
        excess = (value - largest) / max(largest - smallest, 1e-12)
        yield RunWarning(name, step, seen, expected, remedy, excess / BEYOND)


def _unconverged_prior(config: TrainConfig, rows: Sequence[Mapping[str, float]]) -> Iterator[RunWarning]:
    """The flow-matching loss over pretraining when it ends, or over the whole run if the prior is trained alone."""
    alone = not config.trains_policy
    end = config.steps if alone else config.pretraining
    before = rows[-2]["step"] if len(rows) > 1 else 0
    if not before < end <= rows[-1]["step"]:
        return
    quarters = [
        [row["prior_loss"] for row in rows if low * end < row["step"] <= high * end and "prior_loss" in row]
        for low, high in ((0.5, 0.75), (0.75, 1.0))
    ]
    if min(map(len, quarters)) < LEAST_ROWS:
        return
    third, last = map(fmean, quarters)
    error = math.hypot(*(stdev(quarter) / math.sqrt(len(quarter)) for quarter in quarters))
    fall = (third - last) / third
    if fall <= FALLING or third - last <= STANDARD_ERRORS * error:
        return
    setting = "steps" if alone else "pretrain_steps"
    yield RunWarning(
        "prior not converged",
        int(rows[-1]["step"]),
        f"its loss still fell by {fall:.1%}, from {third:.3g} to {last:.3g}, in the last quarter"
        + ("" if alone else " of pretraining"),
        f"less than {FALLING:.0%}",
        f"Raise {{{setting}}}, now {end}",
        fall / FALLING,
    )


def _unbelievable_gain(config: TrainConfig, rows: Sequence[Mapping[str, float]]) -> Iterator[RunWarning]:
    names = ("mixture_gain", "mixture_disagreement", "value_std")
    gain, disagreement, seen = (_recent(config, rows, name) for name in names)
    if not _ripe(config, rows) or gain is None or disagreement is None or not seen:
        return
    ratio = disagreement / seen
    if not (ratio > HUGE or (ratio > UNSEEN and disagreement > gain)):
        return
    yield RunWarning(
        "gain of the mixture not to be trusted",
        int(rows[-1]["step"]),
        f"Q-maximised chunks promise {gain:.2g} more, while the critics disagree by {disagreement:.2g} there and by "
        f"{seen:.2g} at the data's",
        f"a gain above the disagreement, and this at most {HUGE:g} times that at the data's",
        "Lower {mixture_weight} or {trust_radius}, raise {pessimism}, or set {adaptive_mixture}",
        max(ratio / HUGE, min(ratio / UNSEEN, disagreement / max(gain, 1e-12))),
    )


def _missed_budget(config: TrainConfig, rows: Sequence[Mapping[str, float]]) -> Iterator[RunWarning]:
    budget, used = config.kl_budget, _recent(config, rows, "kl_average")
    if not _ripe(config, rows) or budget is None or used is None:
        return
    share, (least, most) = used / budget, BUDGET_SHARES
    if least <= share <= most:
        return
    gain = next((row["value_gain"] for row in reversed(rows) if "value_gain" in row), 0.0)
    tau, (_, limit) = rows[-1].get("inverse_temperature", 0.0), REFERENCE_TEMPERATURES
    if not config.normalise_values and _unlearned(rows) > UNLEARNED_REWARD:
        remedy = "The critics are not at the scale of the returns yet: set {normalise_values:True} in a new run"
    elif share < least and config.kl_dual == "reference" and tau > 0.99 * limit:
        remedy = f'tau is at its limit, {limit:.3g}, for values this small: set {{kl_dual:"log"}} in a new run'
    elif share > most:
        remedy = "The policy is further from its prior than allowed: raise {steps}, or {kl_budget} if this is wanted"
    elif config.value_penalty and gain < -LOSS * rows[-1].get("calibration_return_std", 0.0):
        remedy = f"Its actions are worth {-gain:.3g} less than the data's to the critics: lower {{value_penalty}}"
    else:
        remedy = "The policy lags behind its target: raise {steps} or {learning_rate}"
    yield RunWarning(
        "KL budget missed",
        int(rows[-1]["step"]),
        f"{share:.0%} of the KL budget of {budget:.3g} nats per action are used",
        f"{least:.0%} to {most:.0%}",
        remedy,
        share / most if share > most else least / max(share, 1e-12),
    )


_CHECKS: tuple[Check, ...] = (
    _idle_temperature,
    _collapsed_weights,
    _unlearned_level,
    _contrary_critics,
    _unpayable_values,
    _unconverged_prior,
    _unbelievable_gain,
    _missed_budget,
)
