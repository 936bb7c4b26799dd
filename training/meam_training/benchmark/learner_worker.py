"""Times updates of this project's learner: `python -m meam_training.benchmark.learner_worker SETTINGS_JSON`.

A worker of `race`, whose only form is `update`.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meam_training.benchmark.settings import SCANNED, Setting
from meam_training.config import TrainConfig
from meam_training.data.dataset import OfflineDataset
from meam_training.learning.chunk_source import make_chunk_source
from meam_training.learning.learner import Learner
from meam_training.trainer import make_spec

__all__ = ["make_update", "prepare_torch", "serve", "timed"]

ROWS = 20_000
EPISODE = 200


def make_update(setting: Setting, **overrides: Any) -> Callable[[], dict[str, Tensor]]:
    """Make a learner on synthetic data, and return a function that performs one update per call, of all networks.

    Args:
        setting: Sizes of the problem and the networks.
        **overrides: Fields of `TrainConfig`; `method` names the preset.
    """
    sizes = {
        "hidden_dims": setting.hidden_dims,
        "critic_hidden_dims": setting.hidden_dims,
        "num_critics": setting.num_critics,
        "chunk_size": setting.chunk_size,
        "batch_size": setting.batch_size,
        "nfe": setting.nfe,
        "pretrain_steps": 0,  # updates of all networks from the first one on
    }
    config = TrainConfig.preset(overrides.pop("method"), sizes, **overrides)
    dataset, device = _synthetic(setting), torch.device(config.device)
    spec = make_spec(config, dataset)
    chunks, learner = make_chunk_source(config, dataset, spec, device), Learner(spec, config, device)
    done = 0

    def update() -> dict[str, Tensor]:
        nonlocal done
        done += 1
        return learner.update(chunks, done)

    return update


def prepare_torch(threads: int | None, *, tf32: bool) -> None:
    """Set the number of threads, and whether CUDA may round the inputs of float32 products to TF32."""
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def timed(work: Callable[[], object], device: str) -> Callable[[int], float]:
    """Make a function that repeats the work and returns the seconds until the device has finished."""

    def run(repetitions: int) -> float:
        _finish(device)
        start = time.perf_counter()
        for _ in range(repetitions):
            work()
        _finish(device)
        return time.perf_counter() - start

    return run


def serve(forms: Mapping[str, Callable[[int], float]], about: Mapping[str, Any], device: str) -> None:
    """Report that the worker is warm, then answer requests until the input ends."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    print(json.dumps({"torch": torch.__version__, "device": name, **about}), flush=True)
    for line in sys.stdin:
        form, repetitions = line.split()
        print(forms[form](int(repetitions)), flush=True)


def _synthetic(setting: Setting) -> OfflineDataset:
    generator = np.random.default_rng(0)
    last = np.arange(ROWS) % EPISODE == EPISODE - 1
    return OfflineDataset.from_arrays(
        observations=generator.normal(size=(ROWS, setting.observation_dim)),
        actions=np.tanh(generator.normal(size=(ROWS, setting.action_dim))),
        rewards=generator.normal(size=ROWS),
        next_observations=generator.normal(size=(ROWS, setting.observation_dim)),
        terminations=np.zeros(ROWS, bool),
        truncations=last,
    )


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Time the learner described by the settings."""
    settings = json.loads(sys.argv[1])
    device = settings["device"]
    warnings.simplefilter("error", RuntimeWarning)  # otherwise the learner would silently run uncompiled
    prepare_torch(settings["threads"], tf32=settings["tf32"])
    names = ("method", "objective", "precision", "compile", "device", "threads")
    overrides = {name: settings[name] for name in names if name in settings}
    run = timed(make_update(Setting.from_json(settings["setting"]), **overrides), device)
    first = run(SCANNED)
    run(SCANNED)
    serve({"update": run}, {"first_seconds": {"update": first}}, device)


if __name__ == "__main__":
    main()
