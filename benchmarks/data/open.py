"""Open a data set twice, each time in a process of its own, and tell how long it took and how much memory.

    python benchmarks/data/open.py DATASET [--env-id ENVIRONMENT]

DATASET is a Minari id or folder, or an OGBench .npz file. The first opening converts the data and writes their cache
(one that is there already is deleted before); the second maps it. Both find the files in the system's file cache.
Peak memory counts the pages of mapped files that were looked at, which the system takes back when it needs them; the
memory of the process's own at the end does not. Linux only.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

BATCHES, BATCH_SIZE, CHUNK_SIZE = 200, 256, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--env-id")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_this_process:
        print(json.dumps(measure(arguments.dataset, arguments.env_id)))
        return
    shutil.rmtree(run_again()["cache"])
    print("| opening | transitions | bytes | seconds | peak memory, MB | own memory at the end, MB | ms a batch |")
    print("|---|---|---|---|---|---|---|")
    for name in ("first", "second"):
        row = run_again()
        print(
            f"| {name} | {row['transitions']:,} | {row['bytes']:,} | {row['seconds']:.3f} | {row['peak']:.0f} "
            f"| {row['own']:.0f} | {row['batch_milliseconds']:.2f} |"
        )


def run_again() -> dict[str, float | str]:
    """What `measure` returns in a new process with the same arguments."""
    command = [sys.executable, *sys.argv, "--in-this-process"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(data: str, environment_id: str | None) -> dict[str, float | str]:
    """Open the data and draw batches from them where they are."""
    import torch

    from meam_training import OfflineDataset, TrainConfig
    from meam_training.learning.chunk_source import HostChunks
    from meam_training.trainer import make_spec

    before, own_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, own_memory()
    start = time.perf_counter()
    npz = data.endswith(".npz")
    dataset = OfflineDataset.from_ogbench(data, environment_id) if npz else OfflineDataset.from_minari(data)
    config = TrainConfig.preset("bc", chunk_size=CHUNK_SIZE)
    chunks = HostChunks(config, dataset, make_spec(config, dataset), torch.device("cpu"))
    opened = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    for _ in range(BATCHES):
        chunks.sample(BATCH_SIZE, generator)
    sampled = time.perf_counter()
    columns = (dataset.observations, dataset.actions, dataset.rewards, dataset.next_observations)
    return {
        "cache": str(Path(dataset.observations.filename).parent),
        "transitions": len(dataset),
        "bytes": sum(column.nbytes for column in columns),
        "seconds": opened - start,
        "peak": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "own": (own_memory() - own_before) / 1024,
        "batch_milliseconds": (sampled - opened) / BATCHES * 1e3,
    }


def own_memory() -> int:
    """Memory of this process that is not a mapped file, in kilobytes."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0])


if __name__ == "__main__":
    main()
