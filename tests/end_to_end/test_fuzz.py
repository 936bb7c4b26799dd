"""Some thousand damaged policy files: each is read, or refused by one of the package's errors."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from meam_export import export_policy
from meam_training import OfflineDataset, TrainConfig, train

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz" / "run.py"


@pytest.fixture
def fuzzer(monkeypatch):
    spec = importlib.util.spec_from_file_location("run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # By this name the child processes import it.
    monkeypatch.setitem(sys.modules, "run", module)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    observations = np.random.default_rng(0).normal(size=(60, 3))
    actions, nothing, cut = observations[:, :2].clip(-1, 1), np.zeros(60, bool), np.arange(60) % 30 == 29
    data = OfflineDataset.from_arrays(observations, actions, observations[:, 2], observations, nothing, cut)
    sizes = {"hidden_dims": (8, 8), "critic_hidden_dims": (8,), "num_critics": 2, "batch_size": 16, "nfe": 4}
    config = TrainConfig.preset("me-am", steps=2, chunk_size=2, candidates=4, device="cpu", **sizes)
    return Path(export_policy(train(config, data, tmp_path / "run"), tmp_path / "policy"))


@pytest.mark.slow
def test_damaged_files_are_read_or_refused(fuzzer, folder):
    outcomes = {kind: set() for kind in fuzzer.KINDS}
    for number, kind, outcome in fuzzer.fuzz(folder, 4000, seed=0, jobs=1):
        outcomes[kind].add(outcome)
        assert outcome in ("read", "refused"), (number, kind)
    assert all(found == {"read", "refused"} for found in outcomes.values()), outcomes


@pytest.mark.slow
def test_a_child_that_dies_is_found_and_replaced(fuzzer, folder):
    worker = fuzzer._Worker(folder, seed=0)
    try:
        worker._process.kill()
        worker._process.join()
        assert worker.outcome() == "the process died: SIGKILL"
        worker.give(0, "config")
        while (outcome := worker.outcome()) is None:
            pass
        assert outcome in ("read", "refused")
    finally:
        worker.close()
