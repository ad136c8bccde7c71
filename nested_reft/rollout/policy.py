"""A policy: a model that can answer. Everything that samples or scores goes through it.

Searchers, evaluation, the `sample` command, throughput and notebooks all use this one class. It works
on two levels: `generate` and `logprobs` on arrays of tokens, `sample` and `score` on texts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from nested_reft.checkpoint_identity import check_format, check_identity, checkpoint_identity
from nested_reft.checkpoints import Checkpoints, DamagedCheckpointError, check_directory, newest_checkpoint
from nested_reft.fields import read
from nested_reft.json_files import differences
from nested_reft.layer_plan import LayerPlan
from nested_reft.layer_skip import NestingConfig, PlanRule
from nested_reft.models.heads import ScalarHead
from nested_reft.models.lora import LoraConfig, split_trainable
from nested_reft.models.registry import load_model
from nested_reft.models.source import ModelSource, starting_model
from nested_reft.models.transformer import Transformer
from nested_reft.prompt_format import PromptFormat
from nested_reft.rollout.exact import ExactRollouts, generate_exact
from nested_reft.rollout.generate import generate
from nested_reft.rollout.logprobs import completion_logprobs
from nested_reft.rollout.refill import generate_refilled
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.rollout.schedule import refills
from nested_reft.run_mirror import address_of, local_run
from nested_reft.sharding import (
    MeshConfig,
    batch_devices,
    make_mesh,
    on_mesh,
    one_device,
    place_as,
    replicate,
    spread,
    to_host,
)
from nested_reft.tokenizer import Tokenizer
from nested_reft.types import ForcedPrefixes, Prompts, Rollouts

DEFAULT_MAX_TOKENS = 64  # of a bare model, which no configuration gives a limit


@dataclass(frozen=True)
class Completion:
    """One sampled text.

    Attributes:
        text: the completion; untrusted, since a model wrote it.
        tokens: its token ids, the stop token included.
        logprob: log-probability of the whole completion under the policy that drew it, in nats.
        finished: False where it was cut off at the limit.
    """

    text: str
    tokens: tuple[int, ...]
    logprob: float
    finished: bool


@dataclass(frozen=True, eq=False)
class Policy:
    """A model with all that sampling from it takes.

    A policy never changes. One that was handed out goes on working while the learner trains.

    Attributes:
        model: its weights, on the mesh.
        tokenizer: the model's.
        sampling: temperature and truncation, unless a call says otherwise.
        max_completion_tokens: C, unless a call says otherwise.
        prompt: how a question becomes a prompt.
        plans: how the run that it is of draws its next plan; None of a model, and within a run.
        version: updates that the weights have seen in their phase.
        mesh: where batches are placed; prompts are spread over its `slice`, `data` and `fsdp` axes.
    """

    model: Transformer
    tokenizer: Tokenizer
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_completion_tokens: int = DEFAULT_MAX_TOKENS
    prompt: PromptFormat = field(default_factory=PromptFormat)
    plans: PlanRule | None = None
    version: int = 0
    mesh: Mesh = field(default_factory=one_device)

    @classmethod
    def load(cls, source: Any, mesh: MeshConfig | None = None) -> Policy:
        """The policy of a run's newest checkpoint, or of a model.

        A policy is placed on one device unless a mesh is given, whatever the run's mesh was.

        Examples:
            >>> policy = Policy.load(run)  # also a run directory, or a model such as "smollm2-135m"
            >>> policy.num_layers
            6

        Args:
            source: a run directory (or an object with a `path` that is one), or a model's name, GGUF file,
                Hugging Face directory or hub id.
            mesh: the devices of a run's policy; None for one.

        Raises:
            ValueError, FileNotFoundError: neither a run with a checkpoint nor a model.
        """
        # A `Run` is known by its path alone, because this room does not import the one that defines it.
        path = local_run(getattr(source, "path", source))
        # A Hugging Face directory has a config.json too, but no versions.json.
        if (path / "checkpoints").exists() or (path / "versions.json").is_file():
            return _of_run(path, one_device() if mesh is None else make_mesh(mesh))
        model, tokenizer = load_model(str(source))
        return cls(model, tokenizer)

    @property
    def num_layers(self) -> int:
        """L, the number of layers of the full model."""
        return self.model.config.num_layers

    def on(self, mesh: Mesh) -> Policy:
        """The same policy with its weights on other devices.

        Args:
            mesh: the devices, in the shape of the policy's own mesh.
        """

        def moved(array: jax.Array) -> jax.Array:
            # What lies on one device, and not on a mesh, is replicated.
            spec = array.sharding.spec if isinstance(array.sharding, NamedSharding) else PartitionSpec()
            return place_as(array, NamedSharding(mesh, spec))

        return dataclasses.replace(self, model=jax.tree.map(moved, self.model), mesh=mesh)

    def generate(
        self,
        prompts: Prompts,
        plan: LayerPlan | None,
        key: jax.Array,
        *,
        group_size: int = 1,
        sampling: SamplingConfig | None = None,
        max_completion_tokens: int | None = None,
        shared_prefix: int = 0,
        forced: ForcedPrefixes | None = None,
        number_B: Int[np.ndarray, " B"] | None = None,
        rows: int = 0,
        stops: bool = True,
    ) -> Rollouts:
        """Samples `group_size` completions of each prompt, on the devices.

        Args:
            prompts: what to answer.
            plan: the layers that act; None is the full model.
            key: PRNG key; what a completion draws depends on it, on its prompt's number and on its place in its group.
            group_size: G.
            sampling, max_completion_tokens: other than the policy's own.
            shared_prefix: leading tokens that all prompts have in common.
            forced: first tokens of the completions; None takes those of the prompts, if any.
            number_B: the number of each prompt; None is its place among these.
            rows: completions that are decoded at the same time (`rollout.refill`), and more where the mesh does not
                divide them; 0 decodes all of them.
            stops: False goes on to the limit whatever is drawn, so that speeds can be compared.

        Raises:
            ValueError: a forced prefix does not fit into a completion.
        """
        limit = max_completion_tokens or self.max_completion_tokens
        # Devices share the rows, so rows are added until the mesh divides them.
        devices = batch_devices(self.mesh)
        rows = -(-rows // devices) * devices
        # Where nothing would wait, the plain program is the faster one.
        waits = refills(rows, len(prompts) * group_size)
        program = partial(generate_refilled, rows=rows) if waits else generate
        with on_mesh(self.mesh):
            return program(
                self.model,
                self._spread(prompts.tokens_BP),
                self._spread(prompts.length_B),
                # Rollouts record the kept layers, so the full model is a plan here too.
                replicate(LayerPlan.full(self.num_layers) if plan is None else plan, self.mesh),
                self._stop_ids(stops),
                # Keys of a run stay on the host, where plans and prompts are drawn too.
                replicate(key, self.mesh),
                # A number that may change from call to call is an argument; as a constant it would recompile.
                self.version,
                self._spread(_fitting(prompts.forced if forced is None else forced, limit)),
                self._spread(np.arange(len(prompts), dtype=np.int32) if number_B is None else number_B),
                group_size=group_size,
                max_completion_tokens=limit,
                sampling=sampling or self.sampling,
                shared_prefix=shared_prefix,
            )

    def generate_exact(
        self,
        prompts: Prompts,
        plan: LayerPlan,
        key: jax.Array,
        *,
        group_size: int,
        draft_length: int,
        shared_prefix: int = 0,
        stops: bool = True,
    ) -> ExactRollouts:
        """Samples of the full model that the plan's nested policy drafts; see `rollout.exact`.

        Args:
            prompts, key, group_size, shared_prefix, stops: as in `generate`.
            plan: the layers that draft.
            draft_length: tokens drafted before each verification.

        Raises:
            ValueError: a forced prefix does not fit into a completion.
        """
        with on_mesh(self.mesh):
            return generate_exact(
                self.model,
                self._spread(prompts.tokens_BP),
                self._spread(prompts.length_B),
                replicate(plan, self.mesh),
                self._stop_ids(stops),
                replicate(key, self.mesh),
                self.version,
                self._spread(_fitting(prompts.forced, self.max_completion_tokens)),
                group_size=group_size,
                max_completion_tokens=self.max_completion_tokens,
                sampling=self.sampling,
                draft_length=draft_length,
                shared_prefix=shared_prefix,
            )

    def logprobs(
        self,
        prompt_BP: Int[Array, "B P"],
        prompt_length_B: Int[Array, " B"],
        tokens_BGC: Int[Array, "B G C"],
        plan: LayerPlan | None = None,
        shared_prefix: int = 0,
    ) -> Float[Array, "B G C"]:
        """log pi of every completion token, in nats, at the policy's temperature; see `completion_logprobs`.

        Args:
            prompt_BP, prompt_length_B: right-padded prompts, and the valid tokens of each.
            tokens_BGC: completions, right-padded.
            plan: the layers that act; None is the full model.
            shared_prefix: leading tokens that all prompts have in common.

        Returns:
            0 or less; entries at padding mean nothing and are to be masked by length.
        """
        with on_mesh(self.mesh):
            return _logprobs(
                self.model, prompt_BP, prompt_length_B, tokens_BGC, plan, self.sampling.temperature, shared_prefix
            )

    def sample(
        self,
        prompts: str | Sequence[str],
        plan: LayerPlan | None = None,
        samples: int = 1,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        chat: bool | None = None,
    ) -> list[list[Completion]]:
        """Completions of texts that a user says, `[prompt][sample]`.

        Examples:
            >>> answers = policy.sample(["12 =", "345 ="], plan=LayerPlan.skipping(6, [2]), samples=2)
            >>> len(answers), len(answers[0])
            (2, 2)

        Args:
            prompts: one message, or several that are answered in one batch.
            plan: the layers that act; None is the full model.
            samples: completions of each prompt.
            temperature: other than the policy's own, whose top-k and top-p stay; 0 is greedy.
            max_tokens: other than the policy's own limit.
            seed: decides what is drawn.
            chat: True applies the chat template and False does not; None does as the policy's prompt says.

        Raises:
            ValueError: a prompt has no tokens, or prompt and completion exceed the model's positions.
        """
        messages = [prompts] if isinstance(prompts, str) else list(prompts)
        batch = self.prompts_of(messages, chat)
        # An explicit 0 is refused below and must not turn into the default.
        if samples < 1:
            raise ValueError(f"samples is {samples}; allowed is 1 or more")
        self._check_plan(plan)
        limit = self.max_completion_tokens if max_tokens is None else max_tokens
        self._check_room(batch, limit)
        sampling = self.sampling
        if temperature is not None:
            # Top-k and top-p stay: they are another part of the policy, and the caller has not changed it.
            sampling = dataclasses.replace(sampling, temperature=temperature)
        # All fields come to the host in one transfer, because the texts are made there.
        rollouts = to_host(
            self.generate(
                batch,
                plan,
                jax.random.key(seed),
                group_size=samples,
                sampling=sampling,
                max_completion_tokens=limit,
            )
        )
        return [[self._completion(rollouts, row, number) for number in range(samples)] for row in range(len(messages))]

    def score(
        self,
        prompts: str | Sequence[str],
        completions: str | Sequence[str],
        plan: LayerPlan | None = None,
        chat: bool | None = None,
    ) -> list[Float[np.ndarray, " tokens"]]:
        """log pi of every token of given completions, in nats, one array for each pair.

        Examples:
            >>> (logprobs,) = policy.score("12 =", "12")
            >>> bool((logprobs <= 0).all())
            True

        Args:
            prompts: what a user says, one for each completion.
            completions: what is answered; no stop token is added.
            plan: the layers that act; None is the full model.
            chat: as in `sample`.

        Raises:
            ValueError: the two differ in number, or one of them has no tokens.
        """
        # A string is a sequence of its characters, which nobody means.
        prompts, completions = ([x] if isinstance(x, str) else x for x in (prompts, completions))
        self._check_plan(plan)
        if len(prompts) != len(completions):
            raise ValueError(
                f"score got {len(prompts)} prompts and {len(completions)} completions; give as many of both"
            )
        batch = self.prompts_of(list(prompts), chat)
        ids = [self.tokenizer.encode(text) for text in completions]
        if not all(ids):
            raise ValueError("score got a completion without tokens; every completion needs at least one")
        # Each completion is a group of one under its own prompt.
        tokens_BGC = np.zeros((len(ids), 1, max(map(len, ids))), np.int32)
        for row, tokens in enumerate(ids):
            tokens_BGC[row, 0, : len(tokens)] = tokens
        self._check_room(batch, tokens_BGC.shape[-1])
        found = to_host(
            self.logprobs(jnp.asarray(batch.tokens_BP), jnp.asarray(batch.length_B), jnp.asarray(tokens_BGC), plan)
        )
        # Attention is causal, so padding after a completion changed nothing before it.
        return [found[row, 0, : len(tokens)] for row, tokens in enumerate(ids)]

    def prompts_of(self, messages: Sequence[str], chat: bool | None = None) -> Prompts:
        """What users say as prompts that `generate` takes, without gold answers.

        >>> prompts = policy.prompts_of(["12 =", "345 ="])
        >>> prompts.length_B.tolist()
        [4, 5]

        Args:
            messages: one of each prompt.
            chat: as in `sample`.

        Raises:
            ValueError: there is no prompt, or one has no tokens.
        """
        how = self.prompt if chat is None else self.prompt.with_chat(chat)
        texts = [how.write(message, self.tokenizer) for message in messages]
        ids = [how.encode(text, self.tokenizer) for text in texts]
        if not texts or not all(ids):
            raise ValueError("a prompt has no tokens; every prompt needs at least one")
        tokens_BP = np.zeros((len(ids), max(map(len, ids))), np.int32)
        for row, tokens in enumerate(ids):
            tokens_BP[row, : len(tokens)] = tokens
        length_B = np.array([len(tokens) for tokens in ids], np.int32)
        # A user's message has no gold answer; nothing here is scored.
        nothing = ("",) * len(texts)
        return Prompts(tokens_BP, length_B, np.zeros(len(texts), np.int32), tuple(texts), nothing, ({},) * len(texts))

    def prompt_tokens(self, message: str) -> int:
        """How many tokens the prompt of a user's message has."""
        return len(self.prompt.encode(self.prompt.write(message, self.tokenizer), self.tokenizer))

    def _spread(self, values: Any) -> Any:
        """Prompts spread over the mesh's devices; whole on every device where they do not divide by it."""
        return None if values is None else spread(values, self.mesh)

    def _stop_ids(self, stops: bool) -> Array:
        """The tokens that end a completion; with `stops` False as many that no model can draw."""
        # The number of ids stays, because another shape would compile the whole program again.
        ids = np.array(self.tokenizer.stop_ids, np.int32)
        return replicate(ids if stops else np.full_like(ids, -1), self.mesh)

    def _check_plan(self, plan: LayerPlan | None) -> None:
        """Refuses a plan that was made for a deeper model: its layers would silently be others here."""
        if plan is not None and int(np.max(np.asarray(plan.layer_S))) >= self.num_layers:
            raise ValueError(
                f"the plan keeps layer {int(np.max(np.asarray(plan.layer_S)))}; the model has layers 0 to"
                f" {self.num_layers - 1}"
            )

    def _check_room(self, prompts: Prompts, max_tokens: int) -> None:
        longest, room = int(prompts.length_B.max()), self.model.config.max_positions
        if max_tokens < 1 or longest + max_tokens > room:
            raise ValueError(
                f"the longest prompt has {longest} tokens and max_tokens is {max_tokens};"
                f" allowed are 1 to {room} in all"
            )

    def _completion(self, rollouts: Rollouts, row: int, number: int) -> Completion:
        length = int(rollouts.length_BG[row, number])
        tokens = tuple(int(token) for token in rollouts.tokens_BGC[row, number, :length])
        # Entries at or after the end are zero, so the sum is that of the whole completion.
        logprob = float(rollouts.behavior_logprob_BGC[row, number, :length].sum())
        return Completion(self.tokenizer.decode(tokens), tokens, logprob, bool(rollouts.finished_BG[row, number]))


def _fitting(forced: ForcedPrefixes | None, limit: int) -> ForcedPrefixes | None:
    """The prefixes without padding beyond the limit. Compiled programs would move what does not fit, without a word, so
    lengths that do not are refused here."""
    if forced is None:
        return None
    length_BG, most = np.asarray(forced.length_BG), min(forced.tokens_BGF.shape[-1], limit)
    wrong = length_BG[(length_BG < 0) | (length_BG > most)]
    if wrong.size:
        raise ValueError(
            f"forced.length_BG holds {int(wrong[0])}; allowed is 0 to {most}: prefixes have"
            f" {forced.tokens_BGF.shape[-1]} tokens, and completions {limit}"
        )
    return dataclasses.replace(forced, tokens_BGF=forced.tokens_BGF[..., :limit])


@partial(jax.jit, static_argnames=("temperature", "shared_prefix"))
def _logprobs(
    model: Transformer,
    prompt_BP: Array,
    length_B: Array,
    tokens_BGC: Array,
    plan: LayerPlan | None,
    temperature: float,
    shared_prefix: int,
) -> Array:
    return completion_logprobs(model, prompt_BP, length_B, tokens_BGC, temperature, plan, shared_prefix=shared_prefix)[
        0
    ]


def _of_run(run: Path, mesh: Mesh) -> Policy:
    """The policy of a run directory's newest checkpoint.

    The run may have had more devices than this machine has, so its own mesh is not read. Of what else describes the
    run, only the parts of `config.json` that describe the policy are read: a policy knows nothing of training.

    Raises:
        ValueError: not a run directory, one that this version cannot read, or without a complete checkpoint.
    """
    try:
        stored = json.loads((run / "config.json").read_text(encoding="utf-8"))
        source = read(ModelSource, stored["model"], "model")
        lora = read(LoraConfig, stored["lora"], "lora")
        sampling = read(SamplingConfig, stored["rollout"]["sampling"], "rollout.sampling")
        prompt = read(PromptFormat, stored["data"]["prompt"], "data.prompt")
        nesting = read(NestingConfig, stored["nesting"], "nesting")
        # A critic, or the head of a reward model.
        has_head = stored["loss"].get("critic") is not None or stored["loss"].get("kind") == "bradley_terry"
        seed, limit = int(stored["train"]["seed"]), int(stored["rollout"]["max_completion_tokens"])
        keep = int(stored["train"]["keep_checkpoints"])
    except FileNotFoundError:
        raise ValueError(f"'{run}' is not a run directory: it has no config.json") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"'{run / 'config.json'}' cannot be read: {error}") from None
    # This check comes before the model is loaded, because loading is slow.
    check_directory(run / "checkpoints")
    if newest_checkpoint(run / "checkpoints") is None:
        raise ValueError(f"run '{address_of(run)}' has no complete checkpoint yet")
    # A checkpoint holds only what trained. The frozen rest follows from the configuration and the seed.
    model, tokenizer = starting_model(source, lora, nesting.bridge, seed, mesh)
    if has_head:
        model.value_head = ScalarHead(model.config.width)
    graph, trainable, frozen = split_trainable(model)
    # Optimizer moments are not read: sampling does not need them.
    like = {"trainable": trainable, "updates": jnp.zeros((), jnp.int32)}
    if model.bridges is not None:
        like["bridges"] = model.bridges.stack()
    # Each of several processes loads it for itself: a reward model is loaded while only one of them may be at it.
    with Checkpoints(run / "checkpoints", keep, alone=True) as checkpoints:
        identity = checkpoint_identity(source.name, model.config, tokenizer)
        arrays, host = _newest(checkpoints, run / "config.json", stored, like, identity)
    model = nnx.merge(graph, arrays["trainable"], frozen)
    if model.bridges is not None:
        model.load_bridges(arrays["bridges"])
    # What the run has measured, fitted and chosen by now, and not what its configuration began with.
    fitted = not nesting.bridge.is_on or host["bridging"]["fits"] > 0
    plans = PlanRule(nesting, host["divergence"], host["nesting"]["num_skipped"], fitted)
    return Policy(model, tokenizer, sampling, limit, prompt, plans, int(arrays["updates"]), mesh)


def _newest(
    checkpoints: Checkpoints, config: Path, stored: dict[str, Any], like: dict[str, Any], identity: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and host values of the newest checkpoint, of a run that may be going on.

    Raises:
        ValueError: the checkpoint is damaged, or of another configuration.
    """
    while True:
        (number, *_) = checkpoints.numbers()
        try:
            host = checkpoints.restore_host(number)
            where, identity_there = f"checkpoint {number}", host.get("identity")
            # Versions come first, because another one's values may mean something else.
            check_format(identity_there, where)
            written = host["config"]
            for name in ("model", "lora", "rollout", "nesting"):
                for field, was, now in differences(written[name], stored[name], f"{name}."):
                    raise ValueError(
                        f"'{config}' is not that of checkpoint {number}: {field} is {now!r}, and was {was!r}; change it"
                        " back"
                    )
            check_identity(identity_there, identity, where)
            return checkpoints.restore_some(number, like), host
        except DamagedCheckpointError:
            # A run that goes on removes old checkpoints, perhaps while this one was read.
            if checkpoints.numbers()[:1] in ([], [number]):
                raise
