"""Times updates of QAM's public JAX implementation. Run by `meam bench train` in that implementation's own Python.

Started as `python qam_reference.py CHECKOUT SETTINGS_JSON`, it compiles, prints one line of JSON, and then answers
each line on its standard input, `update N` or `scan N`, with the seconds that N updates took: with `update`, or with
`batch_update`, which scans over `scanned` of them. It imports nothing from this project.
"""

import importlib
import json
import sys
import time
from typing import Any

__all__: list[str] = []


def main() -> None:
    """Answer the benchmark's requests until the input ends."""
    checkout, settings = sys.argv[1], json.loads(sys.argv[2])
    sys.path[0] = checkout  # replaces this script's folder, whose modules must not be importable
    jax, np = map(importlib.import_module, ("jax", "numpy"))
    qam = importlib.import_module("agents.qam")
    observed, acted, chunk = (settings[name] for name in ("observation_dim", "action_dim", "chunk_size"))
    rows, scanned = settings["batch_size"], settings["scanned"]
    config = qam.get_config()
    config.horizon_length, config.action_chunking = chunk, chunk > 1
    config.actor_hidden_dims = config.value_hidden_dims = tuple(settings["hidden_dims"])
    config.num_qs, config.flow_steps, config.batch_size = settings["num_critics"], settings["nfe"], rows
    agent = qam.QAMAgent.create(0, np.zeros(observed, np.float32), np.zeros(acted, np.float32), config)
    generator = np.random.default_rng(0)

    def draw(*lead: int) -> dict[str, Any]:
        def normal(*shape: int) -> Any:
            return generator.normal(size=(*lead, rows, *shape)).astype(np.float32)

        return {
            "observations": normal(observed),
            "next_observations": normal(chunk, observed),
            "actions": np.tanh(normal(chunk, acted)),
            "rewards": normal(chunk),
            "masks": np.ones((*lead, rows, chunk), np.float32),
            "valid": np.ones((*lead, rows, chunk), np.float32),
        }

    batches = {"update": jax.device_put(draw()), "scan": jax.device_put(draw(scanned))}

    def run(kind: str, updates: int) -> float:
        nonlocal agent
        start = time.perf_counter()
        for _ in range(updates if kind == "update" else updates // scanned):
            step = agent.update if kind == "update" else agent.batch_update
            agent, _ = step(batches[kind])
        jax.block_until_ready(agent.network.params)
        return time.perf_counter() - start

    first = {kind: run(kind, scanned) for kind in batches}
    for kind in batches:
        run(kind, scanned)
    about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "first_seconds": first}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        kind, updates = line.split()
        print(run(kind, int(updates)), flush=True)


if __name__ == "__main__":
    main()
