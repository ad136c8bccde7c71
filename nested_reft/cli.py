"""The command line: `nested-reft COMMAND ...`.

    train CONFIG [--FIELD VALUE ...]   train; every field of the configuration can be overridden
    train --resume RUN                 continue a run from its newest checkpoint
    eval POLICY                        held-out accuracy of a run or a model
    sample POLICY PROMPT               full and nested completions side by side
    report RUN                         figures and tables of a run, written into RUN/report
    measure-layers POLICY              each layer's divergence, for measured plans
    export RUN DIRECTORY               a Hugging Face directory of a run's trained model
    compile CONFIG --topology NAME     what a decode step and an update cost on a TPU that is not here
    verify-estimators                  exact bias and variance of every estimator, by enumeration

Exit codes: 0 done, 1 a check or an update failed, 2 bad input (refused before training), 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RUNS = "runs"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {
        "train": _train,
        "eval": _evaluate,
        "sample": _sample,
        "report": _report,
        "measure-layers": _measure_layers,
        "export": _export,
        "compile": _compile,
        "verify-estimators": _verify_estimators,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if arguments[0] == "--version":
        from nested_reft import __version__

        print(__version__)
        return 0
    if arguments[0] not in commands:
        print(f"error: command '{arguments[0]}' is unknown; known are {', '.join(commands)}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        commands[arguments[0]](arguments[1:])
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


class BadInput(Exception):
    """What the user gave cannot work: refused before training, with nothing written."""


@contextmanager
def _checking_input() -> Iterator[None]:
    """Errors of the preparations are the user's to mend: one line, exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise BadInput(str(error)) from error


def _train(arguments: list[str]) -> None:
    from nested_reft.checkpoints import newest_checkpoint
    from nested_reft.reports.figures import write_report
    from nested_reft.reports.tables import summary_table
    from nested_reft.rollout.dynamic_sampling import GenerationLimitError
    from nested_reft.run_directory import RunDirectory
    from nested_reft.train.memory import check_memory
    from nested_reft.train.setup import prepare
    from nested_reft.train.trainer import Trainer

    # Taken off first: argparse would take the value of an override that follows for it.
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    parser = _parser("train CONFIG", "Overrides follow as --FIELD VALUE; `train CONFIG --help` lists the fields.")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue this run directory instead of CONFIG")
    parser.add_argument("--runs", default=RUNS, help="where the run directory is made")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary here")
    known, overrides = parser.parse_known_args(arguments[1:] if name else arguments)
    if {"-h", "--help"} & set(overrides):
        parser.print_help()
        if name is None:
            return
        print()
    with _checking_input():
        config = _resolve_config(name, known.resume, overrides)
        _check_writable(known.json)
        _check_runs_directory(known.runs)
        if known.resume is not None and newest_checkpoint(known.resume / "checkpoints") is None:
            raise ValueError(f"run '{known.resume}' has no complete checkpoint to resume from")
        if known.resume is not None and newest_checkpoint(known.resume / "checkpoints") == config.train.steps:
            summary = known.resume / "summary.json"
            if summary.is_file():
                print(f"run '{known.resume}' is complete: {summary}")
                return
        setup = prepare(config)
        check_memory(setup)
        if known.resume is None:
            run = RunDirectory.create(Path(known.runs), config.name, config.to_json())
        else:
            run = RunDirectory(known.resume)
        print(f"run directory: {run.path}")
        trainer = Trainer(setup, run, resume=known.resume is not None)
    try:
        summary = trainer.run()
    except KeyboardInterrupt:
        if newest_checkpoint(run.path / "checkpoints") is not None:
            print(f"\nto continue: nested-reft train --resume {run.path}", file=sys.stderr)
        raise
    except GenerationLimitError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"\n{summary_table(summary)}")
    _write_json(known.json, summary)
    try:
        print(f"report: {write_report(run.path)['directory']}")
    except ImportError as error:
        print(f"no figures: {error}")


def _resolve_config(name: str | None, resume: Path | None, overrides: list[str]) -> Any:
    """The configuration of a name or a run, with overrides; a resumed run must keep its own."""
    from nested_reft.train.config import differences, load_config
    from nested_reft.train.setup import run_config

    if resume is None:
        if name is None:
            raise ValueError("train needs the name of a configuration as its first word, or --resume RUN")
        return _override(load_config(name), overrides)
    stored = run_config(resume)
    asked = _override(stored if name is None else load_config(name), overrides)
    changed = differences(stored.to_json(), asked.to_json())
    if changed:
        listed = "; ".join(f"{field} is {new!r}, the run has {old!r}" for field, old, new in changed)
        raise ValueError(f"run '{resume}' holds another configuration: {listed}. Resume without overrides")
    return stored


def _override(config: Any, overrides: list[str]) -> Any:
    import tyro

    return tyro.cli(
        type(config),
        default=config,
        args=overrides,
        prog="nested-reft train CONFIG",
        config=(tyro.conf.AvoidSubcommands,),
    )


def _evaluate(arguments: list[str]) -> None:
    import jax

    from nested_reft.evaluation import evaluate
    from nested_reft.reports.tables import evaluation_table

    parser = _parser("eval", "Greedy accuracy and pass@k on the held-out prompts of every source.")
    parser.add_argument("policy", help="a run directory, or a model as in model.name")
    parser.add_argument("--config", help="the configuration whose prompts to use; a run has its own")
    parser.add_argument("--skip-layers", type=int, nargs="+", default=[], help="evaluate the nested model without them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    known = parser.parse_args(arguments)
    with _checking_input():
        setup = _policy(known.policy, known.config)
        plan = _skipping(setup.model.config.num_layers, known.skip_layers)
        _check_writable(known.json)
    config = setup.config
    results = {
        source.name: evaluate(
            setup.model,
            setup.tokenizer,
            setup.heldout_examples[index],
            config.reward,
            config.evaluation,
            config.rollout.max_completion_tokens,
            config.rollout.sampling,
            jax.random.key(config.train.seed),
            samples=True,
            plan=plan,
        ).to_json()
        for index, source in enumerate(config.data.sources)
    }
    print(evaluation_table(results))
    _write_json(known.json, results)


def _sample(arguments: list[str]) -> None:
    import jax
    import numpy as np

    from nested_reft.data.prompts import PromptFormat
    from nested_reft.layer_skip import LayerPlan, NestingConfig, draw_plan
    from nested_reft.models.registry import load_model
    from nested_reft.reports.tables import printable
    from nested_reft.rollout.generate import generate
    from nested_reft.rollout.sampling import SamplingConfig
    from nested_reft.train.setup import trained_policy

    parser = _parser("sample", "Completions of one prompt by the full model and by a nested one.")
    parser.add_argument("policy", help="a run directory, or a model as in model.name")
    parser.add_argument("prompt", help="what the user says")
    parser.add_argument("--skip-ratio", type=float, default=0.2, help="share of layers skipped, drawn uniformly")
    parser.add_argument("--skip-layers", type=int, nargs="+", default=[], help="skip these layers instead")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: the run's own, 1 for a model")
    parser.add_argument("--max-tokens", type=int, help="default: 64, or the room that the prompt leaves")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    known = parser.parse_args(arguments)
    with _checking_input():
        _check_seed(known.seed)
        for flag, value in (("--max-tokens", known.max_tokens), ("--samples", known.samples)):
            if value is not None and not 1 <= value < 2**31:
                raise ValueError(f"{flag} is {value}; allowed is 1 to {2**31 - 1}")
        if not 0 <= known.skip_ratio < 1:
            raise ValueError(f"--skip-ratio is {known.skip_ratio}; allowed is 0 or more and less than 1")
        if known.temperature is not None and not 0 <= known.temperature < math.inf:
            raise ValueError(f"--temperature is {known.temperature}; allowed is 0 (greedy) or more")
        sampling = SamplingConfig(temperature=1.0 if known.temperature is None else known.temperature)
        nesting = NestingConfig(skip_ratio=known.skip_ratio)
        if (Path(known.policy) / "checkpoints").is_dir():
            policy = trained_policy(Path(known.policy))
            model, tokenizer, prompt = policy.model, policy.tokenizer, policy.config.data.prompt
            if known.temperature is None:
                sampling = policy.config.rollout.sampling
        else:
            (model, tokenizer), prompt = load_model(known.policy), PromptFormat()
        tokens = tokenizer.encode(prompt.write(known.prompt, tokenizer))
        num_layers = model.config.num_layers
        nesting.validate_for(num_layers)
        nested = _skipping(num_layers, known.skip_layers) or draw_plan(jax.random.key(known.seed), nesting, num_layers)
        room = model.config.max_positions - len(tokens)
        known.max_tokens = min(64, max(room, 1)) if known.max_tokens is None else known.max_tokens
        if not tokens or len(tokens) + known.max_tokens > model.config.max_positions:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens and --max-tokens is {known.max_tokens};"
                f" allowed are 1 to {model.config.max_positions} in all"
            )
    for label, plan in (("full", LayerPlan.full(num_layers)), ("nested", nested)):
        rollouts = generate(
            model,
            np.array([tokens], np.int32),
            np.array([len(tokens)], np.int32),
            plan,
            np.array(tokenizer.stop_ids, np.int32),
            jax.random.key(known.seed),
            group_size=known.samples,
            max_completion_tokens=known.max_tokens,
            sampling=sampling,
        )
        skipped = f", without layers {list(plan.skipped(num_layers))}" if label == "nested" else ""
        print(f"{label} ({plan.num_kept} of {num_layers} layers{skipped})")
        for text in tokenizer.decode_completions(np.asarray(rollouts.tokens_BGC), np.asarray(rollouts.length_BG))[0]:
            print(f"  {printable(text)}")


def _report(arguments: list[str]) -> None:
    from nested_reft.reports.figures import read_metrics, report_text, write_report

    parser = _parser("report", "Figures and tables of a run, from its metrics.jsonl, in RUN/report.")
    parser.add_argument("run", type=Path, help="a run directory; the run may still be going on")
    parser.add_argument("--audit", action="store_true", help="the curriculum's words of every step, not of the last 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables here")
    known = parser.parse_args(arguments)
    with _checking_input():
        _check_writable(known.json)
        result = write_report(known.run)
    print(report_text(result, read_metrics(known.run), None if known.audit else 5))
    print(f"\nfigures: {result['directory']}")
    _write_json(known.json, result)


def _measure_layers(arguments: list[str]) -> None:
    import jax
    import numpy as np

    from nested_reft.data.pipeline import batch_prompts
    from nested_reft.divergence import measure_layer_divergence, save_divergence, texts_of
    from nested_reft.layer_skip import LayerPlan
    from nested_reft.reports.tables import table
    from nested_reft.rollout.generate import generate

    parser = _parser("measure-layers", "KL(full || full without the layer) per token, for each layer.")
    parser.add_argument("policy", help="a run directory, or a model as in model.name")
    parser.add_argument("--config", help="the configuration whose prompts to use; a run has its own")
    parser.add_argument("--prompts", type=int, default=16, help="training prompts of the first source")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for nesting.divergence_file")
    known = parser.parse_args(arguments)
    with _checking_input():
        if known.prompts < 1:
            raise ValueError(f"--prompts is {known.prompts}; allowed is 1 or more")
        _check_writable(known.out)
        setup = _policy(known.policy, known.config)
    config, model = setup.config, setup.model
    examples = setup.train_examples[0][: known.prompts]
    prompts = batch_prompts(examples, [0] * len(examples), setup.prompt_size)
    temperature = config.rollout.sampling.temperature
    rollouts = generate(
        model,
        prompts.tokens_BP,
        prompts.length_B,
        LayerPlan.full(model.config.num_layers),
        np.array(setup.tokenizer.stop_ids, np.int32),
        jax.random.key(config.train.seed),
        group_size=1,
        max_completion_tokens=config.rollout.max_completion_tokens,
        sampling=config.rollout.sampling,
    )
    divergence_L = measure_layer_divergence(model, texts_of(rollouts), temperature)
    about = {
        "policy": known.policy,
        "config": config.name,
        "prompts": len(examples),
        "tokens": int(rollouts.length_BG.sum()),
        "temperature": temperature,
        "unit": "nats per completion token, KL(full || full without the layer)",
    }
    save_divergence(known.out, divergence_L, about)
    print(table(["layer", "divergence"], [[int(i), f"{divergence_L[i]:.3f}"] for i in np.argsort(divergence_L)]))
    print(f"written: {known.out}")


def _export(arguments: list[str]) -> None:
    from nested_reft.models.formats.huggingface import save_huggingface
    from nested_reft.train.setup import trained_policy

    parser = _parser("export", "Writes a directory that transformers loads; adapters are merged.")
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("directory", type=Path, help="a directory that does not exist yet")
    known = parser.parse_args(arguments)
    with _checking_input():
        if known.directory.exists():
            raise ValueError(f"'{known.directory}' exists already; give a new directory")
        policy = trained_policy(known.run)
        save_huggingface(policy.model, known.directory, policy.tokenizer)
    print(f"written: {known.directory}")


def _compile(arguments: list[str]) -> None:
    from nested_reft.models.registry import model_shape
    from nested_reft.reports.tables import cost_table
    from nested_reft.train.config import load_config
    from nested_reft.verification.compiled_costs import configured_costs, device_unit, topology_devices

    parser = _parser("compile", "Compiles one decode step, full and nested, and one update for a TPU topology.")
    parser.add_argument("config", help="the configuration whose shapes to use; overrides follow as --FIELD VALUE")
    parser.add_argument("--topology", default="v5e:2x2", help="as libtpu names it: v5e:4x4, v5p:2x2x1, v6e:2x2, ...")
    parser.add_argument("--model", help="another model: a known name, a directory or a GGUF file")
    parser.add_argument("--no-update", action="store_true", help="leave the update out: it takes longest to compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    known, overrides = parser.parse_known_args(arguments)
    with _checking_input():
        _check_writable(known.json)
        config = _override(load_config(known.config), overrides)
        name = known.model or config.model.name
        shape = config.model.shape if name == "scratch" else model_shape(name)
        devices = topology_devices(known.topology)
        costs = configured_costs(config, shape, devices, with_update=not known.no_update)
    results = [cost.to_json() for cost in costs]
    unit = device_unit(devices)
    programs = ", ".join({cost.program: f"{cost.program} in {cost.dtype}" for cost in costs}.values())
    print(f"{programs}, for {config.mesh.data * config.mesh.model} of {len(devices)} {unit}s of {known.topology}\n")
    print(cost_table(results, unit))
    _write_json(known.json, results)


def _verify_estimators(arguments: list[str]) -> None:
    from nested_reft.reports.tables import estimator_table
    from nested_reft.verification.enumeration import verify_estimators

    parser = _parser("verify-estimators", "Exact bias and variance of every estimator on an enumerable model.")
    parser.add_argument("--seed", type=int, default=0, help="of the model's parameters")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    known = parser.parse_args(arguments)
    with _checking_input():
        _check_writable(known.json)
        _check_seed(known.seed)
    reports = verify_estimators(seed=known.seed)
    results = [report.to_json() for report in reports]
    print(estimator_table(results))
    _write_json(known.json, results)
    broken = [f"{report.estimator} ({report.scenario})" for report in reports if not report.keeps_claim]
    if broken:
        print(f"\nerror: not as unbiased as claimed: {'; '.join(broken)}", file=sys.stderr)
        raise SystemExit(1)


def _policy(policy: str, config_name: str | None) -> Any:
    """The setup of a run directory, or of a model on a configuration's prompts."""
    from nested_reft.train.config import load_config
    from nested_reft.train.setup import prepare, trained_policy

    if (Path(policy) / "config.json").is_file() and (Path(policy) / "checkpoints").is_dir():
        if config_name is not None:
            raise ValueError(f"--config is '{config_name}', but '{policy}' is a run, which has its own; leave it out")
        trained = trained_policy(Path(policy))
        return prepare(_without_plans(trained.config), trained)
    if config_name is None:
        raise ValueError(f"'{policy}' is not a run directory; name the configuration whose prompts to use: --config")
    config = load_config(config_name)
    if policy != config.model.name:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=policy, shape=None))
    return prepare(_without_plans(config))


def _without_plans(config: Any) -> Any:
    """The configuration of commands that draw no plans and so need nothing that plans need."""
    return dataclasses.replace(config, nesting=type(config.nesting)(), nesting_control=type(config.nesting_control)())


def _skipping(num_layers: int, layers: list[int]) -> Any:
    """The plan without `layers`, checked; None where there are none."""
    from nested_reft.layer_skip import LayerPlan, NestingConfig

    if not layers:
        return None
    try:
        NestingConfig(choice="fixed", layers=tuple(layers)).validate_for(num_layers)
    except ValueError as error:
        raise ValueError(str(error).replace("nesting.layers", "--skip-layers")) from None
    return LayerPlan.skipping(num_layers, layers)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    is_train = command.startswith("train")  # its --help comes with that of the fields
    return argparse.ArgumentParser(
        f"nested-reft {command}", description=description, allow_abbrev=False, add_help=not is_train
    )


def _check_runs_directory(runs: str) -> None:
    taken = [path for path in (Path(runs), *Path(runs).absolute().parents) if path.exists() and not path.is_dir()]
    if not runs or taken:
        raise ValueError(
            f"--runs is '{runs}'; allowed is a directory, or one that can be made"
            + (f": '{taken[0]}' is a file" if taken else "")
        )


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**31:
        raise ValueError(f"--seed is {seed}; allowed is 0 to {2**31 - 1}")


def _check_writable(path: Path | None) -> None:
    from nested_reft.json_files import check_writable

    if path is not None:
        check_writable(path)


def _write_json(path: Path | None, value: Any) -> None:
    if path is not None:
        from nested_reft.json_files import write_json

        write_json(path, value)


if __name__ == "__main__":
    sys.exit(main())
