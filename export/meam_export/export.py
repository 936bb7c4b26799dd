"""Exports a checkpoint as a policy folder."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors.torch import save

from meam_export.card.export_record import ExportRecord
from meam_export.card.render import render_card
from meam_export.graph.parity import ParityReport, Rows, check_parity, draw_noise, random_observations, reference
from meam_export.graph.policy_graph import build_graph
from meam_export.variants.acting import AUTO, acting_by, acting_task, check_acting, single_sample
from meam_export.variants.build import BuiltVariant, build_variant
from meam_export.variants.ladder import LadderTask, measure_ladder
from meam_export.variants.ladder_figure import draw_ladder
from meam_export.variants.names import check_variant
from meam_policy import __version__
from meam_policy.acting.arrays import array_of
from meam_policy.atomic_files import given_folder
from meam_policy.diagnosis.machine import cpu_model
from meam_policy.errors import ConfigError
from meam_policy.folder.golden import GOLDEN_FILE
from meam_policy.folder.policy_folder import (
    CARD_FILE,
    CONFIG_FILE,
    GRAPH_FILE,
    LADDER_FILE,
    check_output_folder,
    sha256,
    write_policy_files,
)
from meam_policy.robot import RobotContract
from meam_policy.robot.contract_file import CONTRACT_FILE, contract_text, given_contract
from meam_policy.spec import PolicySpec, Solver, VariantSpec
from meam_policy.spec.names import Names, names_of
from meam_policy.spec.sound_numbers import require_sound_numbers
from meam_policy.typed import typed
from meam_training.networks.meam_networks import MeamNetworks
from meam_training.networks.policy_module import PolicyModule
from meam_training.runs.checkpoint import Checkpoint

__all__ = ["LADDER", "Exported", "export_policy"]

GOLDEN_INPUTS = 16
MAX_NFE = 400

LADDER = ("k1", "k2", "k3", "k5", "k10", "k2-grid", "k3-grid", "k5-grid")
"""Variants of a ladder; `meam export --ladder` adds the one-step policy if the run distilled one."""


@dataclass(frozen=True, repr=False)
class Exported(os.PathLike[str]):
    """An exported policy folder, usable as its path.

    Attributes:
        folder: The policy folder.
        spec: The contents of its `config.json`.
        parity: Errors of its graph against the checkpoint.
        variants: Errors of every variant's graph, by name.
    """

    folder: Path
    spec: PolicySpec
    parity: ParityReport
    variants: Mapping[str, ParityReport]

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        graphs = ", ".join(["policy", *self.variants])
        return f"Exported({str(self.folder)!r}, method={self.spec.method!r}, graphs={graphs!r})"

    def __truediv__(self, name: str | os.PathLike[str]) -> Path:
        return self.folder / name


@typed("output_dir", "action_names", "observation_names", "robot")
def export_policy(
    checkpoint: Checkpoint | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    nfe: int | None = None,
    solver: Solver | None = None,
    time_grid: Sequence[float] | None = None,
    best_of: int | None = None,
    acting: str | float | None = None,
    variants: Sequence[str] = (),
    observations: Rows | None = None,
    task: LadderTask | None = None,
    tolerance: float | None = None,
    action_names: Sequence[str] | None = None,
    observation_names: Names | None = None,
    robot: str | os.PathLike[str] | RobotContract | None = None,
    license: str | None = None,
    on_stage: Callable[[str, BuiltVariant | None], None] | None = None,
) -> Exported:
    """Export a checkpoint as a policy folder, which `MeamPolicy.from_pretrained` loads without PyTorch.

    The folder holds `config.json`, one self-contained `policy.onnx`, `model.safetensors` (the networks),
    `golden.safetensors` (observations and noises with the expected actions) and `README.md` (the model card); with
    variants also one ONNX file for each, and `ladder.png`. The folder appears complete, once every graph has been run
    in onnxruntime and compared with PyTorch in float64.

    Args:
        checkpoint: A checkpoint, its folder, or a training folder, whose newest checkpoint is taken.
        output_dir: Policy folder to write; must be empty or not exist.
        nfe: Evaluations of the velocity; None takes the number of training. A policy is trained as the map that its own
            solver steps make, so another number changes its actions.
        solver: ODE solver of the exported policy; None takes the one of training.
        time_grid: Boundaries of the solver steps, from 0 to 1; None for equal steps.
        best_of: Samples per decision (best-of-N); None takes the number of training.
        acting: How the exported policy acts: "sample", "zero" (zero noise) or a noise scale from 0 to 1, recorded with
            its return if there is a `task`. "auto" compares sampling, noise scale 0.5 and zero noise over the same
            episodes, 50 in the data's environment unless the `task` says otherwise, and with `best_of` above 1 also
            best-of-N. It records, with all their returns, the rule that returned most among those whose mean gain over
            sampling has a 95 % interval above 0, and sampling if there is none; unless it is best-of-N, `best_of` is
            then 1. None samples, or takes the best of `best_of` samples, unmeasured.
        variants: Further graphs to export; see `variants.names.parse_variant` for their names, and `LADDER`.
        observations: Raw observations [n, obs] at which graphs are compared, besides random ones; None takes those that
            the training run kept from its data.
        task: Where the returns of the rule and of the variants are measured; None measures none.
        tolerance: Accepted error of int8 and fp16 variants; None takes `parity.TOLERANCES`.
        action_names: Name of every number of an action in C order, e.g. of its joint. A name may end with a unit in
            square brackets.
        observation_names: Name of every number of an observation: a list for a Box, a mapping from every key to such a
            list for a Dict.
        robot: What the numbers are on the robot: a `robot.toml`, or what it would hold; recorded as `robot.json`, whose
            names become those of the numbers that have none.
        license: SPDX identifier of the policy's licence.
        on_stage: Called as `on_stage(name, None)` before every stage, and with the finished graph after it.

    Returns:
        The exported policy, usable as the path of its folder.

    Raises:
        OutputError: the folder is not empty, or cannot be written.
        NotFoundError: there is no such checkpoint, or no environment in which to compare rules.
        CheckpointError: the checkpoint is broken.
        FormatError: a bound or a statistic of the policy is none that a machine may be moved by, or the contract does
            not fit the policy.
        ConfigError: a setting is out of range, there is no such variant or rule, rules are to be compared without an
            environment, or the folder's name is empty.
        ParityError: a graph does not compute what the checkpoint computes; nothing is written.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    folder = given_folder("output_dir", output_dir).absolute()
    check_output_folder(folder)
    source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.load(checkpoint)
    recorded = source.spec
    require_sound_numbers(recorded)
    integration = {
        "nfe": nfe,
        "solver": solver,
        "time_grid": None if time_grid is None else tuple(float(end) for end in time_grid),
        "best_of": best_of,
    }
    changes = {
        "action_names": None if action_names is None else names_of((recorded.action,), action_names, "action_names"),
        "observation_names": None
        if observation_names is None
        else names_of(recorded.observation, observation_names, "observation_names"),
        "license": license,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    integrated = {name: value for name, value in integration.items() if value is not None}
    try:
        spec = replace(recorded, integration=replace(recorded.integration, **integrated), **given)
    except ValueError as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in {**integrated, **given}.items())
        raise ConfigError(f"Cannot export with {shown}: {str(error).removeprefix('config.json: ')}") from error
    contract = None if robot is None else given_contract(robot, spec)
    spec = spec if contract is None else contract.named(spec)
    joints = (contract and contract.joints) or ()
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ConfigError(f"tolerance is {tolerance}; expected a number above 0.")
    if spec.integration.nfe > MAX_NFE:
        raise ConfigError(f"nfe is {spec.integration.nfe}; expected at most {MAX_NFE}: each is a copy of the network.")
    check_acting(acting, spec, task)
    choices = [spec]
    if acting == AUTO and spec.integration.best_of > 1:
        choices.append(single_sample(spec))
    for choice in choices:
        for name in variants:
            check_variant(name, choice, source.config)
    report = on_stage or (lambda _stage, _built: None)
    rows = source.read_observations() if observations is None else _checked(observations, spec)
    networks = source.load_networks().eval()
    with acting_task(acting, spec, task) as where:
        report("policy", None)
        graphs = [_build_policy(networks, choice, rows, joints) for choice in choices]
        report("policy", graphs[0])
        if acting is not None and where is not None:
            report("acting", None)
        chosen, rule = acting_by(acting, graphs, where)
    spec = replace(chosen.policy_spec, acting=rule)
    policy = replace(chosen, policy_spec=spec)
    built = []
    for name in dict.fromkeys(variants):
        report(name, None)
        built.append(build_variant(name, networks, policy, rows, tolerance))
        report(name, built[-1])
    measured_over = (task.episodes, task.seed) if built and task is not None else ()
    record = ExportRecord(source.step, cpu_model(), __version__, policy.parity.rows, *measured_over)
    chooses = any(graph.spec.integration.best_of > 1 for graph in (policy, *built))
    files = {
        GRAPH_FILE: policy.graph,
        "model.safetensors": _model(networks, chooses),
        GOLDEN_FILE: _golden(policy.module, spec, rows, record),
    }
    specs: dict[str, VariantSpec] = {}
    if built:
        report("ladder", None)
        measured = measure_ladder(built, networks, spec, rows, task)
        specs = {v.name: replace(v.spec, measured=measured[v.name]) for v in built}
        files |= {v.spec.file: v.graph for v in built}
    if contract is not None:
        files[CONTRACT_FILE] = contract_text(contract).encode()
    hashes = {name: sha256(data) for name, data in files.items()}
    spec = replace(spec, files=hashes, variants=specs)
    if specs:
        files[LADDER_FILE] = draw_ladder(specs)
    files[CONFIG_FILE] = spec.to_json().encode()
    files[CARD_FILE] = render_card(spec, record, robot=contract).encode()
    write_policy_files(folder, files)
    return Exported(folder, spec, policy.parity, {variant.name: variant.parity for variant in built})


def _build_policy(
    networks: MeamNetworks, spec: PolicySpec, observations: Rows | None, joints: tuple[str, ...]
) -> BuiltVariant:
    module = PolicyModule(networks, spec)
    graph = build_graph(module, spec, joints=joints)
    own = VariantSpec(GRAPH_FILE, spec.integration)
    return BuiltVariant("policy", own, graph, spec, module, check_parity(graph, module, spec, observations), joints)


def _checked(observations: Rows, spec: PolicySpec) -> Rows:
    """Convert raw observations to what the graphs see, and refuse those that do not fit the policy.

    Raises:
        ConfigError: they are not shaped [n, obs] with n >= 1, or not finite.
    """
    given = array_of(observations, "observations", f"finite numbers [n, {spec.observation_dim}]", ConfigError)
    fits = given.dtype.kind in "fiu" and given.ndim == 2 and given.shape[1] == spec.observation_dim and len(given) > 0
    if not fits or not np.isfinite(given).all():
        raise ConfigError(
            f"observations is an array {given.shape}; expected finite numbers [n, {spec.observation_dim}]."
        )
    return (given - np.array(spec.observation_offset or 0.0)).astype(np.float32)


def _model(networks: MeamNetworks, chooses: bool) -> bytes:
    """The networks, without those target networks that only training uses and the dual variables of a KL budget."""
    acting = {"target_policy"} | ({"target_critic"} if chooses else set())
    state = networks.state_dict().items()
    kept = {
        name: tensor.contiguous()
        for name, tensor in state
        if not name.startswith(("target_", "trust_region.")) or name.split(".")[0] in acting
    }
    return save(kept)


def _golden(module: PolicyModule, spec: PolicySpec, observations: Rows | None, record: ExportRecord) -> bytes:
    """Inputs with the actions that PyTorch computes from them, for checking the policy on any machine."""
    rows = random_observations(spec, GOLDEN_INPUTS, seed=1)
    if observations is not None:
        rows = np.concatenate([rows[: GOLDEN_INPUTS // 2], observations[: GOLDEN_INPUTS // 2]])
    noise = draw_noise(spec, len(rows), seed=1)
    with torch.no_grad():
        exact = reference(module)(*(torch.from_numpy(array).double() for array in (rows, noise)))
    arrays = {"observation": rows, "noise": noise, "actions": np.ascontiguousarray(exact.float().numpy())}
    return safetensors.numpy.save(arrays, record.to_metadata())
