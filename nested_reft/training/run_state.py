"""Everything that a resumed run needs, in one value with one way out and one way back.

What is not in it does not survive; what survives is in it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from nested_reft import dataset_reset, kl_control, mix_control
from nested_reft.bridging import BridgeState
from nested_reft.checkpoint_identity import check_format, check_identity, checkpoint_identity
from nested_reft.checkpoints import Checkpoints, DamagedCheckpointError
from nested_reft.curriculum import CurriculumState
from nested_reft.data.pipeline import PromptStream, batch_prompts
from nested_reft.dataset_reset import ResetState
from nested_reft.json_files import differences
from nested_reft.kl_control import KlControlState
from nested_reft.layer_plan import LayerPlan
from nested_reft.layer_skip import PlanRule, layers_in
from nested_reft.losses.registry import make_objective
from nested_reft.mix_control import MixControlState
from nested_reft.nesting_control import NestingControlState, initial_state
from nested_reft.replay import Buffer
from nested_reft.replay_store import Store, best_right
from nested_reft.rollout.policy import Policy
from nested_reft.training.config import Config, forbidden_changes
from nested_reft.training.group_supply import empty_buffer, loaded_buffer, saved_buffer
from nested_reft.training.learner import Learner
from nested_reft.training.references import num_candidates, reference_scores
from nested_reft.training.setup import RunData, Setup
from nested_reft.training.split import Division
from nested_reft.types import Prompts, Scored

logger = logging.getLogger(__name__)
Marks = dict[str, list[int]]  # what `RunDirectory.marks` returns


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        config: of the run.
        learner: parameters, optimizer state, counters and the reference.
        stream: the position in every source.
        curriculum: what it remembers of each source.
        buffer: groups that were found and not yet trained on, or what is kept for replay.
        ordered: batches that were ordered so far.
        found_ahead: results of orders that were under way at a checkpoint, oldest first; later ones are with the pool.
        searching: the policy that searchers got last, while further orders are to get it too.
        nesting: how deep the next batch nests.
        mix: how much of the importance weight the next batch uses.
        kl: how heavy the KL penalty on token rewards is.
        reset: where in their references the next rollouts may start.
        divergence_L: measured divergence of each layer, for `measured` plans.
        empty_updates: updates in a row, up to the latest, that changed nothing.
        nonfinite_updates: updates of the whole run that were left out, since loss or gradient was not finite.
        nonfinite_in_a_row: those of them that came after the last update that was finite.
        bridging: the texts that the bridges are fitted on, and when they were.
        data: the prompts; the phase decides how they are divided, so they are not stored.
        division: the parts that the sources were divided into; None before, or where there is no split.
        phase: index of the phase that the run is in.
        started: whether what comes before the phase's first step is done.
        step: steps of that phase that are done.
        seconds: time that the steps so far took.
        before: held-out results before the first step of reinforcement.
        trained_before: whether an earlier phase has moved the parameters, so that the reference is not
            what the configuration starts from.
        identity: model and tokenizer, as `checkpoint_identity` writes them.
    """

    config: Config
    learner: Learner
    data: RunData
    stream: PromptStream
    curriculum: CurriculumState
    nesting: NestingControlState
    mix: MixControlState
    divergence_L: Float[np.ndarray, " L"]
    buffer: Buffer | Store
    ordered: int = 0
    found_ahead: tuple[Scored, ...] = ()
    searching: Policy | None = None
    bridging: BridgeState = field(default_factory=BridgeState)
    empty_updates: int = 0
    nonfinite_updates: int = 0
    nonfinite_in_a_row: int = 0
    kl: KlControlState = field(default_factory=KlControlState)
    reset: ResetState = field(default_factory=ResetState)
    division: Division | None = None
    phase: int = 0
    started: bool = False
    step: int = 0
    seconds: float = 0.0
    before: dict[str, Any] | None = None
    trained_before: bool = False
    identity: dict[str, Any] = field(default_factory=dict)

    def save(self, checkpoints: Checkpoints, number: int, marks: Marks) -> None:
        """Starts writing a checkpoint; the state may change as soon as this returns.

        Args:
            checkpoints: of the run.
            number: of the checkpoint, larger than those before.
            marks: where the logs end.

        Raises:
            CheckpointError: this checkpoint or the one before could not be written.
        """
        self.buffer, buffer = saved_buffer(self.buffer, f"replay-{number}")
        host = self._host() | {"buffer": buffer, "config": self.config.to_json(), "marks": marks}
        host["identity"] = self.identity
        arrays = self.learner.arrays(self.trained_before)
        if self.searching is not None:
            arrays["searching"] = nnx.state(self.searching.model)
        checkpoints.save(number, arrays, host)

    def load(self, checkpoints: Checkpoints, prepare: Callable[[RunState], None]) -> Marks:
        """Takes over the newest checkpoint that is not damaged; a warning names those that are.

        Args:
            checkpoints: of the run; newer ones than that which is taken are set aside, once all is read.
            prepare: begins the phase that the state is in, so that the arrays have a place to go.

        Raises:
            ValueError: every checkpoint is damaged, or the newest whole one is of another configuration or other data.

        Returns:
            Where the logs ended when the checkpoint was written.
        """
        damages = []
        for number in checkpoints.numbers():
            try:
                marks = self._load(checkpoints, number, prepare)
            except DamagedCheckpointError as error:
                damages.append(str(error))
                continue
            for damage in damages:
                logger.warning("%s; the run continues from checkpoint %d, which is whole", damage, number)
            checkpoints.set_aside_after(number)
            return marks
        raise ValueError("; ".join([*damages, "there is no other to continue from"]))

    def _load(self, checkpoints: Checkpoints, number: int, prepare: Callable[[RunState], None]) -> Marks:
        host = checkpoints.restore_host(number, blocks=True)
        where, stored = f"checkpoint {number}", host.get("identity")
        # Versions come first, because another one's values may mean something else.
        check_format(stored, where)
        unknown = [name for name in ("mix", "bridging", "reset", "kl", "found_ahead") if name not in host]
        if self.config.replay.is_on and "segments" not in host["buffer"]:
            unknown.append("segments of replay")
        if unknown:
            raise ValueError(
                f"checkpoint {number} was written by an earlier version, which kept no {' and no '.join(unknown)};"
                " continue the run with the version that versions.json names"
            )
        # Fields that an earlier version did not have take their defaults, which is what it did.
        written = Config.from_json(host["config"]).to_json()
        changed = forbidden_changes(written, self.config.to_json())
        if changed:
            listed = "; ".join(f"{name} is {now!r}, and was {was!r}" for name, was, now in changed)
            raise ValueError(f"the configuration is not that of checkpoint {number}: {listed}. Change config.json back")
        # Before anything that the model's shape decides is read.
        check_identity(stored, self.identity, where)
        self._say_changes(written)
        # What the phase begins with depends on these.
        self.phase, self.division, self.trained_before = host["phase"], host["division"], host["trained_before"]
        prepare(self)
        self._load_arrays(checkpoints, number, host["searching"])
        self.stream.set_state(host["stream"])
        self.curriculum = CurriculumState.from_json(host["curriculum"])
        self.buffer = loaded_buffer(self.config, host["buffer"])
        self.ordered = host["ordered"]
        self.found_ahead = tuple(Scored.from_plain(scored) for scored in host["found_ahead"])
        self.nesting = NestingControlState.from_json(host["nesting"])
        self.mix = MixControlState.from_json(host["mix"])
        self.divergence_L = host["divergence"]
        self.bridging = BridgeState.from_plain(host["bridging"])
        # Earlier versions kept none of these counts.
        self.empty_updates = host.get("empty_updates", 0)
        self.nonfinite_updates = host.get("nonfinite_updates", 0)
        self.nonfinite_in_a_row = host.get("nonfinite_in_a_row", 0)
        self.reset = ResetState.from_json(host["reset"])
        self.kl = KlControlState.from_json(host["kl"])
        self.started, self.step = host["started"], host["step"]
        self.seconds, self.before = host["seconds"], host["before"]
        return host["marks"]

    def _say_changes(self, stored: dict[str, Any]) -> None:
        """Warns of the changes that a continued run may have, where they change what it does."""
        steps, mesh = stored["train"]["steps"], self.config.to_json()["mesh"]
        if self.config.train.steps != steps:
            logger.warning("train.steps is %d, and was %d: the run is extended", self.config.train.steps, steps)
        moved = differences(stored["mesh"], mesh)
        changed = "; ".join(f"mesh.{name} is {now!r}, and was {was!r}" for name, was, now in moved)
        if changed:
            logger.warning("%s: the run goes on as it stood, and further sums are rounded in another order", changed)

    def _load_arrays(self, checkpoints: Checkpoints, number: int, searching: int | None) -> None:
        """Device arrays of a checkpoint; `searching` is the version of the policy that searchers had, if it is kept."""
        like, policy = self.learner.arrays(self.trained_before), None
        if searching is not None:
            # Any version shows the structure.
            policy = self.learner.behavior_policy()
            like["searching"] = nnx.state(policy.model)
        arrays = checkpoints.restore_some(number, like)
        self.learner.load(arrays)
        self.searching = None
        if policy is not None:
            model = nnx.merge(nnx.graphdef(policy.model), arrays["searching"])
            self.searching = dataclasses.replace(policy, model=model, version=searching)

    def next_prompts(self, source_B: Int[np.ndarray, " B"]) -> Prompts:
        """The next prompt of each source named, as one batch.

        Args:
            source_B: indices of training sources.
        """
        encoded = [self.stream.next(int(source)) for source in source_B]
        return batch_prompts(encoded, source_B.tolist(), self.data.prompt_size)

    def with_prefixes(self, prompts: Prompts, key: jax.Array, step: int) -> Prompts:
        """The prompts with the prefixes that dataset reset gives their completions.

        Args:
            prompts: of one generation batch.
            key: PRNG key of its resets.
            step: of reinforcement, counted from 0.
        """
        config, data = self.config, self.data
        if not config.reset.is_on:
            return prompts
        tokens, group_size, forced_size = self._references(prompts), config.rollout.group_size, data.forced_size
        score_B = None
        if config.reset.prefer != "none":
            policy = self.learner.policy()
            score_B = reference_scores(config, policy, prompts, tokens, forced_size + 1, data.shared_prefix)
        return dataset_reset.choose(
            self.reset, config.reset, prompts, tokens, key, step, group_size, forced_size, score_B
        )

    def _references(self, prompts: Prompts) -> list[list[int]]:
        """The tokens of each prompt's reference; empty where it has none that can serve."""
        if self.config.reset.references == "replay":
            assert isinstance(self.buffer, Store)  # the configuration has checked it
            return best_right(self.buffer, prompts)
        encode, stop_id = self.learner.tokenizer.encode, self.learner.tokenizer.stop_ids[0]
        return [dataset_reset.reference_tokens(text, encode, stop_id) for text in prompts.references]

    @property
    def nests(self) -> bool:
        """Whether rollouts are nested by now."""
        return self.bridging.fits > 0 or not self.config.nesting.bridge.is_on

    def draw_plan(self, key: jax.Array, skip_ratio: float | None = None) -> LayerPlan:
        """The layers of the next batch's nested policy: all of them until its bridges are fitted.

        Args:
            key: PRNG key of the plan.
            skip_ratio: of the plan; None leaves out as many layers as the run does at present.
        """
        num_skipped = self.nesting.num_skipped
        if skip_ratio is not None:
            num_skipped = layers_in(skip_ratio, self.learner.num_layers)
        rule = PlanRule(self.config.nesting, self.divergence_L, num_skipped, self.nests)
        return rule.draw(key)

    def _host(self) -> dict[str, Any]:
        """What lies on the host, but for the buffer, as plain values and NumPy arrays."""
        return {
            "phase": self.phase,
            "started": self.started,
            "step": self.step,
            "seconds": self.seconds,
            "before": self.before,
            "trained_before": self.trained_before,
            "curriculum": self.curriculum.to_json(),
            "ordered": self.ordered,
            "found_ahead": [scored.to_plain() for scored in self.found_ahead],
            "searching": None if self.searching is None else self.searching.version,
            "nesting": self.nesting.to_json(),
            "mix": self.mix.to_json(),
            # It may have been measured anew in the run, so the file that it began with does not replace it.
            "divergence": np.asarray(self.divergence_L),
            "bridging": self.bridging.to_plain(),
            "empty_updates": self.empty_updates,
            "nonfinite_updates": self.nonfinite_updates,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "reset": self.reset.to_json(),
            "kl": self.kl.to_json(),
            "division": self.division,
            "stream": self.stream.get_state(),
        }


def initial_run_state(setup: Setup) -> RunState:
    """The state of a run that has not begun.

    Args:
        setup: what the run starts from; it stays as it is.
    """
    config, data = setup.config, setup.data
    has_head = make_objective(config.loss).needs(config.train.updates_per_batch).values
    return RunState(
        config=config,
        learner=Learner(setup.policy, config.rollout.weights, value_head=has_head),
        data=data,
        stream=PromptStream(data.train_examples, config.train.seed),
        curriculum=CurriculumState.start([len(examples) for examples in data.train_examples]),
        nesting=initial_state(config.nesting_control, config.nesting.num_skipped(setup.policy.num_layers)),
        mix=mix_control.initial_state(config.mix_control, getattr(config.loss, "mix_share", None)),
        kl=kl_control.initial_state(config.loss),
        reset=ResetState(candidates=num_candidates(config, data.train_examples)),
        divergence_L=setup.divergence_L,
        buffer=empty_buffer(config),
        bridging=BridgeState(fits=int(config.nesting.bridge.file is not None)),
        identity=checkpoint_identity(config.model.name, setup.policy.model.config, setup.policy.tokenizer),
    )
