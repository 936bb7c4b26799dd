"""The demo's report, and the page about its runs: self-contained HTML files."""

from __future__ import annotations

import platform
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from meam_export.demo.figures import (
    NEIGHBOURS,
    SAMPLES,
    draw_actions,
    draw_curves,
    draw_rollouts,
    episode_paths,
    first_actions,
    rewarding_directions,
)
from meam_export.demo.run import DemoResult
from meam_export.report.drawing import data_url
from meam_export.report.film import render_film
from meam_export.report.gathering import ReportOptions
from meam_export.report.labels import NAMES, setting_text, shared_settings
from meam_export.report.page import write_report as write_run_report
from meam_policy.errors import OutputError
from meam_policy.extras import needs
from meam_training.collection.dataset_folder import default_dataset_id

__all__ = ["write_report", "write_runs"]

_PACKAGES = ("meam-policy", "torch", "onnxruntime", "mujoco", "gymnasium", "ogbench", "minari")


def write_report(result: DemoResult, output: Path, *, video: bool) -> Path:
    """Draw the figures and write the report.

    Args:
        result: The demo's result.
        output: HTML file to write.
        video: Whether to render a rollout; if the machine cannot, the report gives the reason instead.

    Returns:
        The file written.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
        OutputError: the file cannot be written.
    """
    with needs("The report", "jinja2", "export"):
        import jinja2
    env_id, state = result.task.environment_id, result.task.state
    actions, rewarding = first_actions(result, state), rewarding_directions(env_id, state)
    config = result.checkpoints["me-am"].config
    prior = f"{NAMES['me-am']}'s {'mixture ' if config.mixture_weight else ''}prior"
    clip, no_clip = None, "No video was requested."
    if video:
        clip = output.with_name("rollout.webp")
        no_clip = render_film(result.policy, clip, result.seed)
    template = jinja2.Template(
        (files("meam_export") / "demo" / "report.html").read_text(encoding="utf-8"), autoescape=True
    )
    html = template.render(
        result=result,
        env_id=env_id,
        command=_command(result),
        methods=[NAMES[method] for method in result.checkpoints],
        settings=_settings(result),
        shown=NAMES["me-am"],
        prior=prior,
        neighbours=min(NEIGHBOURS, len(actions["data"])),
        samples=SAMPLES,
        ranked=len(rewarding) > 1,
        episodes={name: len(paths) for name, paths in episode_paths(result).items()},
        state=", ".join(f"{number:g}" for number in state),
        chunk_size=result.checkpoints["me-am"].spec.chunk_size,
        curves=data_url(draw_curves(result), "png"),
        actions=data_url(draw_actions(actions, rewarding, {**result.labels, "prior": prior}), "png"),
        rollouts=data_url(draw_rollouts(result), "png"),
        video=None if no_clip or clip is None else data_url(clip.read_bytes(), "webp"),
        no_video=no_clip,
        versions=", ".join(f"{name} {version(name)}" for name in _PACKAGES),
        machine=f"{platform.machine()}, Python {platform.python_version()}",
    )
    try:
        output.write_text(html, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"The report {output} cannot be written: {error.strerror}.") from error
    return output


def write_runs(result: DemoResult, output: Path) -> Path:
    """Write the page about the demo's runs that `meam report` writes, with the returns of the demo's episodes.

    Args:
        result: The demo's result.
        output: HTML file to write.

    Returns:
        The file written.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
        OutputError: the file cannot be written.
    """
    policies = {method: result.policy.parent / method for method in result.checkpoints}
    runs = [checkpoint.path.parent.parent for checkpoint in result.checkpoints.values()]
    data = result.policy.parents[1] / "data" / default_dataset_id(result.task.environment_id)
    options = ReportOptions(data=(str(data),), compare=len(runs) > 1)
    returns = {policies[method]: acted.returns for method, acted in result.rollouts.items()}
    return write_run_report([*runs, *policies.values()], output, options, returns=returns).path


def _command(result: DemoResult) -> str:
    """The command that repeats the demo."""
    episodes = "" if result.episodes == result.task.episodes else f" --episodes {result.episodes}"
    return f"meam demo --task {result.task.name} --seed {result.seed}{episodes}"


def _settings(result: DemoResult) -> dict[str, str]:
    """The settings that differ from the presets: those shared by all methods, then those of each method."""
    configs = {method: checkpoint.config for method, checkpoint in result.checkpoints.items()}
    shared = shared_settings(configs)
    own = {
        NAMES[method]: {name: value for name, value in config.own_settings.items() if name not in shared}
        for method, config in configs.items()
    }
    return {name: setting_text(given) for name, given in {"all methods": shared, **own}.items() if given}
