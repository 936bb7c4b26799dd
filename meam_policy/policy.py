"""`MeamPolicy`: a policy folder, ready to act."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meam_policy.action_chunk import ActionChunkQueue
from meam_policy.errors import ActionError, ConfigError, ObservationError
from meam_policy.folder import locate_policy, read_graph, read_spec
from meam_policy.latency import load_within
from meam_policy.observation import flatten_observation
from meam_policy.session import Device, PolicySession
from meam_policy.spec import PolicySpec

__all__ = ["MeamPolicy"]


class MeamPolicy:
    """A flow policy that maps observations to chunks of actions through onnxruntime.

    Make one with `MeamPolicy.from_pretrained`. The object keeps a queue of actions for every environment slot, so one
    object serves one loop at a time: call `reset()` when an episode starts.

    Attributes:
        spec: What the policy is, as the variant in use acts.
        variant: Name of that variant; None for the policy as trained.

    Example:
        >>> policy = MeamPolicy.from_pretrained("path/to/policy")  # doctest: +SKIP
        >>> action = policy.act(observation)  # doctest: +SKIP
    """

    def __init__(
        self, spec: PolicySpec, session: PolicySession, seed: int | None = None, variant: str | None = None
    ) -> None:
        self.spec, self.variant = spec, variant
        self.session = session
        self._low, self._high = spec.action_space.low, spec.action_space.high
        self._inferences = 0
        self.reset(seed=seed)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
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
        seed: int | None = None,
    ) -> MeamPolicy:
        """Load a policy from a folder or from the Hugging Face Hub. Nothing in it is executed but its ONNX graph.

        Args:
            path_or_repo_id: A folder that `meam export` wrote, or a Hub repo id "owner/name".
            revision: Branch, tag or commit on the Hub; a full commit hash needs no network once it is cached.
            token: Hub token; None uses the one stored by `hf auth login`.
            cache_dir: Hub cache folder; None is the Hub's default.
            local_files_only: Use only what is in the cache.
            force_download: Download again.
            variant: Another graph of the folder, by its name in `spec.variants`; None for the policy as trained.
            latency_budget_ms: Take the graph closest to the policy as trained that answers within this time here, for
                one observation: each is timed now, with pauses as in a control loop. Not together with `variant`.
            device: "cpu"; "cuda" or "tensorrt", which fail rather than fall back to the CPU; or "auto", CUDA where it
                works.
            threads: Threads used inside one inference.
            fixed_batch: Prepare the graph for exactly this batch size; on CUDA that captures it as a CUDA graph. Other
                sizes are padded or split.
            tf32: Let CUDA round the inputs of float32 products to TF32, which costs accuracy.
            seed: Seed of the noise; None draws one.

        Raises:
            NotFoundError: the folder or one of its files does not exist.
            HubError: the Hub could not deliver; see its `kind`.
            FormatError: a file is not what the format says (IntegrityError, VersionError among them).
            DeviceError: the device is not usable here, or no graph answers within the budget.
            ConfigError: there is no such variant, or an argument is out of range.
            MissingExtraError: onnxruntime is not installed.
        """
        if variant is not None and latency_budget_ms is not None:
            raise ConfigError(
                f'Both variant="{variant}" and latency_budget_ms are given; expected at most one of them.'
            )
        wanted = () if variant is None else (variant,)
        folder: Path = locate_policy(
            path_or_repo_id,
            variants=wanted if latency_budget_ms is None else None,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        recorded = read_spec(folder)

        def load(name: str | None) -> MeamPolicy:
            spec, file = recorded.select(name)
            graph = read_graph(folder, recorded, file)
            session = PolicySession(graph, spec, device, threads, fixed_batch=fixed_batch, tf32=tf32, name=file)
            return cls(spec, session, seed, name)

        if latency_budget_ms is None:
            return load(variant)
        return load_within(latency_budget_ms, recorded, load)

    @property
    def provider(self) -> str:
        """The onnxruntime execution provider in use, such as "CPUExecutionProvider"."""
        return self.session.provider

    @property
    def inferences(self) -> int:
        """How often the network has been run by `act` and `predict` since the policy was loaded."""
        return self._inferences

    def reset(self, seed: int | None = None) -> None:
        """Start a new episode: drop every queued action.

        Args:
            seed: Seed of the noise from here on, 0 or more; None leaves the noise going as it is.

        Raises:
            ConfigError: the seed is negative.
        """
        _check_seed(seed)
        if seed is not None or not hasattr(self, "_seeds"):
            self._seeds = np.random.SeedSequence(seed)
            self._generators: list[np.random.Generator] = []
        self._queue: ActionChunkQueue | None = None

    def act(self, observation: Any, *, deterministic: bool = False) -> NDArray[Any]:
        """Choose the next action; runs the network only when the current chunk is used up.

        Args:
            observation: One observation, or a batch with one row an environment slot; see `spec.observation_space`.
            deterministic: Start every new chunk from zero noise instead of a random draw.

        Returns:
            The action, shaped and typed like `spec.action_space`, in its units and within its bounds; with a leading
            batch axis if the observation has one. Always a fresh array.

        Raises:
            ObservationError: the observation does not fit, is not finite, or has another batch size than before.
            ActionError: the network produced NaN or infinity.
        """
        return self._act(*flatten_observation(self.spec, observation), deterministic)

    def _act(self, rows: NDArray[np.float32], batched: bool, deterministic: bool) -> NDArray[Any]:
        queue = self._queue
        if queue is None:
            queue = self._queue = self._new_queue(len(rows))
        elif queue.slots != len(rows):
            raise ObservationError(
                f"Observation batch is {len(rows)}, but this episode began with {queue.slots}. Call policy.reset()."
            )
        slots = queue.empty_slots()
        if slots.size:
            queue.put(slots, self._infer(rows[slots], self._noise(slots, deterministic)))
            self._inferences += 1
        actions = self._shape(queue.pop())
        return actions if batched else actions[0, ...]  # an array even for a scalar action

    def sample(self, observation: Any, noise: ArrayLike | None = None, seed: int | None = None) -> NDArray[np.float32]:
        """Sample action chunks, without touching the action queues.

        Args:
            observation: One observation, or a batch of them.
            noise: Standard normal draws [(batch,) spec.noise_dim]; None draws them.
            seed: Seed of the drawn noise; None continues this policy's own stream. Not together with `noise`.

        Returns:
            Chunks [(batch,) chunk_size, action_dim] in environment units, within the action bounds.

        Raises:
            ObservationError: the observation or the noise does not fit.
            ActionError: the network produced NaN or infinity.
        """
        rows, batched = flatten_observation(self.spec, observation)
        shape = (len(rows), self.spec.noise_dim)
        _check_seed(seed)
        if noise is None:
            generator = self._generator(0) if seed is None else np.random.default_rng(seed)
            draws = generator.standard_normal(shape, dtype=np.float32)
        elif seed is not None:
            raise ObservationError("Both noise and seed are given; expected at most one of them.")
        else:
            draws = np.asarray(noise)
            if draws.dtype.kind not in "fi" or draws.shape != (shape if batched else shape[1:]):
                expected = shape if batched else shape[1:]
                raise ObservationError(f"Noise is {draws.dtype} of shape {draws.shape}; expected {expected}.")
            with np.errstate(over="ignore"):
                draws = draws.reshape(shape).astype(np.float32)
            if not np.isfinite(draws).all():
                raise ObservationError("Noise holds NaN or infinity; expected finite numbers.")
        chunks = self._infer(rows, draws)
        return chunks if batched else chunks[0]

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], None]:
        """Choose the next action, in stable-baselines3's convention; its `evaluate_policy` accepts this object.

        Args:
            observation: One observation, or a batch of them.
            state: Ignored; the action queues are kept inside.
            episode_start: Mask [batch] of the slots whose episode has just begun: what they had queued is dropped.
            deterministic: Start every new chunk from zero noise.

        Returns:
            The action(s), as from `act`, and None.

        Raises:
            ObservationError: as `act`; and `episode_start` has another length than the batch.
        """
        rows, batched = flatten_observation(self.spec, observation)
        if episode_start is not None:
            mask = np.atleast_1d(np.asarray(episode_start, dtype=bool))
            if mask.shape != (len(rows),):
                raise ObservationError(f"episode_start has shape {mask.shape}, expected ({len(rows)},).")
            if mask.all():
                self._queue = None
            elif self._queue is not None and self._queue.slots == len(mask):
                self._queue.clear(mask)
        return self._act(rows, batched, deterministic), None

    def _new_queue(self, slots: int) -> ActionChunkQueue:
        return ActionChunkQueue(slots, self.spec.chunk_size, self.spec.execute_steps, self.spec.action_dim)

    def _generator(self, slot: int) -> np.random.Generator:
        # One stream a slot: what happens in one environment never changes the noise of another.
        while len(self._generators) <= slot:
            self._generators.append(np.random.default_rng(self._seeds.spawn(1)[0]))
        return self._generators[slot]

    def _noise(self, slots: NDArray[np.intp], deterministic: bool) -> NDArray[np.float32]:
        size = self.spec.noise_dim
        if deterministic:
            return np.zeros((len(slots), size), dtype=np.float32)
        return np.stack([self._generator(slot).standard_normal(size, dtype=np.float32) for slot in slots])

    def _infer(self, rows: NDArray[np.float32], noise: NDArray[np.float32]) -> NDArray[np.float32]:
        chunks = self.session.run(rows, noise)
        if not np.isfinite(chunks).all():
            raise ActionError(
                "The policy produced NaN or infinity; no action is returned. "
                "The observation may be far outside the training data."
            )
        return chunks

    def _shape(self, actions: NDArray[np.float32]) -> NDArray[Any]:
        # Clipped again: a float64 bound rounds outwards in the graph's float32.
        shaped = actions.reshape(len(actions), *self._low.shape).astype(self._low.dtype)
        return np.clip(shaped, self._low, self._high, out=shaped)


def _check_seed(seed: int | None) -> None:
    if seed is not None and seed < 0:
        raise ConfigError(f"seed is {seed}; expected a whole number of 0 or more.")
