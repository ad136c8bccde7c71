"""Tries bad inputs of the command line and of configurations, and says which are refused clearly.

    python scripts/bad_inputs.py          # about 400 inputs in one process; exit code 1 below 98 % clear
    python scripts/bad_inputs.py --all    # the table lists every input, not only those that are not clear

An input is refused clearly when the command ends with code 2 after one line, and the line names what the input is
about and what is allowed. Nothing trains: where a refusal is missing, the attempt ends when the trainer would open.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nested_reft.cli.main import main as command_line  # noqa: E402
from nested_reft.reports.tables import table  # noqa: E402
from nested_reft.untrusted import printable  # noqa: E402

CLEAR_SHARE = 0.98
# A refusal says what would be right, in one of these ways.
REMEDY = re.compile(
    r"allow(ed|s)|known are|did you mean|needs?|must|does not exist|is not a run|not installed|name the|name a|set "
    r"|give |cannot be (read|used)|leave|required|there is no|lower|is not JSON|already|fails:|has (no )?|expected|only"
    r"|does not load"
)


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        arguments: of the command line.
        about: what the refusal has to name.
    """

    arguments: tuple[str, ...]
    about: str


@dataclass(frozen=True)
class Verdict:
    """How a command answered.

    Attributes:
        case: the input.
        message: what it printed; the last line of a traceback where it raised.
        problem: why that is not clear; empty where it is.
    """

    case: Case
    message: str
    problem: str


class Accepted(Exception):
    """The command would have begun to work."""


def try_input(case: Case) -> Verdict:
    """Runs the command line on a bad input, up to where a run would begin.

    Args:
        case: the input.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = command_line(list(case.arguments))
    except Accepted:
        return Verdict(case, "", "accepted")
    except BaseException as error:
        return Verdict(case, f"{type(error).__name__}: {error}", "a traceback")
    # Warnings of the preparations may come before the refusal.
    lines = [line for line in errors.getvalue().splitlines() if not line.startswith("WARNING: ")]
    return Verdict(case, "\n".join(lines), _problem(case, code, lines))


def _problem(case: Case, code: int, lines: Sequence[str]) -> str:
    if code != 2:
        return f"exit code {code}"
    if len(lines) != 1 or not lines[0].startswith("error: "):
        return f"{len(lines)} lines"
    if not lines[0].isprintable():
        return "control characters"
    if case.about.lower().replace("-", "_") not in lines[0].lower().replace("-", "_"):
        return f"does not name {case.about}"
    if len(lines[0]) > 1500:
        return "too long"
    return "" if REMEDY.search(lines[0]) else "does not say what is allowed"


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Replaces what begins the work of each command, so that a bad input that is accepted costs no time."""
    from nested_reft import api
    from nested_reft.cli import compile, evaluate, export, measure_layers, report, sample, verify_estimators
    from nested_reft.training.config import load_config
    from nested_reft.training.setup import initial_policy

    def accepted(*_: object, **__: object) -> None:
        raise Accepted

    with contextlib.ExitStack() as stack:
        for module, name in (
            (api, "Trainer"),
            (api.RunDirectory, "create"),
            (evaluate, "evaluate_sources"),
            (sample.Policy, "sample"),
            (measure_layers, "_full_rollouts"),
            (compile.compiled_costs, "decode_costs"),
            (export, "save_huggingface"),
            (report, "report_text"),
            (verify_estimators.enumeration, "verify_estimators"),
        ):
            stack.enter_context(mock.patch.object(module, name, accepted))
        # A small model in the place of one that takes seconds to load.
        policy, load = initial_policy(load_config("tiny")), sample.Policy.load
        known = lambda source, *mesh: policy if source == "smollm2-135m" else load(source, *mesh)  # noqa: E731
        stack.enter_context(mock.patch.object(sample.Policy, "load", known))
        yield


# Field -> values that cannot be, for `train tiny`. The field is what the refusal has to name.
FIELDS: dict[str, tuple[str, ...]] = {
    "train.steps": ("0", "-1", "1.5", "abc", "", "None", str(2**31), str(2**64), "9" * 400, "True"),
    "train.seed": ("-1", str(2**32), str(2**64), "1e3", "x"),
    "train.updates_per_batch": ("0", "100000000", "x"),
    "train.mini_batches": ("0", "7", "x"),
    "train.micro_batches": ("0", "7", "x"),
    "train.remat": ("1", "maybe"),
    "train.checkpoint_every": ("0", "-5", "x"),
    "train.keep_checkpoints": ("0", "x"),
    "train.ess_warning": ("0", "1", "nan", "x"),
    "train.stop_after_empty_updates": ("0", "-1", "x"),
    "train.stop_after_nonfinite_updates": ("0", "-1", "None"),
    "train.stall_seconds": ("0", "-1", "nan", "x"),
    "train.wandb_project": ("", "team/project"),
    "model.name": ("", "gpt-9", "./none.gguf", "runs/none", "a/b/c", "/dev/null", "~nobody/model"),
    "model.dtype": ("float16", "int8"),
    "data.prompts_per_batch": ("0", "-1", "x", str(2**40)),
    "data.max_prompt_tokens": ("0", "4", "x", str(2**40)),
    "data.too_long": ("cut",),
    "data.prompt.template": ("no field", "{question[a]}", "{question:9999999}", "{", "{unknown}", "{0}"),
    "data.prompt.chat": ("yes",),
    "data.prompt.demonstrations": ("one",),
    "data.split.kind": ("half",),
    "data.split.parts": ("1", "-1"),
    "data.split.samples": ("0", str(2**31)),
    "data.sources.0.task": ("chain_sun", ""),
    "data.sources.0.train_size": ("0", "-1", "x", str(2**31 - 1)),
    "data.sources.0.heldout_size": ("0", "x", str(2**31 - 1)),
    "data.sources.0.seed": ("-1", str(2**32)),
    "data.sources.0.level": ("-1", "x", "1000"),
    "data.sources.0.checker": ("guess",),
    "data.sources.0.name": ("",),
    "rollout.group_size": ("0", "1", "x", str(2**31 - 1)),
    "rollout.max_completion_tokens": ("0", "x", "1000000", str(2**31 - 1)),
    "rollout.mode": ("fast",),
    "rollout.weights": ("int4",),
    "rollout.mixture_alpha": ("0", "1.5", "nan", "x"),
    "rollout.draft_length": ("0", "x", str(2**31 - 1)),
    "rollout.sampling.temperature": ("0", "-1", "nan", "inf", "1e-30", "1e30", "x"),
    "rollout.sampling.top_k": ("-1", "x"),
    "rollout.sampling.top_p": ("0", "1.1", "nan", "x"),
    "nesting.skip_ratio": ("-0.1", "1", "1.5", "nan", "x"),
    "nesting.border": ("-1", "3", "x", str(2**31 - 1)),
    "nesting.choice": ("random", "measured", "fixed"),
    "nesting.layers": ("1", "x", "-1"),
    "nesting.divergence_file": ("none.json", "folder", "file", "/dev/zero", "deep.json"),
    "nesting.divergence_temperature": ("-1", "nan", "inf"),
    "nesting.remeasure_every": ("-1", "5", "x"),
    "nesting.remeasure_prompts": ("0",),
    "nesting.remeasure_completions": ("0",),
    "reward.checker": ("guess", "function"),
    "reward.format_weight": ("-1", "nan", "inf", "1e39", "x"),
    "reward.function": ("nothing", "none.py:f", "json:none", "json:dumps:x"),
    "reward.safety": ("nothing", "none.py:f", "json:none"),
    "reward.function_weight": ("nan", "1e39"),
    "reward.overlong_cache_tokens": ("-1", "100000", "x"),
    "reward.overlong_weight": ("-1", "nan"),
    "reward.workers": ("0", "-1", "x", "100000"),
    "reward.time_limit_seconds": ("0", "-1", "nan", "inf"),
    "reward.memory_gib": ("-1", "nan", "inf", "1e-9", "1e20"),
    "loss.advantage": ("best",),
    "loss.bias_mitigation": ("guess", "retrace", "mixture"),
    "loss.level": ("word",),
    "loss.normalization": ("mean",),
    "loss.truncate_at": ("0", "-1", "nan", "x"),
    "loss.reject_by": ("token", "token_ratio", ""),
    "loss.reject_below": ("0.5", "nan"),
    "loss.reject_above": ("2", "x"),
    "loss.obrs_lambda": ("0", "nan", "x"),
    "loss.mix_share": ("0.5", "2", "x"),
    "loss.clip_policies": ("both", "four"),
    "loss.clip_level": ("prefix", "sequence"),
    "loss.clip_low": ("-1", "nan", "x"),
    "loss.clip_high": ("-1", "nan"),
    "loss.dual_clip": ("0", "nan"),
    "loss.reference_kl": ("k4",),
    "loss.reference_kl_coefficient": ("-1", "nan", "1e999"),
    "loss.entropy_coefficient": ("nan", "1e999", "x"),
    "loss.kind": ("supervized", ""),
    "loss.retrace_lambda": ("-1", "nan"),
    "loss.fixed_length_tokens": ("0", "x"),
    "optimizer.learning_rate": ("0", "-1", "nan", "inf", "1e999", "x"),
    "optimizer.schedule": ("step",),
    "optimizer.warmup_steps": ("-1", "x", str(2**31)),
    "optimizer.weight_decay": ("-1", "nan"),
    "optimizer.beta1": ("1", "-0.1", "nan"),
    "optimizer.beta2": ("1", "-0.1", "nan"),
    "optimizer.max_gradient_norm": ("0", "-1", "nan"),
    "evaluation.every_steps": ("0", "x"),
    "evaluation.samples_per_prompt": ("-1", "x", str(2**31 - 1)),
    "evaluation.pass_k": ("0", "9", "x"),
    "evaluation.batch_size": ("0", "x", str(2**31 - 1)),
    "curriculum.kind": ("random", "static"),
    "curriculum.window": ("0", "x"),
    "curriculum.temperature": ("-1", "nan"),
    "curriculum.weights": ("1", "nan"),
    "curriculum.promote_at": ("0", "2"),
    "mix_control.ess": ("0.5", "1", "nan"),
    "mix_control.window": ("0", "x"),
    "nesting_control.hold": ("ess",),
    "nesting_control.budget": ("-1", "nan"),
    "nesting_control.patience": ("0", "x"),
    "lora.rank": ("-1", "x", str(2**31 - 1)),
    "lora.alpha": ("nan", "-1"),
    "lora.targets": ("nothing",),
    "dynamic_sampling.max_generation_batches": ("0", "x", str(2**31)),
    "dynamic_sampling.at_limit": ("wait",),
    "replay.capacity": ("-1", "64", "x"),
    "replay.recent_share": ("2", "nan"),
    "replay.inverse_temperature": ("nan",),
    "replay.completions_per_prompt": ("1", "x"),
    "replay.prefill": ("1", "-1"),
    "replay.max_staleness": ("-1", "x"),
    "replay.minimum_reward": ("nan",),
    "replay.maximum_tokens": ("0",),
    "search.lag": ("-1", "x", str(2**31)),
    "search.sync_every": ("0", "x"),
    "search.backend": ("mpi",),
    "search.searchers": ("0", "2", "x"),
    "search.timeout_seconds": ("0", "nan"),
    "search.max_replacements": ("-1",),
    "search.gpus_per_searcher": ("-1", "nan", "1"),
    "search.tpus_per_searcher": ("-1",),
    "search.temperatures": ("0", "x"),
    "search.skip_ratios": ("1", "-0.1", "0.01", "x"),
    "warm_start.steps": ("-1", "x", str(2**31)),
    "warm_start.batch_size": ("0", "x", str(2**31 - 1)),
    "warm_start.learning_rate": ("0", "nan", "1e999"),
    "warm_start.layer_dropout": ("-1", "1", "nan"),
    "warm_start.micro_batches": ("0", "7"),
    "mesh.data": ("0", "3", "64", "x"),
    "mesh.slices": ("0", "64", "x"),
    "mesh.fsdp": ("0", "3", "x"),
    "mesh.tensor": ("0", "64", "x"),
    "name": ("", "../up", "a b", "-x", "\x1b[31m"),
    # Fields that are not there.
    "trian.steps": ("1",),
    "train.stepz": ("1",),
    "loss.mixture_alpha": ("0.5",),
    "train": ("1",),
    "data.sources": ("x",),
    "data.sources.9.seed": ("1",),
}

# Words of the command line, and what the refusal has to name.
COMMANDS: tuple[tuple[str, str], ...] = (
    ("fly", "fly"),
    ("trian tiny", "trian"),
    ("train", "name of a configuration"),
    ("train nothing", "nothing"),
    ("train none.py", "none.py"),
    ("train folder", "folder"),
    ("train tiny words", "words"),
    ("train tiny --train.steps", "train.steps"),
    ("train tiny --train.steps 1 2", "train.steps"),
    ("train tiny --resume", "resume"),
    ("train --resume folder tiny", "folder"),
    ("train tiny --resume none", "none"),
    ("train --resume folder", "folder"),
    ("train --resume file", "file"),
    ("train tiny --json folder", "folder"),
    ("train tiny --json none/x.json", "none/x.json"),
    ("train tiny --runs file", "file"),
    ("train tiny --runs file/below", "file"),
    ("eval", "policy"),
    ("eval none", "none"),
    ("eval folder --config tiny", "folder"),
    ("eval none/tiny-20260101-120000 --config tiny", "none/tiny-20260101-120000"),
    ("eval scratch", "scratch"),
    ("eval scratch --config nothing", "nothing"),
    ("eval scratch --config tiny --skip-layers 9", "--skip-layers"),
    ("eval scratch --config tiny --skip-layers x", "--skip-layers"),
    ("eval scratch --config tiny --skip-layers 0 1 2 3 4 5", "--skip-layers"),
    ("eval scratch --config tiny --prompts 0", "--prompts"),
    ("eval scratch --config tiny --train.steps 3", "--train.steps"),
    ("eval scratch --config tiny --evaluation.batch-size 0", "evaluation.batch_size"),
    ("eval scratch --config tiny --completions none/x", "none/x"),
    ("eval scratch --config tiny --mesh.data 64", "mesh.data"),
    ("sample", "policy"),
    ("sample scratch", "prompt"),
    ("sample scratch p", "scratch"),
    ("sample none p", "none"),
    ("sample folder/none p", "folder/none"),
    ("sample smollm2-135m 1 --seed -1", "--seed"),
    ("sample smollm2-135m 1 --seed 4294967296", "--seed"),
    ("sample smollm2-135m 1 --samples 0", "--samples"),
    ("sample smollm2-135m 1 --samples x", "--samples"),
    ("sample smollm2-135m 1 --samples 2000000000", "--samples"),
    ("sample smollm2-135m 1 --max-tokens 0", "--max-tokens"),
    ("sample smollm2-135m 1 --max-tokens 100000", "--max-tokens"),
    ("sample smollm2-135m 1 --temperature nan", "--temperature"),
    ("sample smollm2-135m 1 --temperature 1e-30", "--temperature"),
    # Settings that nothing would read, and bridges that could never be fitted.
    ("train tiny --nesting.skip-ratio 0 --nesting.bridge.kind per_layer", "nesting.bridge.kind"),
    ("train tiny --nesting.bridge.kind per_layer --nesting.bridge.tokens 100000000", "nesting.bridge.tokens"),
    ("train tiny --nesting.divergence-file smollm2_chain_sum_layers.json", "nesting.divergence_file"),
    ("train tiny --nesting.bridge.kind per_layer --nesting.bridge.file=", "nesting.bridge.file"),
    ("train tiny --rollout.draft-length 3", "rollout.draft_length"),
    ("sft tiny --nesting.skip-ratio 0.3", "nesting.skip_ratio"),
    ("sample smollm2-135m 1 --skip-ratio 1", "--skip-ratio"),
    ("sample smollm2-135m 1 --skip-ratio 0.99", "--skip-ratio"),
    ("sample smollm2-135m 1 --skip-ratio 0.01", "--skip-ratio"),
    ("sample smollm2-135m 1 --skip-layers 6", "--skip-layers"),
    ("sample smollm2-135m 1 --unknown", "--unknown"),
    ("report", "RUN"),
    ("report none", "none"),
    ("report folder", "folder"),
    ("report x --out none/x.html", "none/x.html"),
    ("samples none", "none"),
    ("samples folder", "folder"),
    ("samples x --step 5-3", "--step"),
    ("measure-layers scratch --config tiny", "--out"),
    ("measure-layers scratch --config tiny --out none/x.json", "none/x.json"),
    ("measure-layers scratch --config tiny --out folder", "folder"),
    ("measure-layers scratch --config tiny --out x.json --prompts 0", "--prompts"),
    ("measure-layers none --out x.json", "none"),
    ("export none out", "none"),
    ("export folder out", "folder"),
    ("export folder folder", "folder"),
    ("export x", "directory"),
    ("compile nothing", "nothing"),
    ("compile smollm2_chain_sum --topology moon:2x2", "moon:2x2"),
    ("compile smollm2_chain_sum --model none", "none"),
    ("compile smollm2_chain_sum --topologie x", "--topologie"),
    ("compile smollm2_chain_sum --table --generations v9", "--generations"),
    ("compile smollm2_chain_sum --generations v5e", "--generations"),
    ("compile smollm2_chain_sum --table --no-update", "--no-update"),
    ("configs --json folder", "folder"),
    ("configs more", "more"),
    ("verify-estimators --seed -1", "--seed"),
    ("verify-estimators --seed x", "--seed"),
    ("verify-estimators --json folder", "folder"),
)

# Text of a configuration file, and what the refusal has to name.
FILES: tuple[tuple[str, str], ...] = (
    ("", "get_config"),
    ("def", "invalid syntax"),
    ("1 / 0", "ZeroDivisionError"),
    ("import sys\nsys.exit(0)", "SystemExit"),
    ("def get_config(): return 3", "get_config"),
    ("def get_config(x): return x", "get_config"),
    ("def get_config(): return load_config('tiny', train={'steps': True})", "train.steps"),
    ("def get_config(): return load_config('tiny', train={'steps': '5'})", "train.steps"),
    ("def get_config(): return load_config('tiny', train={'stepz': 5})", "train.stepz"),
    ("def get_config(): return load_config('tiny', train=None)", "train"),
    ("def get_config(): return load_config('tiny', loss={'level': 'word'})", "loss.level"),
    ("def get_config(): return load_config('tiny', loss={'mixture_alpha': 0.5})", "rollout.mixture_alpha"),
    ("def get_config(): return load_config('tiny', rollout={'sampling': {'temperature': '0.5'}})", "temperature"),
    ("def get_config(): return load_config('tiny', data={'sources': []})", "data.sources"),
    ("def get_config(): return load_config('tiny', data={'sources': [{'name': 'x'}]})", "task, dataset, file"),
    ("def get_config(): return load_config('tiny', nesting={'layers': 'abc'})", "nesting.layers"),
    ("def get_config(): return load_config('tiny', unknown=1)", "unknown"),
    ("def get_config(): return load_config('tiny', train={'seed': 10**400})", "train.seed"),
    ("def get_config(): return load_config('tiny', train={'steps': object()})", "train.steps"),
    ("def get_config(): return load_config('tiny', model={'shape': {'width': 'x'}})", "model.shape.width"),
)

# Fields of a run's `config.json` that somebody changed; None takes the field away.
STORED: tuple[tuple[str, object, str], ...] = (
    ("train.steps", True, "train.steps"),
    ("train.steps", "0.5", "train.steps"),
    ("train.steps", None, "train.steps"),
    ("loss.kind", 3, "loss.kind"),
    ("loss", [], "loss"),
    ("data.sources", {}, "data.sources"),
    ("optimizer.learning_rate", "1e-3", "optimizer.learning_rate"),
    ("nesting", "none", "nesting"),
    ("model.dtype", "float8", "model.dtype"),
)


def cases(directory: Path) -> list[Case]:
    """All bad inputs; those that need files get them.

    Args:
        directory: the working directory of the commands, where the files are written.
    """
    from nested_reft.training.config import load_config

    # A file is read only where it is asked for.
    needed = {"nesting.divergence_file": ("--nesting.choice", "measured")}
    found = [
        Case(
            ("train", "tiny", *needed.get(field, ()), f"--{field.replace('_', '-')}={value}"), field.rpartition(".")[2]
        )
        for field, values in FIELDS.items()
        for value in values
    ]
    found += [Case(tuple(words.split()), about) for words, about in COMMANDS]
    (directory / "folder").mkdir()
    (directory / "file").write_text("")
    (directory / "deep.json").write_text('{"divergence": ' + "[" * 10**5)
    for index, (text, about) in enumerate(FILES):
        path = directory / f"config_{index}.py"
        path.write_text("from nested_reft.training.config import load_config\n" + text)
        found.append(Case(("train", path.name), about))
    for index, (field, value, about) in enumerate(STORED):
        stored = load_config("tiny").to_json()
        *parents, last = field.split(".")
        part = stored
        for name in parents:
            part = part[name]
        part[last] = value
        if value is None:
            del part[last]
        run = directory / f"run_{index}"
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(stored))
        found.append(Case(("train", "--resume", run.name), about))
    for name, text in (("deep", "[" * 10**5), ("bytes", "\xff\0"), ("list", "[]"), ("half", '{"name": ')):
        run = directory / f"run_{name}"
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.json").write_text(text, encoding="latin-1")
        # Training, sampling and evaluation each read the file in their own way.
        found += [Case(("train", "--resume", run.name), run.name), Case(("eval", run.name), run.name)]
        found += [Case(("sample", run.name, "1"), run.name), Case(("export", run.name, "out"), run.name)]
    return found


def verdicts(chosen: slice = slice(None)) -> list[Verdict]:
    """Tries the inputs in a directory of their own.

    Args:
        chosen: which of them.
    """
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as directory, nothing_runs():
        os.chdir(directory)
        try:
            return [try_input(case) for case in cases(Path(directory))[chosen]]
        finally:
            os.chdir(before)


def main() -> int:
    """Prints the table and the share of clear refusals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="list every input")
    show_all = parser.parse_args().all
    found = verdicts()
    rows = [
        [printable(" ".join(each.case.arguments))[:70], each.problem or "clear", printable(each.message)[:150]]
        for each in found
        if show_all or each.problem
    ]
    print(table(["input", "verdict", "message"], rows, left=3))
    clear = sum(not each.problem for each in found)
    print(f"\n{clear} of {len(found)} bad inputs are refused by one clear line ({clear / len(found):.1%})")
    return 0 if clear >= CLEAR_SHARE * len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
