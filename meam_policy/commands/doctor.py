"""`meam doctor`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from meam_policy.commands import parse
from meam_policy.console import print_json, readable
from meam_policy.diagnosis.doctor import Finding, Level, diagnose
from meam_policy.errors import DeviceError
from meam_policy.inference.providers import Device
from meam_policy.terminal_text import printable

__all__ = ["doctor", "run"]

_STYLES: dict[Level, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}


def doctor(device: Device = "cpu", rate_hz: float = 50.0, json: bool = False) -> None:
    """Check whether this machine is fit for acting, and what could be improved.

    Checks versions and wheels, which execution providers really work, cores and limits, memory, clock speed,
    scheduling, the lateness of a control loop's ticks, and environment variables. A note may be worth knowing, and a
    warning costs time or accuracy; only a problem, which keeps policies from acting on the device, makes the command
    exit with 2. Nothing is changed, and no network is used.

    Example: meam doctor --device cuda --rate-hz 100

    Args:
        device: Device on which policies are to run; the others are tried too, but need not work.
        rate_hz: Rate of the control loop, 1 to 10,000.
        json: Print one line of JSON to stdout instead of a table.
    """
    findings = diagnose(device, rate_hz)
    if json:
        print_json({"device": device, "rate_hz": rate_hz, "findings": [vars(finding) for finding in findings]})
    else:
        _print_findings(findings)
    problems = [finding for finding in findings if finding.level == "problem"]
    if problems:
        raise DeviceError(_sentence(problems[0]))


def _print_findings(findings: list[Finding]) -> None:
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        text = readable(finding.seen)
        if finding.remedy:
            text.append(f"\n{printable(finding.remedy)}", style="dim")
        table.add_row(Text(finding.level, style=_STYLES[finding.level]), readable(finding.name), text)
    Console(highlight=False).print(table)


def _sentence(problem: Finding) -> str:
    seen = problem.seen.removesuffix(".")
    return f"{problem.name} keeps policies from acting here: {seen}. {problem.remedy}".rstrip()


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and report."""
    parse(doctor, arguments, prog)
