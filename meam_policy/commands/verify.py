"""`meam verify`."""

from __future__ import annotations

from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from meam_policy.commands import parse
from meam_policy.console import print_json, print_lines, readable, say
from meam_policy.diagnosis.confinement import Confined, run_confined
from meam_policy.diagnosis.verify import TOLERANCE, verify_policy
from meam_policy.diagnosis.verify_report import GraphReport, VerifyReport
from meam_policy.errors import ConfigError, FormatError
from meam_policy.folder.policy_folder import locate_policy
from meam_policy.inference.providers import Device

__all__ = ["run", "verify"]


def verify(
    policy: Annotated[str, tyro.conf.Positional],
    revision: str | None = None,
    subfolder: str | None = None,
    device: Device = "cpu",
    variant: str | None = None,
    threads: int = 1,
    tolerance: float = TOLERANCE,
    json: bool = False,
    untrusted: bool = False,
    memory_gb: float = 2.0,
    cpu_seconds: int = 60,
) -> None:
    """Check that a policy is intact, and that it acts on this machine as it did on the one that exported it.

    Every file must have the hash that config.json records, and every graph must pass the structural check. Then the
    inputs of golden.safetensors are run, in one batch and one by one, each twice. The policy as trained must return the
    golden actions; variants that act differently on purpose must return finite actions within the bounds, and the same
    ones every time. A graph that fails, or cannot be loaded here, does not keep the others from being checked. Exits
    with 0 if all is well, otherwise with 2 and one sentence on the first fault.

    A folder without golden.safetensors is checked with random inputs, and fails, since its actions could not be
    compared. Other missing files are only listed.

    Differences are shares of the action's half width: "largest" and "rms" from the golden actions, "batch" the largest
    between a batch and single inputs, "again" between two runs of the same input. Times are the median and the 99th
    percentile of calls for one observation, with pauses between them.

    With --untrusted all of that, the loading of the graphs and their first inference included, is done in a process of
    its own with limits of memory and CPU time. It is ended after a minute and four times its CPU time, 300 s by
    default, and with this process. What it runs into is named, and nothing is loaded here. Limits are no sandbox. Only
    on Linux, and on the CPU.

    Example: meam verify policies/pockets --device cuda
    Example: meam verify owner/arm --untrusted

    Args:
        policy: Policy folder, or Hub repo id owner/name.
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder of the repository that the policy is in.
        device: Where to run the network; "cuda" and "tensorrt" fail rather than fall back.
        variant: Check only this graph; by default the policy as trained and all variants.
        threads: Threads per inference.
        tolerance: Largest accepted difference from the golden actions.
        json: Print one line of JSON to stdout instead of tables.
        untrusted: Verify in a process with limits, for a policy of unknown origin.
        memory_gb: With --untrusted: memory that it may allocate beyond its libraries, GB.
        cpu_seconds: With --untrusted: CPU time that it may take, seconds; it may last four times that, and a minute.
    """
    if untrusted:
        if device != "cpu":
            raise ConfigError(f"--untrusted verifies on the CPU, and --device is {device}. Leave --device out.")
        variants = None if variant is None else (variant,)
        folder = locate_policy(policy, revision=revision, subfolder=subfolder, variants=variants)
        options = ["--threads", str(threads), "--tolerance", str(tolerance)]
        options += ([] if variant is None else ["--variant", variant]) + (["--json"] if json else [])
        _relay(run_confined(options, folder, memory_gb, cpu_seconds))
        return
    report = verify_policy(
        policy,
        revision=revision,
        subfolder=subfolder,
        device=device,
        variant=variant,
        threads=threads,
        tolerance=tolerance,
        strict=False,
    )
    if json:
        print_json({"policy": policy, "device": device, "threads": threads, **_plain(report)})
    else:
        _print_report(policy, report)
    report.check()


def _relay(confined: Confined) -> None:
    """Print what a confined process printed; raise what it refused."""
    print_lines(*confined.output.splitlines())
    if confined.code:
        raise FormatError(confined.complaint.strip().splitlines()[-1] if confined.complaint.strip() else "It failed.")
    say(*confined.complaint.splitlines())


def _plain(report: VerifyReport) -> dict[str, Any]:
    return {
        "passed": report.failure is None,
        "files": list(report.files),
        "missing": list(report.missing),
        "inputs": report.inputs,
        "tolerance": report.tolerance,
        "acting": report.acting,
        "graphs": [_plain_graph(graph) for graph in report.graphs],
    }


def _plain_graph(graph: GraphReport) -> dict[str, Any]:
    made, failure = graph.structure, graph.failure
    structure = made and {**vars(made), "metadata": dict(made.metadata), "operators": dict(made.operators)}
    return {
        **vars(graph),
        "structure": structure,
        "failure": None if failure is None else {"error": type(failure).__name__, "message": str(failure)},
    }


def _print_report(policy: str, report: VerifyReport) -> None:
    _print_table(
        f"{policy}: {_counted(len(report.files))} of config.json",
        ["graph", "IR", "opset", "nodes", "weights", "operators"],
        [_structure(graph) for graph in report.graphs],
        left=("graph", "operators"),
    )
    print_lines("")
    _print_table(
        f"{report.inputs} {'drawn' if report.uncompared else 'golden'} inputs: differences, at most "
        f"{report.tolerance:g}, and times in ms",
        ["graph", "on", "largest", "rms", "batch", "again", "p50", "p99", ""],
        [_figures(graph) for graph in report.graphs],
        left=("graph", "on", ""),
    )
    print_lines(f"acts by: {report.acting}")
    if report.missing:
        print_lines(f"missing: {', '.join(report.missing)}")
    for graph in report.graphs:
        if graph.provider is None:
            print_lines(f"{graph.file} was not run: {graph.failure}")
        if graph.near_ties:
            print_lines(
                f"{graph.file}: {graph.near_ties} inputs left out; their best two chunks are worth nearly the same."
            )
    if not report.uncompared and not all(graph.compared for graph in report.graphs if graph.provider):
        print_lines("* acts differently on purpose: so it may differ from the golden actions")


def _counted(files: int) -> str:
    return "1 file has the hash" if files == 1 else f"{files} files have the hashes"


def _structure(graph: GraphReport) -> list[str]:
    made = graph.structure
    if made is None:
        return [graph.variant or "policy", *["-"] * 5]
    counts = (made.ir_version, made.opset, made.nodes)
    operators = ", ".join(f"{name} {count}" for name, count in made.operators.items())
    return [graph.variant or "policy", *map(str, counts), _size(made.weight_bytes), operators]


def _figures(graph: GraphReport) -> list[str]:
    if graph.provider is None:
        return [graph.variant or "policy", *["-"] * 7, "FAILS"]
    differences = (graph.max_difference, graph.rms_difference, graph.batch_difference, graph.repeat_difference)
    shown = ["-" if value is None else f"{value:.1g}" for value in differences]
    verdict = "FAILS" if graph.failure else "ok" if graph.compared else "ok *"
    provider = graph.provider.removesuffix("ExecutionProvider")
    times = [f"{ms:.3g}" for ms in (graph.p50_ms, graph.p99_ms) if ms is not None]
    return [graph.variant or "policy", provider, *shown, *times, verdict]


def _print_table(title: str, columns: list[str], rows: list[list[str]], left: tuple[str, ...]) -> None:
    table = Table(title=readable(title), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(readable, row))
    Console(highlight=False).print(table)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and verify."""
    parse(verify, arguments, prog)
