"""What a policy folder records of its own export, for its model card."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meam_export.graph.parity import ParityRow
from meam_policy.errors import FormatError
from meam_policy.folder.golden import GOLDEN_FILE
from meam_policy.folder.policy_folder import read_graph
from meam_policy.folder.safetensors_reader import read_metadata
from meam_policy.spec import PolicySpec

__all__ = ["ExportRecord"]

_KEY = "export"


@dataclass(frozen=True)
class ExportRecord:
    """What was exported, and how it was checked. It is kept in the metadata of golden.safetensors, which is hashed.

    Attributes:
        steps: Steps that the checkpoint had completed.
        machine: Processor of the machine that exported, and measured the variants.
        version: Version of this package that exported.
        parity: Differences of policy.onnx from PyTorch, by kind of inputs.
        episodes: Episodes over which the return of every variant was measured; 0 for none.
        seed: Seed of the first of them.
    """

    steps: int
    machine: str
    version: str
    parity: tuple[ParityRow, ...]
    episodes: int = 0
    seed: int = 0

    def to_metadata(self) -> dict[str, str]:
        """The metadata of the safetensors file."""
        return {_KEY: json.dumps(asdict(self), sort_keys=True)}

    @classmethod
    def read(cls, folder: Path, spec: PolicySpec) -> ExportRecord | None:
        """Read a folder's record; None if an earlier version exported it, and wrote none.

        Raises:
            NotFoundError: golden.safetensors is missing, though `config.json` names it.
            IntegrityError: its hash is not the one that `config.json` records.
            FormatError: it is broken, or its record is.
        """
        if GOLDEN_FILE not in spec.files:
            return None
        text = read_metadata(read_graph(folder, spec, GOLDEN_FILE), GOLDEN_FILE).get(_KEY)
        if text is None:
            return None
        try:
            data: dict[str, Any] = json.loads(text)
            rows = tuple(ParityRow(**row) for row in data.pop("parity"))
            record = cls(**data, parity=rows)
            numbers = [value for row in rows for name, value in asdict(row).items() if name != "kind"]
            known = isinstance(record.machine, str) and isinstance(record.version, str) and len(rows) >= 1
            counts = (record.steps, record.episodes, record.seed)
            whole = all(type(count) is int for count in counts) and all(isinstance(row.kind, str) for row in rows)
            if not (known and whole and all(type(number) in (int, float) for number in numbers)):
                raise TypeError("a field has another type")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FormatError(
                f'{GOLDEN_FILE}: its metadata "{_KEY}" is not the record of an export ({error}); expected what '
                "`meam export` writes. Export the policy again."
            ) from error
        return record
