"""Act with ME-AM flow policies in Gymnasium loops and on robots: numpy, gymnasium and onnxruntime, never torch."""

from meam_policy.acting.health import Health
from meam_policy.acting.safety import SafetySettings
from meam_policy.environments.make import make_environment
from meam_policy.environments.registration import register_environments
from meam_policy.errors import (
    ActionError,
    CheckpointError,
    ConfigError,
    DatasetError,
    DeviceError,
    DivergedError,
    ForkError,
    FormatError,
    HubError,
    IntegrityError,
    LockedError,
    MeamError,
    MissingExtraError,
    NotFoundError,
    ObservationError,
    OutputError,
    ParityError,
    SpaceError,
    VersionError,
    WorkerError,
)
from meam_policy.flight.recording import Recording
from meam_policy.folder.push_settings import Pushed
from meam_policy.loop.control_loop import ControlLoop, StampedObservation
from meam_policy.loop.loop_health import LoopHealth
from meam_policy.policy import MeamPolicy
from meam_policy.replay.report import Difference, ReplayReport
from meam_policy.replay.run import replay_flight
from meam_policy.rollouts.episodes import rollout
from meam_policy.rollouts.result import RolloutResult
from meam_policy.spec import FORMAT_VERSION, BoxSpec, EnvironmentSpec, EnvironmentWrapper, PolicySpec

__version__ = "0.1.0"

__all__ = [
    "FORMAT_VERSION",
    "ActionError",
    "BoxSpec",
    "CheckpointError",
    "ConfigError",
    "ControlLoop",
    "DatasetError",
    "DeviceError",
    "Difference",
    "DivergedError",
    "EnvironmentSpec",
    "EnvironmentWrapper",
    "ForkError",
    "FormatError",
    "Health",
    "HubError",
    "IntegrityError",
    "LockedError",
    "LoopHealth",
    "MeamError",
    "MeamPolicy",
    "MissingExtraError",
    "NotFoundError",
    "ObservationError",
    "OutputError",
    "ParityError",
    "PolicySpec",
    "Pushed",
    "Recording",
    "ReplayReport",
    "RolloutResult",
    "SafetySettings",
    "SpaceError",
    "StampedObservation",
    "VersionError",
    "WorkerError",
    "make_environment",
    "register_environments",
    "replay_flight",
    "rollout",
]

register_environments()
