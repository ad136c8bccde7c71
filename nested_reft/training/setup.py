"""From a configuration to what a run needs, with everything checked before any compute."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from nested_reft import processes
from nested_reft.bridge_file import FittedBridges, model_in_words, read_bridges
from nested_reft.data.examples import Example
from nested_reft.data.pipeline import prompt_size, shared_prefix
from nested_reft.data.prompts import EncodedExample, check_demonstrations, encode_examples
from nested_reft.data.sources import SourceConfig, field_path, load_source
from nested_reft.data.written import demonstration, pair, usable
from nested_reft.divergence import load_divergence
from nested_reft.layer_skip import check_share, draw_plan
from nested_reft.losses.registry import OfflineConfig
from nested_reft.losses.supervised import SftConfig
from nested_reft.models.config import ModelConfig
from nested_reft.models.fingerprint import fingerprint
from nested_reft.models.placement import place_bridges
from nested_reft.models.registry import resolve_model
from nested_reft.models.source import starting_model
from nested_reft.paths import local_path
from nested_reft.prompt_format import PromptFormat
from nested_reft.reward_model import check_reward_models, read_facts
from nested_reft.rewards.reward import NO_MODEL, check_answers
from nested_reft.rollout.policy import Policy
from nested_reft.sharding import make_mesh
from nested_reft.tokenizer import Tokenizer
from nested_reft.training.config import Config, with_absolute_paths
from nested_reft.training.idle_parts import idle_parts
from nested_reft.training.mesh_choice import with_chosen_mesh
from nested_reft.training.references import usable_references
from nested_reft.training.search_config import check_backend

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """The prompts of a run.

    Attributes:
        train_examples: of each training source.
        source_names: of the training sources.
        heldout_examples: of each source of the configuration.
        heldout_of_source: for each training source, the source of the configuration that it is part of.
        prompt_size: P of every training batch.
        shared_prefix: leading tokens that all training prompts have in common; they run once per batch.
        forced_size: F, the longest prefix that dataset reset gives a completion; 0 without resets.
    """

    train_examples: tuple[tuple[EncodedExample, ...], ...]
    source_names: tuple[str, ...]
    heldout_examples: tuple[tuple[EncodedExample, ...], ...]
    heldout_of_source: tuple[int, ...]
    prompt_size: int
    shared_prefix: int
    forced_size: int = 0


@dataclass(frozen=True)
class Setup:
    """What `prepare` makes of a configuration; any number of runs may start from it.

    Attributes:
        config: the configuration.
        policy: what the run starts from, placed on the mesh.
        data: the prompts.
        divergence_L: measured divergence of each layer, for `measured` plans; all alike where none is.
        bridges: what the configuration's bridge file holds, which the policy has already; None where there is none.
    """

    config: Config
    policy: Policy
    data: RunData
    divergence_L: Float[np.ndarray, " L"]
    bridges: FittedBridges | None = None


def prepare(config: Config, policy: Policy | None = None, resumes: bool = False) -> Setup:
    """Loads and checks data, tokenizer and model.

    Several processes prepare each for itself, and then call `check_bridges` together.

    Args:
        config: the configuration.
        policy: what to start from instead of the configuration's own model.
        resumes: a checkpoint holds the run's bridges and divergences, so the files that it began with are not read.

    Raises:
        ValueError: something in the configuration cannot work; names the field, its value and
            what is allowed.
        ImportError: an optional package that the configuration asks for is not installed.
    """
    # Paths of a configuration file are absolute by now. Others were given in this working directory.
    config = with_absolute_paths(config, Path.cwd())
    # A resumed run reads its configuration from a file, so it has to come back as it was.
    if Config.from_json(config.to_json()) != config:
        raise ValueError("the configuration holds values that JSON cannot keep, so its runs could not be resumed")
    config = with_chosen_mesh(config)
    # The mesh is made for its checks alone, before data and model are loaded.
    mesh = make_mesh(config.mesh)
    _check_processes(config)
    check_backend(config.search, mesh.size)
    if policy is None and config.model.name != "scratch":
        # An unknown name is found before the data are read; loading the weights comes later.
        resolve_model(config.model.name)
    # A reward model that is missing is found before the data are read, too. Its tokenizer is compared later on.
    if config.reward.checker == "model" and not (config.reward.model or isinstance(config.loss, OfflineConfig)):
        raise ValueError(NO_MODEL)
    for path in config.reward.model:
        read_facts(path)
    raw = _without_held_out(config, [load_source(source) for source in config.data.sources])
    prompts = [_prompt_format(config, source) for source in config.data.sources]
    for (train, heldout), (prompt, field) in zip(raw, prompts, strict=True):
        # The answers are checked before the model is loaded, so that a mistake in the data shows early.
        if not isinstance(config.loss, OfflineConfig):
            check_answers([*train, *heldout], config.reward)
        check_demonstrations(prompt, heldout, field)
    # What follows needs the number of layers, the positions or the tokenizer.
    policy = initial_policy(config) if policy is None else policy
    tokenizer, num_layers = policy.tokenizer, policy.num_layers
    config.nesting.validate_for(num_layers)
    for skip_ratio in config.search.skip_ratios:
        dataclasses.replace(config.nesting, skip_ratio=skip_ratio).validate_for(num_layers)
    if config.warm_start.steps:
        check_share("warm_start.layer_dropout", config.warm_start.layer_dropout, num_layers)
    _warn_of_warmup(config)
    for sentence in idle_parts(config):
        logger.warning("%s", sentence)
    config.nesting_control.validate_for(config.nesting.choice, config.nesting.most_skipped(num_layers))
    # Equal divergences draw all layers alike until the first measurement.
    divergence_L = np.zeros(num_layers)
    if config.nesting.choice == "measured" and config.nesting.divergence_file is not None and not resumes:
        divergence_L = load_divergence(local_path(config.nesting.divergence_file), num_layers, config.nesting.leave_out)
    bridges = None
    if config.nesting.bridge.file is not None and not resumes:
        bridges = _with_bridges(config, policy)
        divergence_L = bridges.divergence_L
    check_positions(config, policy.model.config)
    train, heldout = (
        [
            encode_examples(lists[part], tokenizer, prompt, config.data.max_prompt_tokens, config.data.too_long, field)
            for lists, (prompt, field) in zip(raw, prompts, strict=True)
        ]
        # Training examples first, held-out ones second: the order within each source of `raw`.
        for part in range(2)
    )
    longest = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
    check_reward_models(config.reward.model, tokenizer, longest)
    # Only an objective that reads given completions can do without some of them.
    if isinstance(config.loss, OfflineConfig):
        limit, given = config.rollout.max_completion_tokens, texts_of(config.loss)
        train, heldout = (
            [usable(examples, given, tokenizer.encode, limit, part) for examples in lists]
            for part, lists in (("train", train), ("heldout", heldout))
        )
    if config.warm_start.steps:
        check_answer_lengths(train, tokenizer, config.rollout.max_completion_tokens)
    _check_prefill(config, sum(map(len, train)))
    forced_size = 0
    if config.reset.is_on:
        train, forced_size = usable_references(config, train, tokenizer)
    # All training prompts get one size, so that whatever is drawn compiles nothing. The held-out ones of an offline
    # objective go through the same programs.
    sized = [*train, *heldout] if isinstance(config.loss, OfflineConfig) else train
    prompt_tokens = [example.tokens for examples in sized for example in examples]
    data = RunData(
        train_examples=tuple(tuple(examples) for examples in train),
        source_names=tuple(source.name for source in config.data.sources),
        heldout_examples=tuple(tuple(examples) for examples in heldout),
        heldout_of_source=tuple(range(len(config.data.sources))),
        prompt_size=prompt_size([len(tokens) for tokens in prompt_tokens]),
        shared_prefix=shared_prefix(prompt_tokens),
        forced_size=forced_size,
    )
    setup = Setup(config, policy, data, divergence_L, bridges)
    if processes.count() == 1:
        check_bridges(setup)
    return setup


def check_bridges(setup: Setup) -> None:
    """Refuses bridges of a file that are of other weights, or that differ between processes.

    All processes call it together, because weights that are split over them are compared by a program of all.

    Args:
        setup: of `prepare`.

    Raises:
        BadFile: they are of other weights.
        ValueError: the file of a process holds other bridges than that of process 0.
    """
    bridges, config = setup.bridges, setup.config
    if bridges is None:
        return
    checksums = processes.gather_text(bridges.checksum)
    other = next((process for process, found in enumerate(checksums) if found != checksums[0]), None)
    if other is not None:
        raise ValueError(
            f"nesting.bridge.file is '{config.nesting.bridge.file}', and process {other} finds other bridges there than"
            " process 0; give all of them the same file"
        )
    name = model_in_words(config.model.name, config.train.seed, setup.policy.version)
    # Equal files and equal fingerprints: all processes refuse, or none.
    bridges.check_weights(_bridge_path(config), fingerprint(setup.policy.model), name)


def _check_processes(config: Config) -> None:
    """Refuses what several processes cannot do."""
    count = processes.count()
    if count == 1:
        return
    if config.search.backend != "inline":
        raise ValueError(
            f"search.backend is '{config.search.backend}', with {count} processes; allowed is 'inline', since all"
            " processes search together; search.lag works with it too"
        )


def texts_of(loss: OfflineConfig) -> Callable[[Example], list[str]]:
    """The completions of an example that an offline objective learns from.

    Args:
        loss: the objective.
    """
    return demonstration if isinstance(loss, SftConfig) else pair


def _with_bridges(config: Config, policy: Policy) -> FittedBridges:
    """Gives the policy the bridges of the configuration's file; what the file holds."""
    nesting, num_layers, path = config.nesting, policy.num_layers, _bridge_path(config)
    fitted = read_bridges(path, policy.model)
    plan = None
    if nesting.is_deterministic:
        plan = draw_plan(jax.random.key(0), nesting, num_layers, fitted.divergence_L)
    fitted.check_plan(path, plan)
    policy.model.load_bridges(place_bridges(fitted.stack, policy.mesh))
    return fitted


def _bridge_path(config: Config) -> Path:
    assert config.nesting.bridge.file is not None
    return local_path(config.nesting.bridge.file)


def _check_prefill(config: Config, prompts: int) -> None:
    """Refuses a prefill that so many prompts cannot reach."""
    replay = config.replay
    # With resets, a prompt and its prefix count as one of many.
    most = prompts * replay.completions_per_prompt
    if replay.prefill > most and not config.reset.is_on:
        raise ValueError(
            f"replay.prefill is {replay.prefill}; allowed is 0 to {most}, since there are {prompts} training prompts"
            f" and replay.completions_per_prompt is {replay.completions_per_prompt}"
        )


def _warn_of_warmup(config: Config) -> None:
    """Says so where the learning rate is still rising when the run ends."""
    warmup, updates = config.optimizer.warmup_steps, config.train.steps * config.train.updates_per_batch
    if warmup >= updates:
        logger.warning(
            "optimizer.warmup_steps is %d, and the run makes %d updates: the learning rate rises to its end, to %.3g"
            " of %.3g",
            warmup,
            updates,
            config.optimizer.learning_rate * updates / warmup,
            config.optimizer.learning_rate,
        )


def check_positions(config: Config, model: ModelConfig) -> None:
    """Refuses sequences that are longer than the model allows.

    Args:
        config: gives the longest prompt and completion, in tokens.
        model: gives the positions that the model knows.

    Raises:
        ValueError: both together exceed the positions.
    """
    # The limits are compared and not the data, so the answer does not depend on what a source happens to hold.
    longest = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
    if longest > model.max_positions:
        raise ValueError(
            f"data.max_prompt_tokens + rollout.max_completion_tokens is {longest};"
            f" the model allows {model.max_positions} positions"
        )


def _without_held_out(
    config: Config, raw: list[tuple[list[Example], list[Example]]]
) -> list[tuple[list[Example], list[Example]]]:
    """Sources whose training examples are held out in none of them; removed ones are reported."""
    # A question may be in the training part of one source and held out in another.
    held_out = {example.question for _, heldout in raw for example in heldout}
    kept = []
    for source, (train, heldout) in zip(config.data.sources, raw, strict=True):
        remaining = [example for example in train if example.question not in held_out]
        if len(remaining) < len(train):
            logger.warning(
                "%s: %d training questions are held out in another source and were removed",
                field_path(source),
                len(train) - len(remaining),
            )
        if not remaining:
            raise ValueError(f"{field_path(source)} has no training question that is not held out in another source")
        kept.append((remaining, heldout))
    return kept


def _prompt_format(config: Config, source: SourceConfig) -> tuple[PromptFormat, str]:
    """How a source's questions become prompts, and where that stands in the configuration."""
    if source.prompt is None:
        return config.data.prompt, "data.prompt"
    return source.prompt, f"{field_path(source)}.prompt"


def check_answer_lengths(train: list[list[EncodedExample]], tokenizer: Tokenizer, max_completion_tokens: int) -> None:
    """Refuses a warm start on answers that do not fit into a completion, stop token included.

    Args:
        train: encoded training examples of each source.
        tokenizer: turns the answers into tokens.
        max_completion_tokens: C.

    Raises:
        ValueError: names the first answer that is too long, its source and its length.
    """
    for encoded in (encoded for examples in train for encoded in examples):
        # The stop token takes one place. An answer that was cut would teach the model not to stop.
        length = len(tokenizer.encode(encoded.example.answer)) + 1
        if length > max_completion_tokens:
            raise ValueError(
                f"rollout.max_completion_tokens is {max_completion_tokens}, but the answer {encoded.example.answer!r}"
                f" of source '{encoded.example.source}' takes {length} tokens with its end; raise it to at least that"
            )


def initial_policy(config: Config) -> Policy:
    """The policy that a configuration starts from, placed on its mesh, with adapters if it has any."""
    mesh = make_mesh(config.mesh)
    model, tokenizer = starting_model(config.model, config.lora, config.nesting.bridge, config.train.seed, mesh)
    return Policy(
        model,
        tokenizer,
        config.rollout.sampling,
        config.rollout.max_completion_tokens,
        config.data.prompt,
        mesh=mesh,
    )


def run_config(run: Path) -> Config:
    """The configuration that a run directory was made with.

    Raises:
        ValueError: it holds none, or one that this version cannot read.
    """
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"'{run}' is not a run directory: it has no config.json")
    try:
        return Config.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"'{path}' cannot be read: {error}") from None
