"""Write a policy folder for meam/Pockets-v0 whose networks have random weights: as fast as a trained one.

python benchmarks/runtime/untrained_policy.py FOLDER --hidden-dims 256 256
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gymnasium import spaces

from meam_export.graph.policy_graph import build_graph
from meam_policy.environments.make import make_environment
from meam_policy.folder.policy_folder import CONFIG_FILE, GRAPH_FILE, sha256
from meam_policy.spec import BoxSpec, PolicySpec
from meam_training.config import TrainConfig
from meam_training.networks.meam_networks import build_networks
from meam_training.networks.policy_module import PolicyModule

ENVIRONMENT_ID = "meam/Pockets-v0"
CHUNK_SIZE, EXECUTE_STEPS = 10, 5


def write_untrained_policy(folder: Path, hidden_dims: Sequence[int], nfe: int) -> Path:
    """Write `config.json` and `policy.onnx`, all that acting needs, and return the folder."""
    sizes = {"hidden_dims": tuple(hidden_dims), "nfe": nfe, "chunk_size": CHUNK_SIZE}
    config = TrainConfig.preset("bc", **sizes)
    env = make_environment(ENVIRONMENT_ID)
    observation, action = env.observation_space, env.action_space
    env.close()
    assert isinstance(observation, spaces.Box)
    assert isinstance(action, spaces.Box)
    size = len(observation.low)
    spec = PolicySpec(
        observation=(BoxSpec.from_space(observation),),
        action=BoxSpec.from_space(action),
        chunk_size=CHUNK_SIZE,
        execute_steps=EXECUTE_STEPS,
        observation_mean=(0.0,) * size,
        observation_std=(1.0,) * size,
        action_offset=tuple(((action.high + action.low) / 2).tolist()),
        action_scale=tuple(((action.high - action.low) / 2).tolist()),
        integration=config.integration,
        method=config.method,
        environment_id=ENVIRONMENT_ID,
    )
    graph = build_graph(PolicyModule(build_networks(spec, config).eval(), spec), spec)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / GRAPH_FILE).write_bytes(graph)
    (folder / CONFIG_FILE).write_text(replace(spec, files={GRAPH_FILE: sha256(graph)}).to_json())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--nfe", type=int, default=10)
    arguments = parser.parse_args()
    print(write_untrained_policy(arguments.folder, arguments.hidden_dims, arguments.nfe))


if __name__ == "__main__":
    main()
