"""How a policy acts: how much noise each of its chunks starts from, and what that returned."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from meam_policy.errors import ConfigError
from meam_policy.spec.figures import RULE_FIGURES, check_figures
from meam_policy.spec.json_reader import JsonReader, require

__all__ = ["ActingMeasurement", "ActingRule", "checked_noise_scale", "parse_acting", "rule_name"]

_BEST_OF = re.compile(r"best-of-(\d{1,4})")
_SEVERAL = re.compile(r"best-of-(?:[2-9]|[1-9][0-9]{1,4})")


@dataclass(frozen=True)
class ActingMeasurement:
    """What acting rules returned in an environment, on the same episodes.

    Attributes:
        environment_id: The environment.
        episodes: Episodes of every rule.
        seed: Seed of the first episode; episode i resets environment and noise with seed + i.
        returns: Figures by rule, see `rule_name`, and by their names in `VariantSpec.measured`: `return_mean`, its 95 %
            interval `return_low` and `return_high`, and `success`; beside those of a rule that was compared with
            sampling also `gain_low` and `gain_high`, the 95 % interval of its mean gain over sampling, episode by
            episode.
    """

    environment_id: str
    episodes: int
    seed: int
    returns: Mapping[str, Mapping[str, float]]

    def check(self, prefix: str, own: str) -> None:
        """Check that the fields are in range.

        Args:
            prefix: Put before the fields' names in error messages.
            own: The policy's own rule.

        Raises:
            FormatError: a field is out of range, or the figures are of something that is no rule.
        """
        require(self.episodes >= 1, f"{prefix}episodes", self.episodes, "1 or more")
        require(self.seed >= 0, f"{prefix}seed", self.seed, "0 or more")
        for rule, figures in self.returns.items():
            where = f'{prefix}returns["{rule}"]'
            for name in ("return_mean", "return_low", "return_high"):
                require(name in figures, where, f"without {name}", "a mean return with its interval")
            known = rule == own or _is_rule(rule)
            require(known, f"{prefix}returns", repr(rule), "sample, zero, a noise scale between 0 and 1, or best-of-N")
            check_figures(where, figures, RULE_FIGURES)

    @classmethod
    def read(cls, read: JsonReader) -> ActingMeasurement:
        """Read the object that `ActingRule.to_json` wrote.

        Raises:
            FormatError: a field is missing, unknown or of the wrong type.
        """
        read.only(["environment_id", "episodes", "seed", "returns"])
        rules = JsonReader.of(read.get("returns", dict, "an object of figures by rule"), f"{read.prefix}returns")
        return cls(
            environment_id=read.text("environment_id"),
            episodes=read.integer("episodes"),
            seed=read.integer("seed"),
            returns={rule: rules.numbers_by_name(rule) for rule in rules.data},
        )


@dataclass(frozen=True)
class ActingRule:
    """How a policy acts: the scale of the noise that its chunks start from.

    The graph takes any noise. Whoever draws it multiplies the standard normal draws by this number.

    Attributes:
        noise_scale: 1: it samples; 0: it starts from zero noise, and is deterministic; between: scaled noise.
        measured: What it returned, and the rules that it was compared with; None if that was not measured.
    """

    noise_scale: float = 1.0
    measured: ActingMeasurement | None = None

    def check(self, best_of: int) -> None:
        """Check that the fields are in range and consistent.

        Args:
            best_of: Samples per decision of the policy's graph.

        Raises:
            FormatError: a field is out of range, or the measurement lacks this rule.
        """
        require(0 <= self.noise_scale <= 1, "acting.noise_scale", self.noise_scale, "0 to 1")
        if self.measured is not None:
            own, rules = rule_name(self.noise_scale, best_of), ", ".join(self.measured.returns) or "nothing"
            require(own in self.measured.returns, "acting.measured.returns", f"of {rules}", f'the rule "{own}" too')
            self.measured.check("acting.measured.", own)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        m = self.measured
        measured = None if m is None else {**vars(m), "returns": {rule: dict(f) for rule, f in m.returns.items()}}
        return {"noise_scale": self.noise_scale, "measured": measured}

    @classmethod
    def from_json(cls, data: Any) -> ActingRule:
        """Read what `to_json` wrote.

        Raises:
            FormatError: a field is missing, unknown or of the wrong type.
        """
        read = JsonReader.of(data, "acting")
        read.only(["noise_scale", "measured"])
        measured = read.get("measured", object, "an object or null")
        return cls(
            noise_scale=read.number("noise_scale", read.get("noise_scale", object, "a number")),
            measured=None if measured is None else ActingMeasurement.read(JsonReader.of(measured, "acting.measured")),
        )

    def describe(self, best_of: int) -> str:
        """The rule and its measurement in one line, for people.

        Args:
            best_of: Samples per decision of the policy's graph.
        """
        own = rule_name(self.noise_scale, best_of)
        scale = f"{own} (noise scale {self.noise_scale:g})"
        if self.measured is None:
            return f"{scale}, not measured"
        m = self.measured
        shown = {
            rule: f"{f['return_mean']:.4g} ({f['return_low']:.4g} … {f['return_high']:.4g})"
            for rule, f in m.returns.items()
        }
        others = "; ".join(f"{rule} {figures}" for rule, figures in shown.items() if rule != own)
        where = f"return {shown[own]} over {m.episodes} episodes of {m.environment_id} from seed {m.seed}"
        return f"{scale}: {where}" + (f"; compared with {others}" if others else "")


def rule_name(noise_scale: float, best_of: int = 1) -> str:
    """The name of an acting rule: "sample", "zero", "0.5", "best-of-4", or "best-of-4 at 0.5".

    Args:
        noise_scale: Scale of the noise, 0 to 1.
        best_of: Samples per decision. With zero noise they are all the same, and the name is "zero".
    """
    if noise_scale == 0:
        return "zero"
    if best_of > 1:
        return f"best-of-{best_of}" + ("" if noise_scale == 1 else f" at {noise_scale:g}")
    return "sample" if noise_scale == 1 else f"{noise_scale:g}"


def _is_rule(name: str) -> bool:
    """Whether a text is what `rule_name` gives for some policy."""
    chosen, _, scale = name.rpartition(" at ")
    if chosen:
        return _SEVERAL.fullmatch(chosen) is not None and _is_scale(scale)
    return name in ("sample", "zero") or _SEVERAL.fullmatch(name) is not None or _is_scale(name)


def _is_scale(text: str) -> bool:
    try:
        scale = float(text)
    except ValueError:
        return False
    return 0 < scale < 1 and f"{scale:g}" == text


def checked_noise_scale(scale: Any) -> float:
    """A noise scale.

    Raises:
        ConfigError: it is not a number from 0 to 1.
    """
    if not isinstance(scale, Real) or isinstance(scale, bool) or not 0 <= float(scale) <= 1:
        raise ConfigError(f"noise_scale is {scale!r}; expected a number from 0 (zero noise) to 1 (samples).")
    return float(scale)


def parse_acting(text: str) -> tuple[float, int]:
    """Parse the name of an acting rule: "sample", "zero", a noise scale from 0 to 1, or "best-of-4".

    Returns:
        The noise scale, and the samples per decision.

    Raises:
        ConfigError: it is none of them.
    """
    named = {"sample": 1.0, "zero": 0.0}.get(text)
    if named is not None:
        return named, 1
    several = _BEST_OF.fullmatch(text)
    if several is not None and int(several[1]) >= 2:
        return 1.0, int(several[1])
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 0 <= scale <= 1:
        raise ConfigError(
            f'There is no acting rule "{text}"; expected sample, zero, a noise scale from 0 to 1, or best-of-N with N '
            "from 2 to 9999."
        )
    return scale, 1
