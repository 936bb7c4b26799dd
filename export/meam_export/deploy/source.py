"""The policy folder that other forms of a policy are made from."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from meam_policy import MeamPolicy, SafetySettings
from meam_policy.atomic_files import write_atomically, write_failure
from meam_policy.errors import ConfigError, OutputError
from meam_policy.folder.policy_folder import locate_policy, read_config, read_contract, read_graph
from meam_policy.inference.session import PolicySession
from meam_policy.robot import RobotContract
from meam_policy.spec import PolicySpec

__all__ = ["Source", "read_source", "require_plain_meaning", "write_file"]


@dataclass(frozen=True)
class Source:
    """A policy folder's graph, and what is known of it.

    Attributes:
        name: The folder's own name, or the repository's.
        spec: The policy's spec, with the variant's integration.
        graph: Contents of the graph's file.
        robot: The robot's contract; None if there is none.
        variant: The variant; None for the policy as trained.
    """

    name: str
    spec: PolicySpec
    graph: bytes
    robot: RobotContract | None
    variant: str | None

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the graph."""
        return hashlib.sha256(self.graph).hexdigest()

    def acting(self) -> MeamPolicy:
        """The policy on this machine, with the contract's limits and without reactions that replace its actions."""
        session = PolicySession(self.graph, self.spec, name=f"The graph of {self.name}")
        return MeamPolicy(self.spec, session, safety=SafetySettings(on_unfamiliar=None), robot=self.robot)

    def contract(self, why: str) -> RobotContract:
        """The robot's contract, which says what every number is.

        Args:
            why: What reads that, for the message.

        Raises:
            ConfigError: there is none, or it leaves observations or actions out.
        """
        if self.robot is None or not self.robot.observation or not self.robot.action:
            raise ConfigError(
                f"{self.name} has no robot.json that says what its observations and actions are, and {why}. Write one "
                "with `meam robot init`, and add it with `meam robot add`."
            )
        return self.robot

    def rate_hz(self, need: str) -> float:
        """Actions per second.

        Raises:
            ConfigError: neither the contract nor the policy says.
        """
        rate = self.spec.control_rate_hz if self.robot is None else self.robot.rate_hz(self.spec)
        if rate is None:
            raise ConfigError(
                f"Nobody says how often {self.name} acts, which {need} needs: set rate_hz of [timing] in robot.toml, "
                "and add it with `meam robot add`."
            )
        return rate


def read_source(
    policy: str | os.PathLike[str], *, revision: str | None = None, subfolder: str | None = None, variant: str | None
) -> Source:
    """Read a policy folder, or one from the Hub, and check the hashes of what is read.

    Args:
        policy: A folder that `meam export` wrote, or a Hub repo id "owner/name".
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder that the policy is in, of a repository or a folder that holds several.
        variant: Another graph of the folder; None for the policy as trained.

    Raises:
        NotFoundError: there is no such policy, or a file is missing.
        FormatError: a file does not have the expected format; IntegrityError if it has another hash.
        ConfigError: there is no such variant.
        HubError: the Hub could not deliver.
    """
    wanted = () if variant is None else (variant,)
    folder = locate_policy(policy, revision=revision, subfolder=subfolder, variants=wanted)
    recorded = read_config(folder).spec
    spec, file = recorded.select(variant)
    name = os.path.basename(os.path.abspath(os.path.expanduser(policy)))
    return Source(name, spec, read_graph(folder, recorded, file), read_contract(folder, recorded), variant)


def require_plain_meaning(robot: RobotContract, stack: str) -> None:
    """Refuse what a stack has no word for, and would take for something else.

    Raises:
        ConfigError: an action is a change rather than a target, or a number is in degrees, or a quaternion whose real
            part comes first.
    """
    for number in robot.action:
        if number.representation != "absolute":
            raise ConfigError(
                f"{number.name} is {number.representation} in robot.json; expected absolute: {stack} has no word for a "
                "change, and would send it as a target. Act with MeamPolicy, or train on absolute actions."
            )
    for number in (*robot.observation, *robot.action):
        if number.unit.startswith("deg") or number.unit == "quaternion_wxyz":
            raise ConfigError(
                f"{number.name} is in {number.unit} in robot.json; expected radians, or quaternion_xyzw: {stack} has "
                "no field for units, and takes them for granted."
            )


def write_file(path: Path, data: bytes) -> None:
    """Write a graph, whole or not at all, making the folders it lies in.

    Raises:
        OutputError: it cannot be written, or there is a file of that name, such as the policy's own graph.
    """
    if path.exists():
        raise OutputError(f"{path} exists already. Choose another file, or delete it first.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {write_failure(error, path.parent, len(data))}.") from error
