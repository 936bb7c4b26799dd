"""Variants of a policy: other graphs of the same networks, with fewer solver steps or lower precision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from meam_policy.spec.figures import VARIANT_FIGURES, check_figures
from meam_policy.spec.integration import Integration
from meam_policy.spec.json_reader import JsonReader, require, with_new_names

__all__ = ["Precision", "VariantSpec"]

Precision = Literal["fp32", "int8", "fp16"]
"""Precision of a graph's weights: float32; 8-bit integers in blocks, for CPUs; float16, for CUDA and TensorRT."""

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


@dataclass(frozen=True)
class VariantSpec:
    """Another graph of a policy, with the figures measured when it was exported.

    Attributes:
        file: Its file in the policy folder.
        integration: How its flow is integrated.
        precision: Precision of the graph's weights.
        one_step: Whether it is the one-step policy distilled from the flow, rather than the flow itself.
        takes_prefix: Whether it takes a prefix, which its chunk continues, for real-time chunking.
        measured: Figures by name, of `figures.VARIANT_FIGURES`.
    """

    file: str
    integration: Integration
    precision: Precision = "fp32"
    one_step: bool = False
    takes_prefix: bool = False
    measured: Mapping[str, float] = field(default_factory=dict)

    def check(self, name: str) -> None:
        """Check that the fields are in range and consistent.

        Raises:
            FormatError: a field is out of range, or contradicts another; the message names the variant.
        """
        prefix = f'variants["{name}"].'
        plain = _NAME.fullmatch(name) is not None
        require(plain, "variants", repr(name), "names of lower-case letters, digits, dots and dashes")
        self.integration.check(prefix)
        known = get_args(Precision)
        require(self.precision in known, f"{prefix}precision", repr(self.precision), f"one of {', '.join(known)}")
        if self.one_step:
            require(self.integration.nfe == 1, f"{prefix}nfe", self.integration.nfe, "1, of a one-step policy")
        if self.one_step or self.takes_prefix:
            kind = "a one-step policy" if self.one_step else "a graph that takes a prefix"
            require(self.integration.best_of == 1, f"{prefix}best_of", self.integration.best_of, f"1, of {kind}")
            both = self.one_step and self.takes_prefix
            require(not both, f"{prefix}takes_prefix", "true", "false, of a one-step policy")
        check_figures(f"{prefix}measured", self.measured, VARIANT_FIGURES)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        own = {"precision": self.precision, "one_step": self.one_step, "takes_prefix": self.takes_prefix}
        return {"file": self.file, **self.integration.to_json(), **own, "measured": dict(self.measured)}

    @classmethod
    def from_json(cls, data: Any, name: str) -> VariantSpec:
        """Read what `to_json` wrote.

        Raises:
            FormatError: a field is missing, unknown or of the wrong type.
        """
        read = JsonReader.of(with_new_names(data), f'variants["{name}"]')
        read.only([f.name for f in (*fields(cls), *fields(Integration)) if f.name != "integration"])
        return cls(
            file=read.text("file"),
            integration=Integration.read(read),
            precision=read.get("precision", str, "text"),
            one_step=read.get("one_step", bool, "true or false"),
            takes_prefix=read.get("takes_prefix", bool, "true or false"),
            measured=read.numbers_by_name("measured"),
        )
