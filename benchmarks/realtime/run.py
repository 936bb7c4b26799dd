"""Naive switching, blocking and real-time chunking at several inference latencies; prints tables and draws them."""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from delay_report import CHUNKINGS, MEASURES, CellFigures, cell_figures, draw_delays, gain_table, markdown_table
from episodes import EpisodeFigures, delayed_episodes

from meam_export import export_policy
from meam_policy import MeamPolicy, make_environment

__all__ = ["main"]


def load_policy(run: Path) -> MeamPolicy:
    """Export a training run; every chunking runs the same graph, and only "realtime" tells it how a chunk begins."""
    with tempfile.TemporaryDirectory() as root:
        return MeamPolicy.from_pretrained(export_policy(run, Path(root) / "policy", variants=("rtc",)), variant="rtc")


def compare(
    policy: MeamPolicy, env_id: str, delays: Sequence[int], episodes: int, seed: int, execute_steps: int
) -> tuple[list[EpisodeFigures], list[CellFigures]]:
    """Run every chunking at every delay that the chunks can bridge; each cell the same episodes."""
    runs, cells = [], []
    with make_environment(env_id) as env:
        policy.check_env(env)
        for delay, chunking in product(delays, CHUNKINGS):
            if chunking != "blocking" and delay >= policy.spec.chunk_size:
                print(f"skipped: {chunking} at delay {delay}, for chunks have {policy.spec.chunk_size} actions")
                continue
            figures = delayed_episodes(
                policy, env, chunking, delay, episodes=episodes, seed=seed, execute_steps=execute_steps
            )
            found = list(figures)
            runs += found
            cells.append(cell_figures(found))
            print(f"{chunking} at delay {delay}: return {cells[-1].means['episode_return'].mean:.4g}", flush=True)
    return runs, cells


def write_csv(rows: Sequence[dict[str, object]], file: Path) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def rounded(run: EpisodeFigures) -> dict[str, object]:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(run).items()}


def flat(cell: CellFigures) -> dict[str, object]:
    row: dict[str, object] = {"chunking": cell.chunking, "delay": cell.delay}
    for name, end in product(MEASURES, ("mean", "low", "high")):
        row[f"{name}_{end}"] = round(getattr(cell.means[name], end), 6) if name in cell.means else ""
    return row | {"waiting": cell.waiting, "overruns": cell.overruns}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, and write `episodes.csv`, `cells.csv` and `delays.png`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a training run of a flow policy")
    parser.add_argument("--env", help="environment; default: that of the run")
    parser.add_argument("--episodes", type=int, default=30, help="episodes in each cell")
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="control steps")
    parser.add_argument("--execute-steps", type=int, help="steps between inferences; default: half a chunk")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first episode")
    parser.add_argument("--output-dir", type=Path, required=True)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    policy = load_policy(given.run)
    env_id = given.env or policy.spec.environment_id
    if given.episodes < 1:
        parser.error(f"--episodes is {given.episodes}; expected 1 or more")
    if env_id is None:
        parser.error("the run does not say which environment it is for; give --env")
    steps = given.execute_steps or max(1, policy.spec.chunk_size // 2)
    runs, cells = compare(policy, env_id, given.delays, given.episodes, given.seed, steps)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    write_csv([rounded(run) for run in runs], given.output_dir / "episodes.csv")
    write_csv([flat(cell) for cell in cells], given.output_dir / "cells.csv")
    title = f"{env_id}: chunks of {policy.spec.chunk_size}, inference every {steps} steps, {given.episodes} episodes"
    draw_delays(cells, title, given.output_dir / "delays.png")
    print(f"{markdown_table(cells)}\n\n{gain_table(runs)}")


if __name__ == "__main__":
    main()
