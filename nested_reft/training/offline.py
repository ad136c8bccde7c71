"""The phase of runs that sample nothing: supervised fine-tuning, reward models, and DPO.

All three learn from completions that somebody wrote, so they share this one phase. It takes the place of reinforcement
as the last phase of a run; checkpoints, resuming and logs are those of every run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from nested_reft import processes
from nested_reft.compilation import CompileCounter
from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.examples import Example
from nested_reft.data.packing import packed_batch
from nested_reft.data.pipeline import batch_prompts
from nested_reft.data.prompts import EncodedExample
from nested_reft.data.written import completion_tokens, written_batch
from nested_reft.dataset_reset import ResetConfig
from nested_reft.heartbeat import beat
from nested_reft.json_files import write_json
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.bradley_terry import PAIR_SIGNALS, BradleyTerryConfig
from nested_reft.losses.dpo import DpoConfig
from nested_reft.losses.registry import OfflineConfig, make_objective
from nested_reft.losses.supervised import SftConfig
from nested_reft.mix_control import MixControlConfig
from nested_reft.nesting_control import NestingControlConfig
from nested_reft.replay import DynamicSamplingConfig
from nested_reft.replay_store import ReplayConfig
from nested_reft.reward_model import FACTS
from nested_reft.run_directory import RunDirectory, versions
from nested_reft.sharding import to_host
from nested_reft.training import record
from nested_reft.training.clock import Clock
from nested_reft.training.config import Config
from nested_reft.training.keys import RunKeys
from nested_reft.training.learner import LearnerBatch, completion_bucket
from nested_reft.training.optimizer import make_optimizer
from nested_reft.training.phases import count_nonfinite, last_checkpoint, take_whole_sources
from nested_reft.training.reward_facts import reward_facts
from nested_reft.training.run_state import RunState
from nested_reft.training.search_config import SearchConfig
from nested_reft.training.setup import RunData, texts_of
from nested_reft.training.step import LearnerTask
from nested_reft.training.warm_start import WarmStartConfig
from nested_reft.types import Weighted
from nested_reft.untrusted import printable


def offline_task(config: Config, shared_prefix: int, longest: int) -> LearnerTask:
    """What the learner minimises.

    Args:
        config: of the run.
        shared_prefix: leading tokens that all prompts have in common.
        longest: C, tokens of the longest completion.
    """
    train = config.train
    return LearnerTask(
        objective=make_objective(config.loss),
        optimizer=make_optimizer(config.optimizer, train.steps * train.updates_per_batch),
        # Nothing was sampled, so the likelihood is that of the model itself.
        temperature=1.0,
        updates_per_batch=train.updates_per_batch,
        micro_batches=train.micro_batches,
        remat=train.remat,
        shared_prefix=shared_prefix,
        max_completion_tokens=longest,
        compute_dtype=train.compute_dtype,
        mini_batches=train.mini_batches,
    )


OfflineKind = Literal["sft", "bradley_terry", "dpo"]
_DEFAULTS: dict[OfflineKind, OfflineConfig] = {
    "sft": SftConfig(),
    "bradley_terry": BradleyTerryConfig(),
    "dpo": DpoConfig(),
}


def as_offline(config: Config, kind: OfflineKind) -> Config:
    """A configuration with an offline objective in place of its own, and without what only rollouts need.

    Args:
        config: any; one that has the objective already stays as it is.
        kind: the objective, with its defaults where the configuration has another one.
    """
    if config.loss.kind == kind:
        return config
    return dataclasses.replace(
        config,
        name=f"{config.name}-{kind}",
        loss=_DEFAULTS[kind],
        reward=dataclasses.replace(config.reward, model=()),
        reset=ResetConfig(),
        replay=ReplayConfig(),
        dynamic_sampling=DynamicSamplingConfig(),
        search=SearchConfig(),
        nesting=NestingConfig(),
        nesting_control=NestingControlConfig(),
        mix_control=MixControlConfig(),
        curriculum=CurriculumConfig("uniform"),  # sources take turns
        # A warm start is what supervised fine-tuning does itself. The other two begin with it.
        warm_start=WarmStartConfig() if kind == "sft" else config.warm_start,
    )


class Offline:
    """One update a step, on completions that sources give; held-out ones measure it."""

    trains, rate = True, "optimizer.learning_rate"

    def __init__(self, config: Config, data: RunData, keys: RunKeys, run: RunDirectory, clock: Clock):
        """Args:
        config: of the run; its loss is an `OfflineConfig`.
        data: its examples.
        keys: its random keys.
        run: where steps are logged.
        clock: counts the time of evaluations.
        """
        assert isinstance(config.loss, OfflineConfig)
        self._config, self._data, self._keys, self._run, self._clock = config, data, keys, run, clock
        self.name, self.steps = config.name, config.train.steps
        self._texts_of: Callable[[Example], list[str]] = texts_of(config.loss)
        self._signals = (1.0,) if isinstance(config.loss, SftConfig) else PAIR_SIGNALS

    def prepare(self, state: RunState) -> None:
        """A fresh optimizer, a fresh pass over the data, and the reference where the objective has one."""
        data, encode = self._data, state.learner.tokenizer.encode
        take_whole_sources(state, data, self._config)
        every = [e for examples in (*data.train_examples, *data.heldout_examples) for e in examples]
        longest = max(completion_tokens(text, encode) for e in every for text in self._texts_of(e.example))
        task = offline_task(self._config, data.shared_prefix, longest)
        state.learner.begin(task)
        if "reference_logprob_BGC" in task.needs.logprobs:
            state.learner.keep_reference()

    def start(self, state: RunState) -> None:
        """Held-out results before the first step."""
        state.before = self._heldout(state)
        self._say("before training", state.before)
        self._run.log_metrics(0, _heldout_metrics(state.before))

    def step(self, state: RunState, number: int) -> str:
        """One update on a batch of examples; all sources take turns.

        Args:
            state: its learner and its stream move on.
            number: of the step, counted from 0.

        Raises:
            NonFiniteUpdatesError: it was one update too many that was not finite.
        """
        config, started = self._config, time.monotonic()
        size = config.data.prompts_per_batch
        # Each step goes on where the one before ended, also where sources are more than the examples of a batch.
        source_B = (np.arange(size) + number * size) % len(self._data.train_examples)
        examples = [state.stream.next(int(source)) for source in source_B]
        packed = self._packed(state, examples) if isinstance(config.loss, SftConfig) else None
        batch = self._batch(state, examples) if packed is None else packed
        update = state.learner.update(batch, self._keys.step(number).mini_batches)
        found: dict[str, Any] = record.update_metrics(update)
        if (number + 1) % config.evaluation.every_steps == 0:
            results = self._heldout(state)
            self._say(f"step {number + 1}", results)
            found |= _heldout_metrics(results)
        found["step_seconds"] = time.monotonic() - started
        self._run.log_metrics(number + 1, record.declared(found))
        count_nonfinite(self, number + 1, update, state)
        accuracy = update.parts.get("pair_accuracy")
        return f"loss {update.loss:.3f}" + ("" if accuracy is None else f", accuracy {accuracy:.2f}")

    def summary(self, state: RunState, compilations: CompileCounter) -> dict[str, Any]:
        """What the run ended with; a reward model gets its facts beside it.

        Args:
            state: after the last step.
            compilations: what was compiled so far.
        """
        config, facts = self._config, None
        if isinstance(config.loss, BradleyTerryConfig):
            with self._clock.stage("evaluation"):
                facts = reward_facts(state.learner.policy(), self._data, config)
                # A run that is continued keeps the file, which is not about its model any more.
                facts["checkpoint"] = last_checkpoint(config)
            if processes.is_writer():
                write_json(self._run.path / FACTS, facts)
            # The report has gone through the held-out pairs already.
            after = {
                name: {"examples": report["pairs"], "loss": report["loss"], "accuracy": report["accuracy"]}
                for name, report in facts["sources"].items()
            }
        else:
            after = self._heldout(state)
        return {
            "name": config.name,
            "run_directory": str(self._run.path),
            "objective": config.loss.kind,
            "steps": config.train.steps,
            "before": state.before,
            "after": after,
            **({} if facts is None else {"reward_model": facts}),
            "nonfinite_updates": state.nonfinite_updates,
            "training_seconds": state.seconds,
            "seconds": self._clock.seconds(),
            "compilations": compilations.count,
            "compile_seconds": compilations.seconds,
            "versions": versions(),
        }

    def _batch(self, state: RunState, examples: Sequence[EncodedExample], count: int | None = None) -> LearnerBatch:
        """Examples as the objective reads them; with `count`, only so many of them are counted."""
        learner, tokenizer = state.learner, state.learner.tokenizer
        prompts = batch_prompts(examples, [0] * len(examples), self._data.prompt_size)
        texts_BG = [self._texts_of(encoded.example) for encoded in examples]
        # A reward is read off the state after the last token, which takes one place more.
        size = self._completion_size(state, texts_BG) + learner.needs.values
        batch = written_batch(prompts, texts_BG, self._signals, tokenizer.encode, tokenizer.stop_ids[0], size)
        if count is not None:
            counted_BG = jnp.broadcast_to(jnp.arange(len(examples))[:, None] < count, batch.counted_BG.shape)
            batch = dataclasses.replace(batch, counted_BG=counted_BG)
        return learner.written_batch(batch)

    @staticmethod
    def _completion_size(state: RunState, texts_BG: Sequence[Sequence[str]]) -> int:
        """Tokens that a row of a batch has room for: one of few sizes that holds the longest text."""
        encode, limit = state.learner.tokenizer.encode, state.learner.task.max_completion_tokens
        return completion_bucket(
            max(completion_tokens(text, encode) for texts_G in texts_BG for text in texts_G), limit
        )

    def _packed(self, state: RunState, examples: Sequence[EncodedExample]) -> LearnerBatch | None:
        """The examples of a batch with several demonstrations in a row; None where that computes no less."""
        config, data, learner = self._config, self._data, state.learner
        texts_BG = [self._texts_of(encoded.example) for encoded in examples]
        prefix, count, own = data.shared_prefix, len(examples), data.prompt_size - data.shared_prefix
        # A row has room for any text, and the number of rows takes one of eight values, so few programs are compiled.
        size = own + learner.task.max_completion_tokens
        parts = config.train.mini_batches * config.train.micro_batches * config.mesh.batch
        batch = packed_batch(
            batch_prompts(examples, [0] * count, data.prompt_size),
            [texts_G[0] for texts_G in texts_BG],
            learner.tokenizer.encode,
            learner.tokenizer.stop_ids[0],
            prefix,
            size,
            parts * -(-count // (8 * parts)),
        )
        computed = len(batch.tokens_BGC) * (prefix + size)
        is_less = computed < count * (own + self._completion_size(state, texts_BG))
        return learner.written_batch(batch) if is_less else None

    def _heldout(self, state: RunState) -> dict[str, dict[str, Any]]:
        """The loss on each source's held-out examples and, of pairs, the share that is ordered right."""
        config = self._config
        # As many as a training step holds in memory at once.
        size = config.prompts_per_micro_batch
        found: dict[str, dict[str, Any]] = {}
        with self._clock.stage("evaluation"):
            for name, examples in zip(self._data.source_names, self._data.heldout_examples, strict=True):
                sums: list[tuple[Weighted, dict[str, Weighted]]] = []
                starts = range(0, len(examples), size)
                for start in tqdm(starts, f"held-out {printable(name)}", unit="batch", leave=False, disable=None):
                    chunk = list(examples[start : start + size])
                    padded = chunk + [chunk[-1]] * (size - len(chunk))
                    output = state.learner.evaluate(self._batch(state, padded, len(chunk)))
                    beat()
                    sums.append(to_host((output.total, output.parts)))
                total, parts = jax.tree.map(lambda *values: np.sum(values), *sums)
                accuracy = parts.get("pair_accuracy")
                found[name] = {"examples": len(examples), "loss": float(total.mean())}
                found[name] |= {} if accuracy is None else {"accuracy": float(accuracy.mean())}
        return found

    @staticmethod
    def _say(when: str, found: dict[str, dict[str, Any]]) -> None:
        """A line above the bar, which a log file keeps too."""
        shares = (
            f"{printable(name)} loss {each['loss']:.3f}"
            + (f", accuracy {each['accuracy']:.3f}" if "accuracy" in each else "")
            for name, each in found.items()
        )
        tqdm.write(f"{when}: held-out {'; '.join(shares)}")


def _heldout_metrics(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    losses = {f"heldout_loss/{name}": each["loss"] for name, each in found.items()}
    return losses | {f"heldout/{name}": each["accuracy"] for name, each in found.items() if "accuracy" in each}
