"""The synchronous training loop.

    curriculum -> prompts -> rollout(plan) -> rewards -> dynamic sampling -> advantages -> loss -> update
        ^                         ^                                                                  |
        +-- |advantage| --        +------------- nesting control (ESS / KL budget) <-----------------+

`Trainer.step` reads like that line; every stage is one call on one typed value.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from nested_reft import curriculum, nesting_control
from nested_reft.checkpoints import Checkpoints
from nested_reft.compilation import CompileCounter
from nested_reft.data.pipeline import PromptStream, batch_prompts
from nested_reft.divergence import measure_layer_divergence, texts_of
from nested_reft.estimators.advantages import group_advantages
from nested_reft.estimators.health import health_warning
from nested_reft.evaluation import evaluate
from nested_reft.layer_skip import LayerPlan, draw_plan
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.dynamic_sampling import (
    GenerationLimitError,
    enough,
    select_groups,
    trained_groups,
    without_gradient,
)
from nested_reft.rollout.logprobs import completion_logprobs
from nested_reft.rollout.throughput import compare_throughput
from nested_reft.run_directory import RunDirectory, versions
from nested_reft.sharding import make_mesh, replicate, replicate_scalars, shard_batch
from nested_reft.train.generation import Generation, generation_metrics
from nested_reft.train.optimizer import make_optimizer
from nested_reft.train.setup import Setup
from nested_reft.train.split import split_sources
from nested_reft.train.step import create_train_state, make_update
from nested_reft.train.warm_start import warm_start
from nested_reft.types import Prompts, Rollouts, Scored, TrainBatch

# Purposes of random keys: each step's key is folded with one of these.
CURRICULUM_KEY, PLAN_KEY, ROLLOUT_KEY, EVALUATION_KEY, WARM_START_KEY, THROUGHPUT_KEY, SPLIT_KEY = range(7)
GENERATION_KEY = 100  # and up: the generation batches of a step
CURRICULUM_SEES = ("reward_BG", "accuracy_BG", "scored_BG")
LAST_PASS = (
    "loss",
    "policy_loss",
    "gradient_norm",
    "clipped_share",
    "limited_share",
    "weight_mean",
    "ess_weight",
    "reference_kl",
)
LOGGED_PROMPTS = 4  # prompts of each step whose completions go to samples.jsonl


class Trainer:
    """One run: its state, and the loop over steps.

    Everything random follows from `config.train.seed` and the step number, so a run that resumes
    from a checkpoint continues as if it had not stopped.
    """

    def __init__(self, setup: Setup, run: RunDirectory, resume: bool = False):
        """Args:
        setup: what `prepare` made of the configuration.
        run: where everything is written.
        resume: continue from the run's newest checkpoint.
        """
        config = setup.config
        self.config, self.setup, self.run_directory = config, setup, run
        self.compilations = CompileCounter()
        self.checkpoints = Checkpoints(run.path / "checkpoints", config.train.keep_checkpoints)
        self.mesh = make_mesh(config.mesh)
        self.key = replicate(jax.random.key(config.train.seed), self.mesh)
        self.num_layers = setup.model.config.num_layers
        self.generation = Generation(setup, self.mesh)

        total_updates = config.train.steps * config.train.updates_per_batch
        optimizer = make_optimizer(config.optimizer, total_updates)
        self.update = make_update(
            optimizer,
            config.loss,
            config.rollout.sampling.temperature,
            config.train.micro_batches,
            config.train.remat,
            setup.shared_prefix,
        )
        temperature = config.rollout.sampling.temperature
        self.score_logprobs = jax.jit(
            lambda model, batch, plan: completion_logprobs(
                model,
                batch.prompt_BP,
                batch.prompt_length_B,
                batch.tokens_BGC,
                temperature,
                plan,
                shared_prefix=setup.shared_prefix,
            )[0]
        )
        self.nesting = nesting_control.initial_state(
            config.nesting_control, config.nesting.num_skipped(self.num_layers)
        )
        self.divergence_L = setup.divergence_L
        self.steps_done = 0
        self.seconds_before = 0.0
        self.before: dict[str, Any] | None = None
        self.warned, self.shown_accuracy = False, dict[str, float]()
        model, keep_reference = setup.model, config.loss.reference_kl_coefficient > 0 and not config.lora.rank
        if config.warm_start.steps and (keep_reference or not resume):
            model = warm_start(model, setup, jax.random.fold_in(self.key, WARM_START_KEY))
        self.reference = _copy(model) if keep_reference else None
        division, split_key = run.path / "sources.json", jax.random.fold_in(self.key, SPLIT_KEY)
        self.setup = setup = split_sources(setup, model, split_key, division, resume)
        self.stream = PromptStream(setup.train_examples, config.train.seed)
        self.curriculum = curriculum.CurriculumState.start([len(examples) for examples in setup.train_examples])
        self.state = replicate_scalars(create_train_state(model, optimizer), self.mesh)
        if resume:
            self._restore()

    def run(self) -> dict[str, Any]:
        """Trains to the last step and returns the summary, which is also written.

        SIGINT or SIGTERM ends it after the step in progress, with a checkpoint.

        Raises:
            KeyboardInterrupt: it was asked to stop.
            FloatingPointError: an update was not finite; the last checkpoint is from before it.
            GenerationLimitError: dynamic sampling found too few mixed groups and was told to stop.
        """
        started, train = time.monotonic() - self.seconds_before, self.config.train
        with _stop_requests() as stop_requested:
            if self.before is None:
                self.before = self._evaluate_all(0)
                self.run_directory.log_metrics(0, _flat_accuracy(self.before))
                self._save()
            steps = range(self.steps_done, train.steps)
            bar = tqdm(steps, initial=self.steps_done, total=train.steps, unit="step", desc=self.config.name)
            for step in bar:
                try:
                    metrics = self.step(step)
                except GenerationLimitError:
                    self.close()
                    raise
                self._check_finite(metrics)
                self.steps_done = step + 1
                if self.steps_done % self.config.evaluation.every_steps == 0:
                    metrics |= self._evaluate_trained_sources(metrics)
                self.run_directory.log_metrics(self.steps_done, metrics)
                bar.set_postfix_str(self._progress(metrics))
                self.seconds_before = time.monotonic() - started
                stop, last = stop_requested(), self.steps_done == train.steps
                if last or stop or self.steps_done % train.checkpoint_every == 0:
                    self._save()
                if stop and not last:
                    self.close()
                    raise KeyboardInterrupt
            summary = self._summary(time.monotonic() - started)
        self.run_directory.write_summary(summary)
        self.close()
        return summary

    def step(self, step: int) -> dict[str, Any]:
        """One training step: choose prompts, sample nested, score, and update the full model."""
        config, step_key = self.config, jax.random.fold_in(self.key, 1000 + step)
        started, num_prompts = time.monotonic(), config.data.prompts_per_batch

        plan = self._draw_plan(jax.random.fold_in(step_key, PLAN_KEY))
        generated, rollout_seconds, before = list[Scored](), 0.0, self.curriculum
        while not enough(generated, config.dynamic_sampling, num_prompts):
            key = jax.random.fold_in(step_key, GENERATION_KEY + len(generated))
            source_B = curriculum.choose(
                self.curriculum, config.curriculum, jax.random.fold_in(key, CURRICULUM_KEY), num_prompts
            )
            prompts = self._next_prompts(source_B)
            rollout_started = time.monotonic()
            rollouts = self.generation.rollout(self.state, prompts, plan, jax.random.fold_in(key, ROLLOUT_KEY))
            rollout_seconds += time.monotonic() - rollout_started
            generated.append(self.generation.score(rollouts, prompts))
            self._update_curriculum(generated[-1])
        scored = select_groups(generated, config.dynamic_sampling, num_prompts)
        batch = self._train_batch(scored, plan)
        metrics, weight_BGC = self._update_policy(batch)
        metrics |= self._adapt_nesting(step, generated[0].rollouts, metrics)

        self._log_samples(step + 1, scored, weight_BGC)
        return metrics | {
            **generation_metrics(generated, rollout_seconds, len(self.setup.source_names)),
            **trained_groups(generated, config.dynamic_sampling, num_prompts),
            **self._curriculum_metrics(before, generated),
            **self.generation.draft_metrics,
            "skipped_layers": list(plan.skipped(self.num_layers)),
            "step_seconds": time.monotonic() - started,
            "compilations": self.compilations.count,
        }

    def _update_curriculum(self, scored: Scored) -> None:
        """Shows the curriculum what was generated, trained on or not.

        Its advantages are those of raw accuracy: under a shaped reward, a hopeless source with answers of
        unequal lengths would look the most learnable.
        """
        config = self.config
        advantage_BG = group_advantages(
            jnp.asarray(scored.accuracy_BG), jnp.asarray(scored.scored_BG), config.loss.advantage
        )
        self.curriculum = curriculum.update(
            self.curriculum,
            config.curriculum,
            scored.prompts.source_B,
            np.asarray(advantage_BG),
            scored.accuracy_BG,
            scored.scored_BG,
        )

    def _curriculum_metrics(self, before: curriculum.CurriculumState, generated: Sequence[Scored]) -> dict[str, Any]:
        return curriculum.step_metrics(
            before,
            self.curriculum,
            self.config.curriculum,
            self.setup.source_names,
            np.concatenate([scored.prompts.source_B for scored in generated]),
            *(np.concatenate([getattr(scored, name) for scored in generated]) for name in CURRICULUM_SEES),
        )

    def _update_policy(self, batch: TrainBatch) -> tuple[dict[str, Any], np.ndarray]:
        """Every pass over a batch: metrics of the step, and the weight of each token.

        How far off-policy the rollouts were is read off the first pass: from the second on, the
        optimizer has moved the target itself. A batch without a token to learn from changes nothing.
        """
        if not np.any(np.asarray(batch.forced_BG) < np.asarray(batch.length_BG)):
            return {"empty": True, "loss": 0.0, "gradient_norm": 0.0}, np.zeros(batch.tokens_BGC.shape, np.float32)
        passes = []
        for _ in range(self.config.train.updates_per_batch):
            self.state, update_metrics, weight_BGC = self.update(self.state, batch)
            passes.append({name: float(value) for name, value in update_metrics.items()})
        metrics: dict[str, Any] = passes[0] | {name: passes[-1][name] for name in LAST_PASS if name in passes[-1]}
        warning = health_warning(metrics, self.config.train.ess_warning)
        return metrics if warning is None else metrics | {"warning": warning}, np.asarray(weight_BGC)

    def _check_finite(self, metrics: dict[str, Any]) -> None:
        """Stops before a broken model replaces a good checkpoint."""
        if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])):
            self.close()
            raise FloatingPointError(
                f"step {self.steps_done + 1}: loss is {metrics['loss']} and gradient_norm {metrics['gradient_norm']};"
                f" the newest checkpoint in '{self.run_directory.path}' is from before. Lower optimizer.learning_rate"
            )

    def _evaluate_trained_sources(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Greedy held-out accuracy of the sources that this step trained on."""
        sources = sorted({self.setup.heldout_of_source[i] for i, count in enumerate(metrics["sources"]) if count})
        results = {
            self.config.data.sources[index].name: self._evaluate(index, self.steps_done, samples=False).to_json()
            for index in sources
        }
        self.shown_accuracy = _flat_accuracy(results)
        return self.shown_accuracy

    def _progress(self, metrics: dict[str, Any]) -> str:
        """The line behind the progress bar; shows the run's first off-policy warning above it."""
        if "warning" in metrics and not self.warned:
            tqdm.write(f"step {self.steps_done}: {metrics['warning']} (later ones: metrics.jsonl)")
            self.warned = True
        shown = [
            f"reward {metrics['reward']:.2f}",
            f"accuracy {metrics['accuracy']:.2f}",
            f"{metrics['tokens_per_second']:.0f} tok/s",
            f"ESS {metrics.get('ess_token', math.nan):.2f}",
            *(f"{name} {accuracy:.2f}" for name, accuracy in self.shown_accuracy.items()),
        ]
        return ", ".join(shown)

    def close(self) -> None:
        """Waits for checkpoints and closes the logs."""
        self.checkpoints.close()
        self.run_directory.close()
        self.compilations.close()

    def _next_prompts(self, source_B: np.ndarray) -> Prompts:
        encoded = [self.stream.next(int(source)) for source in source_B]
        return batch_prompts(encoded, source_B.tolist(), self.setup.prompt_size)

    def _draw_plan(self, key: jax.Array) -> LayerPlan:
        num_skipped = nesting_control.choose(self.nesting)
        return draw_plan(key, self.config.nesting, self.num_layers, self.divergence_L, num_skipped)

    def _adapt_nesting(self, step: int, rollouts: Rollouts, metrics: dict[str, Any]) -> dict[str, Any]:
        """Decides how many layers the next batch skips, re-measures them when it is time, and says so."""
        nesting, logged = self.config.nesting, {}
        if "empty" not in metrics:
            self.nesting = nesting_control.update(self.nesting, self.config.nesting_control, metrics)
        if self.nesting.reason:
            logged |= {"next_num_skipped": self.nesting.num_skipped, "nesting_reason": self.nesting.reason}
        if nesting.remeasure_every and step % nesting.remeasure_every == 0:
            started = time.monotonic()
            texts = texts_of(rollouts, nesting.remeasure_prompts, nesting.remeasure_completions)
            temperature = self.config.rollout.sampling.temperature
            self.divergence_L = measure_layer_divergence(self.state.model, texts, temperature)
            logged["layer_divergence"] = [round(float(value), 5) for value in self.divergence_L]
            logged["remeasure_seconds"] = time.monotonic() - started
        return logged

    def _train_batch(self, scored: Scored, plan: LayerPlan) -> TrainBatch:
        """Advantages, and log-probabilities of the other policies where the loss needs them."""
        config, rollouts = self.config, jax.device_get(scored.rollouts)
        rollouts = without_gradient(rollouts, ~scored.scored_BG)
        if config.loss.overlong_filter:
            rollouts = without_gradient(rollouts, ~np.asarray(rollouts.finished_BG))
        advantage_BG = group_advantages(
            jnp.asarray(scored.reward_BG), jnp.asarray(scored.scored_BG), config.loss.advantage
        )
        size = completion_bucket(int(np.asarray(rollouts.length_BG).max()), config.rollout.max_completion_tokens)
        batch = TrainBatch(
            prompt_BP=rollouts.prompt_BP,
            prompt_length_B=rollouts.prompt_length_B,
            tokens_BGC=rollouts.tokens_BGC[..., :size],
            length_BG=rollouts.length_BG,
            forced_BG=rollouts.forced_BG,
            behavior_logprob_BGC=rollouts.behavior_logprob_BGC[..., :size],
            advantage_BG=advantage_BG,
        )
        batch = shard_batch(batch, self.mesh)
        policies: dict[str, Callable[[], tuple[Transformer, LayerPlan | None]]] = {
            "old_logprob_BGC": lambda: (self.state.model, None),
            "nested_logprob_BGC": lambda: (self.state.model, replicate(plan, self.mesh)),
            "reference_logprob_BGC": lambda: (self._reference_model(), None),
        }
        needed = config.loss.needed_logprobs(config.train.updates_per_batch)
        scores = {name: self._logprobs(batch, *policies[name]()) for name in needed}
        batch = dataclasses.replace(batch, **scores)
        if config.loss.self_distillation_coefficient:
            batch = dataclasses.replace(batch, plan=replicate(plan, self.mesh))
        return batch

    def _reference_model(self) -> Transformer:
        """The initial model: a copy, or under LoRA the current one with its adapters off."""
        if self.reference is not None:
            return self.reference
        model = self.state.model
        model.lora_scale = 0.0
        return model

    def _logprobs(self, batch: TrainBatch, model: Transformer, plan: LayerPlan | None) -> Float[Array, "B G C"]:
        return self.score_logprobs(model, batch, plan)

    def _evaluate(self, source: int, step: int, samples: bool):
        return evaluate(
            self.state.model,
            self.setup.tokenizer,
            self.setup.heldout_examples[source],
            self.config.reward,
            self.config.evaluation,
            self.config.rollout.max_completion_tokens,
            self.config.rollout.sampling,
            jax.random.fold_in(jax.random.fold_in(self.key, 1000 + step), EVALUATION_KEY),
            samples,
        )

    def _evaluate_all(self, step: int) -> dict[str, Any]:
        sources = enumerate(tqdm(self.config.data.sources, desc="held-out evaluation", unit="source", leave=False))
        return {source.name: self._evaluate(index, step, samples=True).to_json() for index, source in sources}

    def _summary(self, seconds: float) -> dict[str, Any]:
        config = self.config
        after = self._evaluate_all(config.train.steps)
        prompts = self._next_prompts(np.zeros(config.data.prompts_per_batch, np.int32))
        key = jax.random.fold_in(self.key, THROUGHPUT_KEY)
        plan = self._draw_plan(key)
        throughput = compare_throughput(
            lambda plan: self.generation.full_length(self.state, prompts, plan, key),
            plan,
            self.num_layers,
        )
        history = self.run_directory.read_metrics()
        health = {
            name: float(np.mean([line[name] for line in history if name in line]))
            for name in ("ess_token", "ess_sequence", "kl_behavior_target")
        }
        return {
            "name": config.name,
            "run_directory": str(self.run_directory.path),
            "steps": config.train.steps,
            "before": self.before,
            "after": after,
            "training_seconds": seconds,
            "compilations": self.compilations.count,
            "compile_seconds": self.compilations.seconds,
            "versions": versions(),
            **throughput,
            **health,
        }

    def _log_samples(self, step: int, scored: Scored, weight_BGC: np.ndarray) -> None:
        """Writes the completions of the first prompts of a step, with what explains their rewards."""
        prompts, rollouts = scored.prompts, jax.device_get(scored.rollouts)
        tokens_BG = np.maximum(rollouts.length_BG - rollouts.forced_BG, 1)
        mean_weight_BG = weight_BGC.sum(axis=-1) / tokens_BG
        skipped = list(rollouts.plan.skipped(self.num_layers))
        self.run_directory.log_samples(
            step,
            [
                {
                    "prompt": prompts.texts[b],
                    "answer": prompts.answers[b],
                    "text": scored.texts[b][g],
                    "reward": float(scored.reward_BG[b, g]),
                    "parts": {name: float(part_BG[b, g]) for name, part_BG in scored.parts.items()},
                    "stop": "stop token" if rollouts.finished_BG[b, g] else "length",
                    "tokens": int(rollouts.length_BG[b, g]),
                    "skipped_layers": skipped if rollouts.nested_BG[b, g] else [],
                    "mean_weight": float(mean_weight_BG[b, g]),
                }
                for b in range(min(LOGGED_PROMPTS, len(prompts)))
                for g in range(self.config.rollout.group_size)
            ],
        )

    def _save(self) -> None:
        host = {
            "steps_done": self.steps_done,
            "seconds": self.seconds_before,
            "before": self.before,
            "curriculum": self.curriculum.to_json(),
            "nesting": self.nesting.to_json(),
            "draft_length": self.generation.draft_length,
            "divergence": self.divergence_L.tolist(),
            "stream": self.stream.get_state(),
        }
        self.checkpoints.save(self.steps_done, self.state.checkpoint_arrays(), host)

    def _restore(self) -> None:
        step, arrays, host = self.checkpoints.restore(self.state.checkpoint_arrays())
        self.run_directory.drop_after(step)
        self.state = dataclasses.replace(self.state, **arrays)
        self.steps_done, self.seconds_before, self.before = host["steps_done"], host["seconds"], host["before"]
        self.curriculum = curriculum.CurriculumState.from_json(host["curriculum"])
        self.nesting = nesting_control.NestingControlState.from_json(host["nesting"])
        self.divergence_L, self.generation.draft_length = np.array(host["divergence"]), host["draft_length"]
        self.stream.set_state(host["stream"])


def completion_bucket(longest: int, limit: int) -> int:
    """The size that completions are cut to for an update: one, two, three or four quarters of the limit.

    Short completions make cheap updates, and four sizes make at most four compilations.
    """
    quarter = -(-limit // 4)
    return min(-(-longest // quarter) * quarter, limit)


def _copy(model: Transformer) -> Transformer:
    """A copy whose buffers survive the donation of the original's."""
    return jax.tree.map(jnp.copy, model)


def _flat_accuracy(evaluations: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {f"heldout/{source}": result["greedy_accuracy"] for source, result in evaluations.items()}


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step; a second one acts at once.

    The handler only sets a flag: whatever it interrupts (a log line, a checkpoint) goes on.
    """
    requested = False

    def request(number: int, _frame: Any) -> None:
        nonlocal requested
        requested = True
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
