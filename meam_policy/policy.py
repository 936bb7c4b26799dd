"""`MeamPolicy`: a policy folder, ready to act."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from meam_policy.acting.arguments import checked_noise, checked_prefix, checked_seeds, checked_starts
from meam_policy.acting.arrays import array_of, is_real
from meam_policy.acting.chunk_execution import ChunkExecution
from meam_policy.acting.health import Health, note_values
from meam_policy.acting.observation import ObservationReader, lost_digits
from meam_policy.acting.rehearsal import rehearse
from meam_policy.acting.safety import SafetySettings, SafetyShell, require_finite_chunks
from meam_policy.atomic_files import given_folder
from meam_policy.environments.space_check import check_env
from meam_policy.errors import ActionError, ConfigError, IntegrityError, ObservationError
from meam_policy.folder.policy_folder import (
    CONFIG_FILE,
    check_output_folder,
    find_policy,
    locate_policy,
    read_config,
    read_contract,
    read_graph,
    read_policy_files,
    sha256,
    write_policy_files,
)
from meam_policy.folder.push_settings import MESSAGE, Pushed, PushSettings
from meam_policy.given_files import given_path
from meam_policy.inference.latency import load_within
from meam_policy.inference.process import require_process
from meam_policy.inference.providers import Device
from meam_policy.inference.session import PolicySession, Session
from meam_policy.robot import RobotContract
from meam_policy.spec import MAX_STEPS, ActingRule, PolicySpec, checked_noise_scale
from meam_policy.typed import as_annotated, typed

__all__ = ["MeamPolicy"]


class MeamPolicy:
    """A flow policy that maps observations to chunks of actions through onnxruntime.

    Make one with `MeamPolicy.from_pretrained`. The object keeps a queue of actions for every environment slot, so one
    object serves one loop at a time: call `reset()` when an episode starts. Threads may share it, and wait for each
    other. In a process forked after loading it refuses to work (`ForkError`): pickle it, or start processes by spawn. A
    pickle holds only where the policy was loaded from, and loads it again.

    Every chunk starts from noise that the policy draws, scaled as `spec.acting` says: the graph itself takes any noise.

    Args:
        spec: The policy's spec.
        session: Runs its graph.
        seed: Seed of the noise; None draws one.
        variant: Name of the graph in `spec.variants`.
        safety: Checks and limits; None takes the defaults.
        robot: The robot's contract, whose limits and reactions hold; None if there is none.
        origin: Arguments of `from_pretrained` that load the same policy again, and the SHA-256 of its config.json as
            `identity`; without them it cannot be pickled, saved or pushed.

    Attributes:
        spec: The policy's spec, with the integration of the variant in use.
        variant: Name of that variant; None for the policy as trained.
        session: Runs its graph, without any checks.
        safety: Its checks and limits.
        last_noise: The noise that the newest run of the network to act started from [slots, noise_dim]; None before
            the first.
        robot: What its numbers are on its robot, from the folder's `robot.json`; None if there is none.

    Raises:
        ConfigError: the seed is negative, or the safety settings do not fit the policy.

    Example:
        >>> policy = MeamPolicy.from_pretrained("path/to/policy")  # doctest: +SKIP
        >>> action = policy.act(observation)  # doctest: +SKIP
    """

    @typed()
    def __init__(
        self,
        spec: PolicySpec,
        session: Session,
        seed: int | None = None,
        variant: str | None = None,
        *,
        safety: SafetySettings | None = None,
        robot: RobotContract | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.spec, self.variant, self.session, self.robot = spec, variant, session, robot
        self._action_shape, self._noise_dim = spec.action.shape, spec.noise_dim
        self._flat = len(self._action_shape) == 1
        self._health = Health()
        self.safety = safety or SafetySettings()
        self.last_noise: NDArray[np.float32] | None = None
        self._shell = SafetyShell(spec, self.safety, self._health, robot)
        self._origin = origin
        self._watches_digits = any(spec.observation_offset)
        self._process, self._lock = os.getpid(), threading.RLock()
        self._execution = ChunkExecution(spec, self._shell)
        self._reader = ObservationReader(spec)
        self.reset(seed=seed)

    @classmethod
    @typed("path_or_repo_id", "noise_scale")
    def from_pretrained(
        cls,
        path_or_repo_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        variant: str | None = None,
        latency_budget_ms: float | None = None,
        device: Device = "cpu",
        threads: int = 1,
        fixed_batch: int | None = None,
        tf32: bool = False,
        best_of: int | None = None,
        noise_scale: float | None = None,
        safety: SafetySettings | None = None,
        seed: int | None = None,
    ) -> MeamPolicy:
        """Load a policy from a folder or from the Hugging Face Hub. Nothing in it is executed but its ONNX graph.

        Args:
            path_or_repo_id: A folder that `meam export` wrote, or a Hub repo id "owner/name".
            revision: Branch, tag or commit on the Hub; a full commit hash needs no network once it is cached.
            subfolder: Folder that the policy is in, of a repository or a folder that holds several.
            token: Hub token; None uses the one stored by `hf auth login`.
            cache_dir: Hub cache folder; None is the Hub's default.
            local_files_only: Use only what is in the cache.
            force_download: Download again.
            variant: Another graph of the folder, by its name in `spec.variants`; None for the policy as trained.
            latency_budget_ms: Take the graph closest to the policy as trained that answers within this time here, for
                one observation: each is timed now, with pauses as in a control loop. Not together with `variant`.
            device: "cpu"; "cuda" or "tensorrt", which fail rather than fall back to the CPU; or "auto", CUDA where it
                works.
            threads: Threads per inference.
            fixed_batch: Prepare the graph for exactly this batch size; on CUDA that captures it as a CUDA graph. Other
                sizes are padded or split.
            tf32: Let CUDA round the inputs of float32 products to TF32, which costs accuracy.
            best_of: Samples per decision, if the graph returns the chunk with the highest value (best-of-N); None takes
                the folder's number.
            noise_scale: How it acts, in place of the rule that the folder records: 1 samples, 0 starts every chunk from
                zero noise, and a number between scales the noise. None follows the rule.
            safety: Checks and limits, and what to do where they are broken; None takes the defaults.
            seed: Seed of the noise; None draws one.

        Raises:
            NotFoundError: the folder or one of its files does not exist, or the name is empty.
            HubError: the Hub could not deliver; see its `kind`.
            FormatError: a file does not have the expected format; IntegrityError and VersionError are among them.
            DeviceError: the device is not usable here, or no graph answers within the budget.
            ConfigError: an argument has another type or is out of range, or variant or safety settings do not fit.
            MissingExtraError: onnxruntime is not installed.
        """
        if variant is not None and latency_budget_ms is not None:
            raise ConfigError(
                f'Both variant="{variant}" and latency_budget_ms are given; expected at most one of them.'
            )
        find = partial(
            find_policy,
            path_or_repo_id,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        wanted = () if variant is None else (variant,)
        folder, commit = find(revision=revision, variants=wanted, force_download=force_download)
        config = read_config(folder)
        recorded, robot = config.spec, read_contract(folder, config.spec)
        options = {"device": device, "threads": threads, "fixed_batch": fixed_batch, "tf32": tf32}
        cache = None if cache_dir is None else os.path.abspath(given_path("cache_dir", cache_dir))
        acting = {"best_of": best_of, "noise_scale": noise_scale}
        origin = {**options, **acting, "safety": safety, "seed": seed, "cache_dir": cache}
        if commit is None:
            origin["path_or_repo_id"] = str(folder.absolute())
        else:  # the very commit, whatever the branch does meanwhile
            origin |= {"path_or_repo_id": path_or_repo_id, "revision": commit, "subfolder": subfolder}

        def load(name: str | None) -> MeamPolicy:
            if name is not None and latency_budget_ms is not None and commit is not None:
                # Only now: an earlier one may keep within the budget.
                find(revision=commit, variants=(name,), force_download=force_download)
            spec, file = recorded.select(name)
            spec = _drawing(spec, **acting)
            graph, identity = read_graph(folder, recorded, file), config.graph_identity(name)
            declared = config.declared(name)
            session = PolicySession(graph, spec, name=file, identity=identity, declared=declared, **options)
            rehearse(spec, lambda rows, noise: session.run_all(rows, noise)["actions"])
            loaded_from = {**origin, "variant": name, "identity": config.sha256}
            return cls(spec, session, seed, name, safety=safety, robot=robot, origin=loaded_from)

        if latency_budget_ms is None:
            return load(variant)
        return load_within(latency_budget_ms, recorded, load)

    def __repr__(self) -> str:
        """One line: where the policy is from, and what it takes and gives."""
        origin = [repr(self._origin["path_or_repo_id"])] if self._origin else []
        network = f"method={self.spec.method!r}, variant={self.variant!r}, provider={self.provider!r}"
        boxes = {box.key: box.shape for box in self.spec.observation}
        spaces = f"observation={boxes.get(None, boxes)}, action={self._action_shape}, chunk={self.spec.chunk_size}"
        return f"MeamPolicy({', '.join([*origin, network, spaces])})"

    @property
    def provider(self) -> str:
        """The onnxruntime execution provider in use, such as "CPUExecutionProvider"."""
        return self.session.provider

    @property
    def config_sha256(self) -> str | None:
        """SHA-256 (hex) of the `config.json` that it was loaded from; None if it was not loaded from a folder."""
        return None if self._origin is None else self._origin.get("identity")

    @property
    def inferences(self) -> int:
        """How often the network has been run to act (not by `sample`) since the policy was loaded."""
        return self._health.inferences

    def health(self) -> Health:
        """Counters of what happened since the policy was loaded; a copy, readable at any time."""
        return replace(self._health)

    def check_env(self, env: gymnasium.Env[Any, Any] | gymnasium.vector.VectorEnv[Any, Any, Any]) -> None:
        """Check that an environment, or a vector environment, fits the policy; see `space_check.check_env`.

        Raises:
            SpaceError: spaces, keys, bounds, rate or chunk do not fit; the message names the first that does not.
        """
        check_env(self.spec, env, None if self.robot is None else self.robot.rate_hz(self.spec))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by reference: where the policy was loaded from, its commit, and the options; never weights or a token.

        The copy begins like a policy that was just loaded: nothing queued, and the seed given then.
        """
        if self._origin is None:
            raise ConfigError(
                "The policy was not made by from_pretrained, and a pickle holds only where a policy was loaded from. "
                "Load it with MeamPolicy.from_pretrained, in the other process or before pickling."
            )
        return _load_again, (dict(self._origin),)

    @typed("folder")
    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the policy folder that this policy was loaded from, with all its variants, to another place.

        Args:
            folder: Folder to write; must be empty or not exist.

        Returns:
            The folder.

        Raises:
            OutputError: the folder is not empty, or cannot be written.
            ConfigError: the policy was not made by `from_pretrained`, or the path is empty, or none that a file system
                can hold.
            FormatError: the model card is not UTF-8 text, or a file is a link.
            IntegrityError: what it was loaded from is another export now, or damaged.
            NotFoundError: a file of it is missing.
            HubError: the Hub could not deliver the rest of it.
        """
        self._require_origin()
        to = given_folder("folder", folder)
        check_output_folder(to)
        write_policy_files(to, self._read_files())
        return to

    @typed()
    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        tag: str | None = None,
        private: bool | None = None,
        commit_message: str = MESSAGE,
        parent_commit: str | None = None,
        token: str | bool | None = None,
        dry_run: bool = False,
    ) -> Pushed:
        """Publish the policy folder that this policy was loaded from on the Hugging Face Hub, as one commit.

        The files that make up the policy are uploaded, with all its variants and its model card, and nothing else that
        lies in the folder. The repository and the branch are created if there are none. Files of an earlier policy with
        other names stay. Pushing again is safe: a branch that has these very files is left as it is, and a commit whose
        answer was lost is found and reported.

        Args:
            repo_id: "owner/name".
            subfolder: Folder of the repository to put the policy in, for several in one; None is its root.
            branch: Branch to commit to; None is main.
            create_pr: Propose the commit in a pull request for the branch.
            tag: New tag to put on the commit, such as "v1"; `from_pretrained(revision=)` takes it.
            private: Whether a repository that is created is private; None is the Hub's default, which is public.
            commit_message: First line of the commit.
            parent_commit: Commit that the branch must be at; None takes whichever it is at when the push begins.
            token: Hub token that may write; None uses the one stored by `hf auth login`.
            dry_run: Check everything, and write nothing.

        Returns:
            What was pushed, and as which commit.

        Raises:
            ConfigError: an argument is wrong, the policy was not made by `from_pretrained`, or `private` is not what an
                existing repository is.
            FormatError: the model card is not UTF-8 text, its metadata are not valid, or a file is a link. Nothing was
                uploaded.
            IntegrityError: what it was loaded from is another export now, or damaged.
            NotFoundError: a file of it is missing.
            HubError: the Hub did not take it: `kind` "access" before any upload if the token may not write, "conflict"
                if somebody committed meanwhile or the tag is taken.
        """
        settings = PushSettings(
            subfolder=subfolder,
            branch=branch,
            create_pr=create_pr,
            tag=tag,
            private=private,
            commit_message=commit_message,
            parent_commit=parent_commit,
            dry_run=dry_run,
        )
        self._require_origin()
        from meam_policy.folder.publish import check_push, push_files

        secret = check_push(repo_id, settings, token)
        return push_files(self._read_files(token), repo_id, settings, secret)

    def _read_files(self, token: str | bool | None = None) -> dict[str, bytes]:
        """The files of the whole folder that this policy was loaded from."""
        origin = self._require_origin()
        where = {name: origin.get(name) for name in ("revision", "subfolder", "cache_dir")}
        policy: str = origin["path_or_repo_id"]
        files = read_policy_files(locate_policy(policy, **where, token=token, variants=None, complete=True))
        _require_same(origin, sha256(files[CONFIG_FILE]))
        return files

    def _require_origin(self) -> Mapping[str, Any]:
        if self._origin is None:
            raise ConfigError(
                "The policy was not made by from_pretrained, so there is no folder to save or push. "
                "Load it with MeamPolicy.from_pretrained."
            )
        return self._origin

    def reset(self, seed: int | Sequence[int] | None = None, mask: NDArray[np.bool_] | None = None) -> None:
        """Start a new episode: drop queued actions, and forget the last ones.

        Args:
            seed: Seed of the noise from here on, 0 or more; a sequence has one for each slot, which then draws what a
                policy for that slot alone would draw. None leaves the noise going as it is.
            mask: Slots [slots] whose episode begins; the others keep their queued actions and their noise. None begins
                them all.

        Raises:
            ConfigError: a seed is no whole number of 0 or more, there is not one mask, or seed, for each slot, or there
                are more than 65,536 of them.
        """
        seeds = checked_seeds(seed)
        with self._turn:
            self._execution.reset(seeds, mask)

    def act(self, observation: Any, *, deterministic: bool | None = None) -> NDArray[Any]:
        """Choose the next action; runs the network only when the current chunk is used up.

        Args:
            observation: One observation, or a batch with one row an environment slot; see `spec.observation_space`.
            deterministic: True starts every new chunk from zero noise, False samples. None follows the policy's rule,
                `spec.acting`, in which `from_pretrained(noise_scale=)` puts another scale.

        Returns:
            The action, shaped and typed like `spec.action_space`, in its units and within its bounds; with a leading
            batch axis if the observation has one. Always a fresh array.

        Raises:
            ObservationError: the observation does not fit, is not finite, or has another batch size than before.
            ActionError: the network produced NaN or infinity.
            ForkError: the policy was loaded before a fork.
            ConfigError: `deterministic` is none of these.

        `SafetySettings` may put a hold or a neutral action in place of the first two.
        """
        return self._act(observation, None, self._noise_scale(deterministic))

    def select_action(self, observation: Any, noise: ArrayLike | None = None) -> NDArray[Any]:
        """Choose the next action, in LeRobot's words: `act`, with noise for the chunks that begin now.

        Args:
            observation: One observation, or a batch of them.
            noise: Noise [(batch,) spec.noise_dim], taken as it is; None draws it, scaled by the policy's rule.

        Raises:
            ObservationError: as `act`; or the noise does not fit.
            ActionError: as `act`.
            ForkError: as `act`.
        """
        return self._act(observation, noise, self._noise_scale(None))

    @property
    def takes_prefix(self) -> bool:
        """Whether `predict_action_chunk` takes a prefix: the graph is one for real-time chunking, a variant `rtc`."""
        return self.session.takes_prefix

    def predict_action_chunk(
        self,
        observation: Any,
        *,
        noise: ArrayLike | None = None,
        deterministic: bool | None = None,
        prefix: ArrayLike | None = None,
        prefix_weight: ArrayLike | None = None,
    ) -> NDArray[np.float32]:
        """Predict the whole chunks that `act` would execute, in LeRobot's words, without touching the action queues.

        Args:
            observation: One observation, or a batch of them.
            noise: Noise [(batch,) spec.noise_dim], taken as it is; None draws it.
            deterministic: Of the drawn noise, as in `act`.
            prefix: Actions that the new chunk must continue [(batch,) chunk_size, action_dim], environment units;
                element 0 is for this very observation.
            prefix_weight: How strongly it must equal each of them [(batch,) chunk_size], 0 (not at all) to 1.

        Raises:
            ConfigError: the graph takes no prefix, or `deterministic` is not as in `act`.
            ObservationError: an array does not fit, or is not finite.
            ActionError: the network produced NaN or infinity.
            ForkError: the policy was loaded before a fork.
        """
        rows, batched = self._rows(observation)
        given = None
        if prefix is not None or prefix_weight is not None:
            if not self.takes_prefix:
                raise ConfigError("The graph takes no prefix. Export the variant rtc, and load it by variant=.")
            given = checked_prefix(self.spec, prefix, prefix_weight, len(rows), batched)
        with self._turn:
            if noise is None:
                draws = self._execution.noise.draw_rows(len(rows), self._noise_scale(deterministic))
            else:
                draws = checked_noise(self.spec, noise, len(rows), batched)
        # Not in turn: a control loop goes on meanwhile.
        return self._finished(self._infer(rows, draws, given), batched)

    def _act(
        self,
        observation: Any,
        noise: ArrayLike | None = None,
        noise_scale: float = 1.0,
        episode_start: ArrayLike | None = None,
    ) -> NDArray[Any]:
        rows, batched = self._rows(observation, finite=False)
        draws = None if noise is None else checked_noise(self.spec, noise, len(rows), batched)
        start = None if episode_start is None else checked_starts(episode_start, len(rows))
        require_process(self._process)  # as in `_turn`
        with self._lock:
            actions = self._execution.act(rows, self._infer, draws, noise_scale, start, observation)
        if self._flat:
            return actions if batched else actions[0]
        actions = actions.reshape(len(rows), *self._action_shape)
        return actions if batched else actions[0, ...]  # an array even for a scalar action

    def limit_action(self, action: ArrayLike) -> NDArray[Any]:
        """Bring one action within the bounds, and within the rate limit of the one before; for a control loop.

        Does not wait for an inference that another thread has begun.

        Args:
            action: Shaped like `spec.action_space`.

        Returns:
            The action to execute, a fresh array.

        Raises:
            ActionError: it has another shape, or is not finite.
            ForkError: the policy was loaded before a fork.
        """
        require_process(self._process)
        if type(action) is np.ndarray and is_real(action):
            given = action
        else:
            given = array_of(action, "The action", f"finite numbers of shape {self._action_shape}", ActionError)
        fits = is_real(given) and given.shape == self._action_shape
        if not fits or np.count_nonzero(np.isfinite(given)) < given.size:
            raise ActionError(f"The action is {given}; expected finite numbers of shape {self._action_shape}.")
        return self._shell.limit(given.reshape(1, -1)).reshape(self._action_shape)

    def preview_actions(self, actions: ArrayLike) -> NDArray[Any]:
        """What `limit_action` would make of actions to come, one after the other; nothing is remembered or counted.

        Args:
            actions: Actions [ticks, *spec.action_space.shape].

        Returns:
            Actions of the same shape, as they would be executed.

        Raises:
            ActionError: they have another shape, or are not finite.
            ForkError: the policy was loaded before a fork.
        """
        require_process(self._process)
        given = array_of(actions, "The actions", f"finite numbers [ticks, *{self._action_shape}]", ActionError)
        if not is_real(given) or given.shape[1:] != self._action_shape or not np.isfinite(given).all():
            raise ActionError(f"The actions are {given.shape}; expected finite numbers [ticks, *{self._action_shape}].")
        return self._shell.preview(given.reshape(-1, self.spec.action_dim)).reshape(given.shape)

    def accepts(self, observation: Any) -> bool:
        """Judge one observation as `act` does, and count it; for a control loop.

        Does not wait for an inference that another thread has begun.

        Returns:
            Whether it may be acted on: false where `SafetySettings` have an action held or neutral instead.

        Raises:
            ObservationError: it does not fit, or the reaction is to raise.
        """
        rows, _ = self._rows(observation, finite=False)
        return not self._shell.judge(rows, observation)

    def sample(self, observation: Any, noise: ArrayLike | None = None, seed: int | None = None) -> NDArray[np.float32]:
        """Sample action chunks, without touching the action queues; they are samples whatever the policy's rule.

        Args:
            observation: One observation, or a batch of them.
            noise: Standard normal draws [(batch,) spec.noise_dim]; None draws them.
            seed: Seed of the drawn noise; None continues this policy's own stream. Not together with `noise`.

        Returns:
            Chunks [(batch,) chunk_size, action_dim] in environment units, within the action bounds.

        Raises:
            ObservationError: the observation or the noise does not fit, or is not finite.
            ActionError: the network produced NaN or infinity.
            ForkError: the policy was loaded before a fork.

        What `SafetySettings` puts in place of an error concerns actions, not chunks.
        """
        rows, batched = self._rows(observation)
        if seed is not None:
            checked_seeds([seed])
        if noise is not None and seed is not None:
            raise ObservationError("Both noise and seed are given; expected at most one of them.")
        with self._turn:
            if noise is not None:
                draws = checked_noise(self.spec, noise, len(rows), batched)
            elif seed is not None:
                draws = np.random.default_rng(seed).standard_normal((len(rows), self._noise_dim), np.float32)
            else:
                draws = self._execution.noise.draw_rows(len(rows))
        return self._finished(self.session.run_all(rows, draws)["actions"], batched)

    def _finished(self, chunks: NDArray[np.float32], batched: bool) -> NDArray[np.float32]:
        chunks, finite = self._shell.bound_chunks(chunks)
        if not finite:
            require_finite_chunks(chunks)
        return chunks if batched else chunks[0]

    @typed()
    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool | None = None,
    ) -> tuple[NDArray[Any], None]:
        """Choose the next action, in stable-baselines3's convention; its `evaluate_policy` accepts this object.

        That function asks for `deterministic=True` unless told otherwise, for policies whose deterministic actions are
        the better ones. A flow policy from zero noise is another policy, and may be a far worse one. So True means here
        "as the policy acts": by its rule, `spec.acting`, with a warning unless that is zero noise.

        Args:
            observation: One observation, or a batch of them.
            state: Ignored; the action queues are kept inside.
            episode_start: Mask [batch] of the slots whose episode has just begun: what they had queued is dropped.
            deterministic: None or True follows the policy's rule; False samples. For zero noise load the policy with
                `noise_scale=0`, or call `act(deterministic=True)`.

        Returns:
            The action(s), as from `act`, and None.

        Raises:
            ObservationError: as `act`; and `episode_start` has another length than the batch.
            ConfigError: an argument has another type.
        """
        scale = self._noise_scale(None if deterministic else deterministic)
        if deterministic and scale:
            warnings.warn(
                f'predict(deterministic=True) acts by the policy\'s rule, "{self.spec.acting_name}", which draws '
                "noise: True is stable-baselines3's default, and zero noise is another policy. Pass "
                "deterministic=False to sample, or load the policy with noise_scale=0 for zero noise.",
                RuntimeWarning,
                stacklevel=3,
            )
        return self._act(observation, noise_scale=scale, episode_start=episode_start), None

    def _rows(self, observation: Any, *, finite: bool = True) -> tuple[NDArray[np.float32], bool]:
        """Flatten observations, and warn once of digits that they lost before they came."""
        rows, batched = self._reader.read(observation, finite=finite)
        if self._watches_digits and (lost := lost_digits(self.spec, observation)) is not None:
            self._watches_digits = False
            warnings.warn(lost, RuntimeWarning, stacklevel=3)
        return rows, batched

    def _noise_scale(self, deterministic: bool | None) -> float:
        """What the drawn noise is multiplied by, 0 to 1."""
        if deterministic is None:
            return self.spec.acting.noise_scale
        return float(not as_annotated("deterministic", deterministic, bool))

    @property
    def _turn(self) -> threading.RLock:
        # Checked first: a lock that another thread held while the process was forked is never released.
        require_process(self._process)
        return self._lock

    def _infer(
        self,
        rows: NDArray[np.float32],
        noise: NDArray[np.float32],
        given: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float32]:
        self._health.inferences += 1
        self.last_noise = noise
        found = self.session.run_all(rows, noise, *(given or ()))
        if "value" in found:
            note_values(self._health, found["value"], found["disagreement"])
        return found["actions"]


def _drawing(spec: PolicySpec, best_of: int | None, noise_scale: float | None) -> PolicySpec:
    """The spec with another number of samples per decision, and another noise scale, which nobody has measured.

    Raises:
        ConfigError: one of them is out of range, or the graph does not choose by value.
    """
    integration = spec.integration
    if best_of is not None:
        if integration.best_of == 1 or not 2 <= best_of <= MAX_STEPS:
            raise ConfigError(
                f"best_of is {best_of}; expected 2 to {MAX_STEPS}, of a graph that chooses by value. "
                "Export with --best-of or the variant best-of-4."
            )
        integration = replace(integration, best_of=best_of)
    scale = spec.acting.noise_scale if noise_scale is None else checked_noise_scale(noise_scale)
    same = integration == spec.integration and scale == spec.acting.noise_scale
    return spec if same else replace(spec, integration=integration, acting=ActingRule(scale))


def _load_again(origin: dict[str, Any]) -> MeamPolicy:
    expected = dict(origin)
    identity = expected.pop("identity", None)
    policy = MeamPolicy.from_pretrained(**expected)
    if policy._origin is not None and identity is not None:
        _require_same(origin, policy._origin["identity"])
    return policy


def _require_same(origin: Mapping[str, Any], identity: str) -> None:
    """Refuse another export in the place of the one that was loaded.

    Raises:
        IntegrityError: the hashes of config.json differ.
    """
    if identity != origin["identity"]:
        raise IntegrityError(
            f"{origin['path_or_repo_id']} holds another export now: config.json has SHA-256 {identity[:16]}…, but the "
            f"policy was loaded from one with {origin['identity'][:16]}…. Load it again, wherever it acts."
        )
