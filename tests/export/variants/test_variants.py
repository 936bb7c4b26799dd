"""Variants by name, and that each acts as it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from meam_export import export_policy
from meam_export.variants.names import parse_variant
from meam_policy import BoxSpec, ConfigError, MeamPolicy, ParityError, PolicySpec
from meam_policy.folder.policy_folder import sha256
from meam_policy.spec import EVALUATIONS, Integration, Precision, Solver, VariantSpec
from meam_policy.terminal_text import printable
from meam_training import Checkpoint, OfflineDataset, TrainConfig, train
from meam_training.networks.policy_module import PolicyModule

POLICY = PolicySpec(
    integration=Integration(nfe=10, solver="midpoint"),
    observation=(BoxSpec((3,), "float32", (-1.0,) * 3, (1.0,) * 3),),
    action=BoxSpec((2,), "float32", (-1.0, -1.0), (1.0, 1.0)),
    chunk_size=2,
    execute_steps=2,
    observation_mean=(0.0,) * 3,
    observation_std=(1.0,) * 3,
    action_offset=(0.0, 0.0),
    action_scale=(1.0, 1.0),
    method="me-am",
)
CHOOSING = replace(POLICY, integration=replace(POLICY.integration, best_of=3))
ON_A_GRID = replace(POLICY, integration=replace(POLICY.integration, nfe=4, time_grid=(0.0, 0.3, 1.0)))

TINY: dict[str, Any] = {
    "steps": 3,
    "batch_size": 8,
    "hidden_dims": (16,),
    "critic_hidden_dims": (8,),
    "num_critics": 2,
    "chunk_size": 2,
    "nfe": 4,
    "learning_rate": 0.1,
    "device": "cpu",
}


def variant(name: str, nfe: int, solver: Solver = "euler", **rest: Any) -> VariantSpec:
    how = {key: rest.pop(key) for key in ("time_grid", "best_of") if key in rest}
    return VariantSpec(f"policy-{name}.onnx", Integration(nfe, solver, **how), **rest)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # Where no solver is named it is the policy's own, if the steps allow, or else Euler's.
        (POLICY, variant("k2", 2, "midpoint")),
        (POLICY, variant("k3", 3)),
        (replace(POLICY, integration=replace(POLICY.integration, nfe=4, solver="rk4")), variant("k6", 6)),
        (replace(POLICY, integration=replace(POLICY.integration, solver="ab2")), variant("k3", 3, "ab2")),
        (POLICY, variant("k10", 10, "midpoint")),
        (POLICY, variant("k4-midpoint", 4, "midpoint")),
        (POLICY, variant("k4-euler", 4)),
        (POLICY, variant("k3-ab2", 3, "ab2")),
        (POLICY, variant("k4-heun", 4, "heun")),
        (POLICY, variant("k8-rk4", 8, "rk4")),
        (POLICY, variant("one-step", 1, one_step=True)),
        (POLICY, variant("one-step-int8", 1, one_step=True, precision="int8")),
        (POLICY, variant("best-of-4", 10, "midpoint", best_of=4)),
        (POLICY, variant("k5-best-of-4", 5, best_of=4)),
        (POLICY, variant("k5-euler-best-of-4-fp16", 5, best_of=4, precision="fp16")),
        (POLICY, variant("int8", 10, "midpoint", precision="int8")),
        (POLICY, variant("fp16", 10, "midpoint", precision="fp16")),
        (POLICY, variant("fp32", 10, "midpoint")),
        (POLICY, variant("best-of-2-int8", 10, "midpoint", best_of=2, precision="int8")),
        (POLICY, variant("rtc", 10, "midpoint", takes_prefix=True)),
        (POLICY, variant("k5-rtc", 5, takes_prefix=True)),
        (POLICY, variant("k5-ab2-rtc-int8", 5, "ab2", takes_prefix=True, precision="int8")),
        (POLICY, variant("rtc-fp16", 10, "midpoint", takes_prefix=True, precision="fp16")),
        # Of a policy that chooses all variants choose, but for the one-step policy, which has nothing to choose from.
        (CHOOSING, variant("k2", 2, "midpoint", best_of=3)),
        (CHOOSING, variant("best-of-1", 10, "midpoint")),
        (CHOOSING, variant("one-step", 1, one_step=True)),
        (CHOOSING, variant("best-of-1-rtc", 10, "midpoint", takes_prefix=True)),
        # The policy's own grid goes with its own steps and solver.
        (ON_A_GRID, variant("int8", 4, "midpoint", time_grid=(0.0, 0.3, 1.0), precision="int8")),
        (ON_A_GRID, variant("k4", 4, "midpoint", time_grid=(0.0, 0.3, 1.0))),
        (ON_A_GRID, variant("k4-heun", 4, "heun")),
        (ON_A_GRID, variant("rtc", 4, "midpoint", time_grid=(0.0, 0.3, 1.0), takes_prefix=True)),
        (ON_A_GRID, variant("k2", 2, "midpoint")),
    ],
    ids=lambda value: value.file[7:-5] if isinstance(value, VariantSpec) else "",
)
def test_a_name_says_what_the_variant_is(policy: PolicySpec, expected: VariantSpec) -> None:
    assert parse_variant(expected.file[7:-5], policy) == (expected, ())


@pytest.mark.parametrize(
    ("name", "solvers"),
    [
        ("k1-grid", {"euler", "ab2"}),
        ("k3-grid", {"euler", "ab2"}),
        ("k2-grid", {"euler", "ab2", "midpoint", "heun"}),
        ("k4-grid", {"euler", "ab2", "midpoint", "heun", "rk4"}),
        ("k4-midpoint-grid", {"midpoint"}),
        ("k8-rk4-grid-best-of-2-int8", {"rk4"}),
        ("k4-grid-rtc", {"euler", "ab2", "midpoint"}),
        ("k3-grid-rtc", {"euler", "ab2"}),
        ("k4-ab2-grid-rtc-fp16", {"ab2"}),
    ],
)
def test_a_grid_is_searched_for_by_the_solver_named_or_by_all_that_fit(name: str, solvers: set[str]) -> None:
    assert set(parse_variant(name, POLICY)[1]) == solvers


@given(
    steps=st.none() | st.integers(1, 999),
    solver=st.none() | st.sampled_from(get_args(Solver)),
    grid=st.booleans(),
    head=st.booleans(),
    best_of=st.none() | st.integers(1, 9999),
    takes_prefix=st.booleans(),
    precision=st.none() | st.sampled_from(get_args(Precision)),
    policy=st.sampled_from([POLICY, CHOOSING, ON_A_GRID]),
)
def test_every_name_made_of_these_parts_is_read_back(
    steps: int | None,
    solver: Solver | None,
    grid: bool,
    head: bool,
    best_of: int | None,
    takes_prefix: bool,
    precision: Precision | None,
    policy: PolicySpec,
) -> None:
    if takes_prefix:
        assume(not head and (best_of or policy.integration.best_of) == 1 and solver not in ("heun", "rk4"))
    if head:
        assume(best_of in (None, 1))
        parts = ["one-step"]
    elif steps is None:
        parts = []
    else:
        assume(solver is None or steps % EVALUATIONS[solver] == 0)
        parts = [f"k{steps}", *([solver] if solver else []), *(["grid"] if grid else [])]
    parts += [] if best_of is None else [f"best-of-{best_of}"]
    parts += ["rtc"] if takes_prefix else []
    parts += [] if precision is None else [precision]
    assume(parts)
    name = "-".join(parts)
    found, solvers = parse_variant(name, policy)
    assert found.file == f"policy-{name}.onnx"
    assert found.one_step == head
    how = found.integration
    assert how.nfe == (1 if head else steps or policy.integration.nfe)
    assert how.best_of == (best_of or (1 if head else policy.integration.best_of))
    assert found.takes_prefix == takes_prefix
    assert found.precision == (precision or "fp32")
    if steps is not None and solver is not None and not head:
        assert how.solver == solver
    assert bool(solvers) == (grid and steps is not None and not head)
    assert all(how.nfe % EVALUATIONS[s] == 0 for s in (how.solver, *solvers))


BAD_NAMES = [
    "", "-", "k", "k0", "k-1", "k2.5", "k1000", "K5", " k5", "k5 ", "k5\n", "k٣", "k5-", "k5--int8", "grid", "midpoint",
    "k3-midpoint", "k6-rk4", "k5-heun-grid", "k5-adams", "k5-int4", "int8-k5", "int8-fp16", "best-of-", "best-of-0",
    "best-of-4-k5", "one-step-grid", "one-step-best-of-4", "k5-one-step",
    "rtc-k5", "rtc-best-of-1", "int8-rtc", "rtc-rtc", "k5rtc", "rtc-grid", "RTC", "one-step-rtc", "best-of-4-rtc",
    "k5-best-of-2-rtc", "k4-heun-rtc", "k8-rk4-rtc", "k4-heun-grid-rtc", "k8-rk4-grid-rtc-int8",
    "policy", "../k5", "policy.onnx", "grid-ab2",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_variant(name, POLICY)
    assert str(caught.value).startswith(f'There is no variant "{printable(name)}"')
    assert "config.json" not in str(caught.value)


@given(st.text(alphabet="k0123456789-abceghimnoprstuf", max_size=14))
def test_any_other_text_is_a_variant_or_a_configuration_error(name: str) -> None:
    try:
        found, _ = parse_variant(name, CHOOSING)
    except ConfigError:
        return
    found.check(name)


def test_the_message_says_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="nfe is 3; expected a multiple of 2, the evaluations per step of midpoint"):
        parse_variant("k3-midpoint", POLICY)
    with pytest.raises(ConfigError, match="nfe is 0; expected 1 to 10000"):
        parse_variant("k0", POLICY)
    with pytest.raises(ConfigError, match=r"the one-step policy draws one chunk\. Take one-step"):
        parse_variant("one-step-best-of-2", POLICY)
    with pytest.raises(
        ConfigError, match="expected names such as k5, k4-midpoint, k3-grid, one-step, best-of-4 or rtc"
    ):
        parse_variant("fast", POLICY)


ONE_CHUNK = r"only a flow that draws one chunk can take a prefix\. Take best-of-1-rtc\."


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("best-of-4-rtc", {}, ONE_CHUNK),
        ("k5-best-of-4-rtc-int8", {}, ONE_CHUNK),
        ("rtc", {"best_of": 3}, ONE_CHUNK),
        ("one-step-rtc", {}, ONE_CHUNK),
        ("k4-heun-rtc", {}, r"its solver is heun; expected one of euler, ab2, midpoint, .* Take k4-midpoint-rtc\."),
        ("k8-rk4-grid-rtc", {}, r"its solver is rk4; expected one of .* Take k8-midpoint-rtc\."),
        ("rtc", {"solver": "heun"}, r"its solver is heun; expected one of .* Take k10-midpoint-rtc\."),
        ("rtc-int8", {"solver": "rk4", "nfe": 4}, r"its solver is rk4; .* Take k4-midpoint-rtc\."),
    ],
)
def test_what_cannot_take_a_prefix_is_refused_with_a_name_that_can(
    name: str, changes: dict[str, Any], message: str
) -> None:
    policy = replace(POLICY, integration=replace(POLICY.integration, **changes))
    with pytest.raises(ConfigError, match=f'^There is no variant "{name}": {message}$') as caught:
        parse_variant(name, policy)
    remedy = str(caught.value).rpartition("Take ")[2].rstrip(".")
    assert parse_variant(remedy, policy)[0].takes_prefix


def test_of_a_policy_by_another_solver_one_that_can_be_told_is_searched_for() -> None:
    assert set(
        parse_variant("k4-grid-rtc", replace(POLICY, integration=replace(POLICY.integration, solver="heun")))[1]
    ) == {"euler", "ab2", "midpoint"}


# Exported


@pytest.fixture(scope="module")
def dataset() -> OfflineDataset:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(60, 3))
    return OfflineDataset.from_arrays(
        observations=rows,
        actions=generator.uniform(-1, 1, (60, 2)),
        rewards=generator.normal(size=60),
        next_observations=rows,
        terminations=np.zeros(60),
        truncations=np.arange(60) % 20 == 19,
    )


@pytest.fixture(scope="module")
def distilled(dataset: OfflineDataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = TrainConfig.preset("me-am", distill_coef=1.0, **TINY)
    return train(config, dataset, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def choosing(dataset: OfflineDataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = TrainConfig.preset("me-am", best_of=3, distill_coef=1.0, **TINY)
    return train(config, dataset, tmp_path_factory.mktemp("run"))


NAMES = (
    *("k1", "k4-heun", "k4-rk4", "k3-ab2", "k2-grid", "one-step", "best-of-2", "best-of-1", "int8", "k2-fp16"),
    *("best-of-1-rtc", "k3-ab2-best-of-1-rtc", "k3-grid-best-of-1-rtc", "best-of-1-rtc-int8"),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distilled", "choosing"])
def test_every_variant_acts_as_its_networks_do(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(kind)
    folder = export_policy(checkpoint, tmp_path / "policy", variants=NAMES, tolerance=1.0)
    networks, recorded = checkpoint.load_networks().eval(), MeamPolicy.from_pretrained(folder).spec
    assert tuple(recorded.variants) == NAMES
    assert recorded.variants["k2-grid"].integration.time_grid is not None
    rows = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    prefixes = np.random.default_rng(3).uniform(-1.2, 1.2, (40, 2, 2)).astype(np.float32), np.full((40, 2), 0.7, "f4")
    outcomes = {}
    for name, found in recorded.variants.items():
        policy = MeamPolicy.from_pretrained(folder, variant=name)
        assert policy.variant == name
        assert policy.spec.integration == found.integration
        noise = np.random.default_rng(2).standard_normal((40, policy.spec.noise_dim), dtype=np.float32)
        spec = replace(checkpoint.spec, integration=found.integration)
        with torch.no_grad():
            module = PolicyModule(networks, spec, found.one_step, found.takes_prefix)
            given = prefixes if found.takes_prefix else ()
            expected = module.decide(*map(torch.from_numpy, (rows, noise, *given)))[0].numpy()
        assert policy.session.takes_prefix == found.takes_prefix == ("rtc" in name)
        errors = np.abs(policy.session.run_all(rows, noise, *given)["actions"] - expected).max(axis=(1, 2))
        if found.precision == "fp32":
            assert errors.max() < 1e-5
        else:  # rounding may choose another chunk
            assert np.median(errors) < 0.05
        outcomes[name] = expected.tobytes()
    exact = [name for name in NAMES if recorded.variants[name].precision == "fp32"]
    assert len({outcomes[name] for name in exact}) == len(exact)


@pytest.mark.slow
def test_a_variant_that_is_the_policy_itself_shares_its_file(distilled: Checkpoint, tmp_path: Path) -> None:
    folder = export_policy(
        distilled, tmp_path / "policy", variants=("k4", "fp32", "k4-midpoint", "best-of-1", "k2")
    ).folder
    variants = MeamPolicy.from_pretrained(folder).spec.variants
    assert [v.file for v in variants.values()] == ["policy.onnx"] * 4 + ["policy-k2.onnx"]
    assert {file.name for file in folder.glob("*.onnx")} == {"policy.onnx", "policy-k2.onnx"}
    assert variants["k4"].measured["action_error"] < 1e-6 < variants["k2"].measured["action_error"]


@pytest.mark.slow
def test_a_variant_that_is_told_nothing_acts_as_the_policy_does(distilled: Checkpoint, tmp_path: Path) -> None:
    folder = export_policy(distilled, tmp_path / "policy", variants=("rtc", "k2-rtc")).folder
    spec = MeamPolicy.from_pretrained(folder).spec
    assert {file.name for file in folder.glob("*.onnx")} == {
        "policy.onnx",
        "policy-rtc.onnx",
        "policy-k2-rtc.onnx",
    }
    assert spec.variants["rtc"].takes_prefix
    assert spec.variants["rtc"].measured["action_error"] < 1e-5 < spec.variants["k2-rtc"].measured["action_error"]
    rows, noise = np.random.default_rng(1).normal(size=(40, 3)), np.random.default_rng(2).normal(size=(40, 4))
    plain, told = (MeamPolicy.from_pretrained(folder, variant=name).sample(rows, noise) for name in (None, "rtc"))
    np.testing.assert_allclose(told, plain, rtol=0, atol=5e-6)


@pytest.mark.slow
def test_of_a_policy_that_chooses_the_same_choice_shares_its_file(choosing: Checkpoint, tmp_path: Path) -> None:
    folder = export_policy(choosing, tmp_path / "policy", variants=("best-of-3", "best-of-2")).folder
    assert {file.name for file in folder.glob("*.onnx")} == {"policy.onnx", "policy-best-of-2.onnx"}


@pytest.mark.slow
def test_every_graph_has_its_hash_and_a_name_given_twice_is_one_variant(distilled: Checkpoint, tmp_path: Path) -> None:
    folder = export_policy(distilled, tmp_path / "policy", variants=("k2", "k1", "k2"))
    spec = MeamPolicy.from_pretrained(folder).spec
    assert list(spec.variants) == ["k2", "k1"]
    for file in ("policy-k1.onnx", "policy-k2.onnx"):
        assert spec.files[file] == sha256((folder / file).read_bytes())
        onnx.checker.check_model(onnx.load(folder / file), full_check=True)


@pytest.mark.slow
def test_a_variant_of_a_policy_on_its_own_grid_keeps_it(distilled: Checkpoint, tmp_path: Path) -> None:
    grid = (0.0, 0.25, 1.0)
    folder = export_policy(distilled, tmp_path / "policy", time_grid=grid, variants=("int8", "k2"), tolerance=1.0)
    spec = MeamPolicy.from_pretrained(folder).spec
    assert (
        spec.integration.time_grid,
        spec.variants["int8"].integration.time_grid,
        spec.variants["k2"].integration.time_grid,
    ) == (
        grid,
        grid,
        None,
    )


@pytest.mark.parametrize(
    "name", ["k0", "k3-midpoint", "warp", "one-step-best-of-2", "k4-heun-rtc", "best-of-4-rtc", "one-step-rtc"]
)
def test_a_bad_name_is_refused_before_anything_is_done(distilled: Checkpoint, tmp_path: Path, name: str) -> None:
    stages: list[str] = []
    with pytest.raises(ConfigError, match=f'There is no variant "{name}"'):
        export_policy(
            distilled, tmp_path / "policy", variants=("k1", name), on_stage=lambda stage, _: stages.append(stage)
        )
    assert not stages
    assert not list(tmp_path.iterdir())


def test_what_the_networks_lack_is_refused_and_nothing_is_written(dataset: OfflineDataset, tmp_path: Path) -> None:
    undistilled = train(TrainConfig.preset("me-am", **TINY), dataset, tmp_path / "me-am")
    with pytest.raises(ConfigError, match="no one-step policy. Train with --distill-coef above 0"):
        export_policy(undistilled, tmp_path / "policy", variants=("one-step",))
    cloned = train(TrainConfig.preset("bc", TINY), dataset, tmp_path / "bc")
    with pytest.raises(ConfigError, match='"best-of-4" of a bc policy: it has no critics to choose by'):
        export_policy(cloned, tmp_path / "policy", variants=("best-of-4",))
    with pytest.raises(ConfigError, match="best_of is 4; expected 1, because bc trains no critics"):
        export_policy(cloned, tmp_path / "policy", best_of=4)
    edited = train(TrainConfig.preset("qam-edit", **TINY), dataset, tmp_path / "qam-edit")
    with pytest.raises(ConfigError, match=r"its edits would change the prefix\. Export it without rtc"):
        export_policy(edited, tmp_path / "policy", variants=("best-of-1-rtc",))
    assert {path.name for path in tmp_path.iterdir()} == {"me-am", "bc", "qam-edit"}


@pytest.mark.slow
def test_a_tolerance_of_ones_own_is_for_rounded_variants_only(distilled: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"policy-int8\.onnx differs .* expected at most 1e-09 for int8"):
        export_policy(distilled, tmp_path / "policy", variants=("int8",), tolerance=1e-9)
    assert not list(tmp_path.iterdir())
    export_policy(distilled, tmp_path / "policy", variants=("k2",), tolerance=1e-9)
