import dataclasses
import json
import os
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meam_policy.cli import run
from meam_policy.errors import ConfigError, NotFoundError, OutputError
from meam_training.benchmark.contestants import PRODUCTS, make_contestants, worker_environment
from meam_training.benchmark.learner_worker import make_update
from meam_training.benchmark.matmul_worker import count_flops
from meam_training.benchmark.race import Contestant, Outcome, race, turns
from meam_training.benchmark.report import COLUMNS, cells, limits, machine, markdown, notes, summarise, to_json
from meam_training.benchmark.settings import PROGRAMS, Setting
from meam_training.commands.bench_train import BenchTrainArguments, ProgramName

TINY = Setting(
    "tiny", observation_dim=3, action_dim=2, chunk_size=2, hidden_dims=(8, 6), num_critics=2, updates=8, batch_size=16
)

STAND_IN = """
import json, os, sys, time
log = open(sys.argv[1], "a")
print(json.dumps({"pid": os.getpid(), "cores": len(os.sched_getaffinity(0))}), flush=True)
for line in sys.stdin:
    start = time.monotonic()
    form, repetitions = line.split()
    time.sleep(0.02)
    print(form, start, time.monotonic(), file=log, flush=True)
    print(int(repetitions) * float(sys.argv[2]), flush=True)
"""

FAKE_JAX = """
__version__ = "0"
class device: device_kind = "fake"
def devices(): return [device]
def device_put(batch): return batch
def block_until_ready(params): pass
"""

FAKE_QAM = """
import types
def get_config(): return types.SimpleNamespace()
class QAMAgent:
    network = types.SimpleNamespace(params=None)
    def create(seed, observation, action, config):
        agent = QAMAgent()
        rows, chunk = config.batch_size, config.horizon_length
        agent.shapes = {"observations": (rows, *observation.shape), "actions": (rows, chunk, *action.shape)}
        assert config.action_chunking == (chunk > 1) and config.num_qs == 2 and config.flow_steps == 10
        return agent
    def update(self, batch):
        assert all(batch[name].shape == shape for name, shape in self.shapes.items())
        return self, {}
    def batch_update(self, batch):
        assert all(batch[name].shape == (8, *shape) for name, shape in self.shapes.items())
        return self, {}
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "qam"
    (folder / "agents").mkdir(parents=True)
    (folder / "agents" / "qam.py").write_text(FAKE_QAM)
    (folder / "jax.py").write_text(FAKE_JAX)
    return folder


@pytest.fixture
def stand_in(tmp_path):
    def make(name: str, program: str = STAND_IN, seconds: float = 0.5, form: str | None = None) -> Contestant:
        command = (sys.executable, "-c", program, str(tmp_path / "log"), str(seconds))
        return Contestant(name, command, form or name, repetitions=10)

    return make


@pytest.mark.parametrize("method", ["qam", "me-am"])
def test_updates_of_all_networks_are_timed_and_not_those_of_pretraining(method):
    assert {"prior_loss", "policy_loss", "critic_loss"} <= make_update(TINY, method=method, device="cpu")().keys()


def run_race(contestants: list[Contestant], rounds: int = 2, **options) -> Outcome:
    outcome = Outcome(TINY, contestants)
    race(outcome, rounds, os.environ, **options)
    return outcome


def measured(**rates: list[float]) -> Outcome:
    """An outcome of made-up rates; a product of the tiny setting has 2 · 160 · 8 · 8 operations."""
    named = {name.replace("_", "-"): values for name, values in rates.items()}
    named |= {PRODUCTS[name]: named.pop(name) for name in ("float32", "bf16") if name in named}
    outcome = Outcome(TINY, [Contestant(name, (name,), "update", 8) for name in named], named)
    for name in set(named) & set(PRODUCTS.values()):
        outcome.about[name] = {"flops": {"qam": 10 * 2 * 160 * 8 * 8}}
    return outcome


def row_of(outcome: Outcome, name: str):
    return next(row for row in summarise(outcome) if row.name == name)


@given(st.integers(1, 6), st.integers(1, 5))
def test_every_contestant_has_one_turn_per_round(count, rounds):
    contestants = [Contestant(str(i), (), "update", 1) for i in range(count)]
    order = list(turns(contestants, rounds))
    assert len(order) == count * rounds
    for start in range(0, len(order), count):
        assert {c.name for c in order[start : start + count]} == {c.name for c in contestants}
    assert order == list(turns(contestants, rounds))


def test_the_order_differs_from_round_to_round():
    contestants = [Contestant(str(i), (), "update", 1) for i in range(5)]
    order = [c.name for c in turns(contestants, 6)]
    assert len({tuple(order[start : start + 5]) for start in range(0, 30, 5)}) > 3


@pytest.mark.slow
def test_contestants_work_one_at_a_time_in_the_order_of_the_turns(stand_in, tmp_path):
    contestants = [stand_in("a", seconds=0.5), stand_in("b", seconds=0.25), stand_in("c", seconds=0.5)]
    outcome = run_race(contestants)
    seen = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [name for name, *_ in seen] == [c.name for c in turns(contestants, 2)]
    ends, starts = ([float(times[i]) for _, *times in seen] for i in (1, 0))
    assert all(end <= start for end, start in zip(ends[:-1], starts[1:], strict=True))
    assert outcome.rates == {"a": [2.0, 2.0], "b": [4.0, 4.0], "c": [2.0, 2.0]}
    assert outcome.failures == {}


@pytest.mark.slow
def test_contestants_of_one_command_share_a_worker(stand_in):
    outcome = run_race([stand_in("a", form="update"), stand_in("b", form="scan"), stand_in("c", seconds=0.1)])
    pids = {name: about["pid"] for name, about in outcome.about.items()}
    assert pids["a"] == pids["b"] != pids["c"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot confine processes to cores")
def test_workers_are_confined_to_the_cores_and_this_process_is_not(stand_in):
    before = os.sched_getaffinity(0)
    assert run_race([stand_in("a")], cores=1).about["a"]["cores"] == 1
    assert os.sched_getaffinity(0) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import sys; sys.exit('no compiler')", "no compiler"),
        ("import os; os.kill(os.getpid(), 9)", "ended with exit code -9"),
        ("print('hello')", "answered 'hello'"),
        ("print('{}'); input(); raise RuntimeError('out of luck')", "RuntimeError: out of luck"),
        ("print('{}'); input(); print('soon')", "answered 'soon'"),
    ],
)
def test_a_failing_worker_is_a_failed_row_and_the_others_go_on(stand_in, program, reason):
    outcome = run_race([stand_in("broken", program), stand_in("whole")])
    assert outcome.failures == {"broken": reason}
    assert len(outcome.rates["whole"]) == 2
    assert cells(row_of(outcome, "broken"))[:2] == ["broken", "failed"]
    assert f"Failed, broken: {reason}" in notes(outcome)


def test_an_interrupt_ends_the_workers_and_keeps_what_was_measured(stand_in):
    outcome, seen = Outcome(TINY, [stand_in("a"), stand_in("b", seconds=0.1)]), []

    def interrupt(what: str) -> None:
        seen.append(what)
        if len(seen) == 5:  # two starts and one round later
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        race(outcome, 10, os.environ, on_turn=interrupt)
    assert {name: len(rates) for name, rates in outcome.rates.items()} == {"a": 1, "b": 1}
    for about in outcome.about.values():
        with pytest.raises(ProcessLookupError):
            os.kill(about["pid"], 0)


def test_the_ratio_is_taken_within_the_rounds():
    # Twice as fast in every round, of which one was disturbed: the ratio of the medians would be 10 / 8.
    outcome = measured(eager=[20.0, 2.0, 10.0], reference=[10.0, 1.0, 8.0])
    assert row_of(outcome, "eager").ratio == 2.0
    assert row_of(outcome, "eager").median == 10.0
    assert row_of(outcome, "eager").quartiles == (6.0, 15.0)


def test_the_opponent_is_the_faster_form_of_the_reference():
    outcome = measured(eager=[8.0, 8.0], reference=[16.0, 2.0], reference_scan=[10.0, 10.0])
    assert row_of(outcome, "eager").ratio == 0.8
    assert row_of(outcome, "reference-scan").ratio == 1.0
    outcome.failures["reference-scan"] = "gone"
    assert row_of(outcome, "eager").ratio == (8 / 16 + 8 / 2) / 2


def test_there_is_no_ratio_without_an_opponent():
    assert row_of(measured(eager=[1.0]), "eager").ratio is None


def test_an_interrupted_round_leaves_the_others():
    outcome = measured(eager=[6.0, 9.0], reference=[3.0])
    assert row_of(outcome, "eager").ratio == 2.0


def test_the_limit_is_the_rate_of_the_products_over_those_of_one_update():
    # An update has the operations of ten products: 50 products a second make 5 updates.
    outcome = measured(eager=[4.0, 1.0, 4.0], eager_bf16=[8.0, 8.0, 8.0], float32=[50.0, 25.0, 100.0], bf16=[400.0] * 3)
    by_precision = {limit.precision: limit for limit in limits(outcome)}
    assert by_precision["float32"].updates_per_second == pytest.approx(5)
    assert by_precision["bf16"].updates_per_second == pytest.approx(40)
    assert row_of(outcome, "eager").share == pytest.approx(0.4)  # of 0.8, 0.4 and 0.4
    assert row_of(outcome, "eager-bf16").share == pytest.approx(0.2)


def test_operations_are_counted_as_by_hand():
    batch, features, act, (wide, narrow) = TINY.batch_size, 3, 4, TINY.hidden_dims
    inner = wide * narrow + narrow * act
    forward = (features + act + 1) * wide + inner
    # Backwards every product has two, but the first layer's inputs need no gradient.
    assert count_flops(TINY, "bc") == 2 * batch * (2 * forward + inner)


def test_operations_grow_with_the_batch():
    twice = dataclasses.replace(TINY, batch_size=2 * TINY.batch_size)
    assert count_flops(twice, "qam") == 2 * count_flops(TINY, "qam") > 10 * count_flops(TINY, "bc")


def test_the_markdown_is_a_table_with_its_limits_and_failures():
    outcome = measured(eager=[20.0, 30.0], reference=[10.0, 10.0], float32=[500.0, 500.0])
    outcome.failures["compiled"] = "no | compiler"
    text = markdown([outcome], {"processor": "abacus"})
    lines = text.splitlines()
    assert lines[0] == "processor abacus"
    assert "| eager | 25 | 22.5 to 27.5 | 2.50 | 50% |  |  |" in lines
    table = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table} == {len(COLUMNS) + 1}
    assert "- Failed, compiled: no | compiler" in lines
    assert "- Limit, qam in float32: 0.000205 GFLOP an update at 0.0102 GFLOP/s is 50 updates/s." in lines


def test_the_json_is_strict_and_holds_every_round():
    outcome = measured(eager=[20.0, 30.0], float32=[500.0, 500.0])
    outcome.about["eager"] = {"torch": "2", "device": "cpu"}
    data = to_json([outcome], machine([outcome], 2, tf32=False))
    assert json.loads(json.dumps(data, allow_nan=False))["settings"][0]["rates"]["eager"] == [20.0, 30.0]
    assert data["machine"]["torch"] == "2"
    assert data["machine"]["tf32"] is False


def test_every_worker_computes_in_full_float32_unless_tf32_is_set():
    assert worker_environment("cuda", 2)["JAX_DEFAULT_MATMUL_PRECISION"] == "float32"
    assert worker_environment("cuda", 2)["JAX_PLATFORMS"] == "cuda"
    assert worker_environment("cuda", 2, tf32=True)["JAX_DEFAULT_MATMUL_PRECISION"] == "tensorfloat32"


def test_the_reference_answers_for_both_of_its_forms(checkout):
    contestants = make_contestants(TINY, ["eager"], "cpu", 1, reference=checkout)
    outcome = run_race([c for c in contestants if c.name.startswith("reference")], rounds=1)
    assert outcome.failures == {}
    assert {name: len(rates) for name, rates in outcome.rates.items()} == {"reference": 1, "reference-scan": 1}
    assert set(outcome.about["reference"]["first_seconds"]) == {"update", "scan"}


def test_a_wrong_checkout_is_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a worker was started"))
    assert run(["bench", "train", "--reference", str(tmp_path)]) == 2
    assert f"{tmp_path} has no agents/qam.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"rounds": 0}, ConfigError),
        ({"threads": 0}, ConfigError),
        ({"updates": 12}, ConfigError),
        ({"updates": 0}, ConfigError),
        ({"shapes": ()}, ConfigError),
        ({"markdown": Path("no/such/folder/table.md")}, OutputError),
    ],
)
def test_arguments_out_of_range_are_refused(fields, error):
    with pytest.raises(error):
        BenchTrainArguments(**fields)


def test_a_python_that_is_not_there_is_refused(checkout):
    with pytest.raises(NotFoundError, match="is not an executable"):
        BenchTrainArguments(reference=checkout, reference_python=checkout / "python")


@pytest.mark.parametrize("arguments", [[], ["trian"]])
def test_an_unknown_benchmark_is_a_mistake(arguments, capsys):
    assert run(["bench", *arguments]) == 2
    assert "expected meam bench train or infer" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_times_this_project_against_the_reference(checkout, tmp_path, capsys):
    table = tmp_path / "table.md"
    chosen = ["--shapes", "antmaze", "--scales", "small", "--contestants", "eager"]
    briefly = ["--rounds", "1", "--updates", "8", "--threads", "1"]
    there = ["--reference", str(checkout), "--markdown", str(table)]
    assert run(["bench", "train", *chosen, *briefly, *there, "--json"]) == 0
    output = capsys.readouterr()
    (setting,) = json.loads(output.out)["settings"]
    rows = {row["name"]: row for row in setting["contestants"]}
    assert set(rows) == {"eager", "reference", "reference-scan"}
    assert {row["failure"] for row in rows.values()} == {None}
    assert 0 < rows["eager"]["share"] < 1
    assert rows["eager"]["first_seconds"] > 0
    assert setting["limits"][0]["flops"] > 1e9
    assert "| eager |" in table.read_text()
    assert "antmaze, small scale" in output.err


def test_every_program_can_be_asked_for_and_is_a_preset_with_its_objective():
    assert set(typing.get_args(ProgramName)) == set(PROGRAMS)
    assert PROGRAMS["me-am-adjoint"].update == {"method": "me-am", "objective": "adjoint"}
    labels = {program.label for program in PROGRAMS.values()}
    assert labels == {"qam", "me-am", *(f"me-am {o}" for o in ("reweighted", "bridge", "adjoint", "target_score"))}
