"""Reads damaged files at random and reports whatever is not refused as it should be.

    python scripts/fuzz.py --seconds 60                              all targets in turn
    python scripts/fuzz.py --target gguf_bytes --first 17 --cases 1  one case again

A target makes a damaged input from a small valid one and reads it. The input is either read or refused
by an exception that the command line turns into one line. Another exception, a hang, or much memory is a
failure. To add a target, write a function and put `@target` above it. This needs Linux, which says what memory a
process takes.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from nested_reft.cli.arguments import number as a_number
from nested_reft.cli.arguments import whole
from nested_reft.data.sources import JsonlSource, load_source
from nested_reft.models.config import ModelConfig
from nested_reft.models.formats import gguf_model, huggingface
from nested_reft.models.formats.huggingface_config import config_to_huggingface
from nested_reft.models.formats.stacking import tensor_shapes
from nested_reft.models.registry import load_model
from nested_reft.run_directory import read_log
from nested_reft.templates.render import render
from nested_reft.tokenizer import Tokenizer
from nested_reft.training.config import load_config
from nested_reft.training.setup import run_config
from nested_reft.untrusted import BadFile

# What refuses an input: the one kind for content, and the system's own for files.
REFUSALS = (BadFile, OSError)
HANG_SECONDS = 20.0  # on a busy machine, too
MEMORY_BYTES = 1 << 30  # that one case may add
MESSAGE_CHARACTERS = 2000

Target = Callable[[random.Random, Path], None]
TARGETS: dict[str, Target] = {}
"""Name -> makes a damaged input in an empty directory and reads it."""


def target(function: Target) -> Target:
    """Registers a target under the function's name."""
    TARGETS[function.__name__] = function
    return function


# Damage.

STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31 - 1, 2**31, 2**63, 2**64 - 1, 10**400, 0.0, 0.5, -1.5, 1e308, float("nan")),
    *("", "a", "\x1b[2J\x07", "\x00", "ü🙂", "x" * 10_000, "{{ 1 / 0 }}", "../../x", "é" * 99),
    *([], {}, [[]], [None], ["a", "a"], {"a": {}}, {"content": 3}, {"content": "a"}, [0, 1, 2], [1e308]),
)
INTEGERS = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


def damaged_bytes(chance: random.Random, data: bytes, reach: int | None = None) -> bytes:
    """Bytes with one to four changes, most of them among the first `reach`."""
    damaged = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        reached = len(damaged) if reach is None or chance.random() < 0.1 else min(reach, len(damaged))
        place = chance.randrange(reached + 1)
        change = chance.randrange(6)
        if change == 0:
            damaged[place : place + 1] = bytes([chance.randrange(256)])
        elif change == 1:
            size = chance.choice((4, 8))
            damaged[place : place + size] = struct.pack("<Q", chance.choice(INTEGERS))[:size]
        elif change == 2:
            del damaged[place : place + chance.choice((1, 2, 8, 64))]
        elif change == 3:
            damaged[place:place] = damaged[place : place + chance.choice((1, 8, 64))]
        elif change == 4:
            damaged[place:place] = chance.randbytes(chance.choice((1, 4, 16)))
        elif chance.random() < 0.3:
            del damaged[place:]
    return bytes(damaged)


def damaged_json(chance: random.Random, value: Any) -> Any:
    """A JSON value with one to three of its parts replaced, removed or nested."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        holder, key = chance.choice(list(_places(value)))
        change = chance.randrange(8)
        if change == 0:
            del holder[key]
        elif change == 1:
            holder[key] = [holder[key]]
        elif change == 2 and isinstance(holder, dict):
            holder[str(chance.choice(STRANGE))[:99]] = holder[key]
        elif change == 3:
            nested: Any = "deep"
            for _ in range(chance.choice((3, 250))):  # three of these stay within what Python itself can walk through
                nested = [nested]
            holder[key] = nested
        else:
            holder[key] = copy.deepcopy(chance.choice(STRANGE))
        if not list(_places(value)):
            break
    return value


def _places(value: Any, most: int = 300) -> Iterator[tuple[Any, Any]]:
    """Where a value's parts stand: the list or object that holds each, and its key; not all of long ones."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys[:most]:
            yield value, key
            yield from _places(value[key], most=20)


def write_damaged_json(chance: random.Random, path: Path) -> None:
    """Damages a JSON file: mostly its values, sometimes its text."""
    text = path.read_text(encoding="utf-8")
    if chance.random() < 0.02:
        path.write_text(chance.choice("[{") * 200_000)
    elif chance.random() < 0.2:
        path.write_bytes(damaged_bytes(chance, text.encode()))
    else:
        path.write_text(json.dumps(damaged_json(chance, json.loads(text))), encoding="utf-8")


# Valid models to start from.

WEIGHTS = "model.safetensors"
SHAPE = ModelConfig(vocab_size=300, num_layers=2, width=8, hidden_width=8, num_heads=2, num_kv_heads=1, head_size=4)


@functools.cache
def _model_files() -> dict[str, bytes]:
    """The files of a Hugging Face directory, by name."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer = Tokenizer.characters("abcdefgh 0123456789")
        tokenizer.save(directory)
        settings = config_to_huggingface(SHAPE, np.float32) | tokenizer.token_ids()
        (directory / "config.json").write_text(json.dumps(settings))
        shapes = tensor_shapes(SHAPE, huggingface.TENSOR_NAMES)
        save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, directory / WEIGHTS)
        return {path.name: path.read_bytes() for path in directory.iterdir()}


def model_directory(directory: Path) -> Path:
    directory.mkdir()
    for name, content in _model_files().items():
        (directory / name).write_bytes(content)
    return directory


def gguf_metadata() -> dict[str, Any]:
    """Every key of a valid GGUF file of the model `SHAPE`."""
    tokens = [*map(chr, range(33, 127)), "ab", "<s>", "</s>", "<|im_end|>"]
    return {
        "general.architecture": "llama",
        "llama.block_count": SHAPE.num_layers,
        "llama.context_length": 64,
        "llama.embedding_length": SHAPE.width,
        "llama.feed_forward_length": SHAPE.hidden_width,
        "llama.attention.head_count": SHAPE.num_heads,
        "llama.attention.head_count_kv": [SHAPE.num_kv_heads] * SHAPE.num_layers,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e4,
        "llama.rope.dimension_count": SHAPE.head_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3] * 3,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }


def write_gguf(path: Path, metadata: dict[str, Any]) -> None:
    """A GGUF file of the model `SHAPE` with any metadata that the format can hold; others are left out."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.kv_data[0].clear()
    for key, value in metadata.items():
        try:
            kind = gguf.GGUFValueType.get_type(value)
            # Integers are 32 bits wide by default, which the larger ones do not fit.
            wide = kind == gguf.GGUFValueType.INT32 and not -(2**31) <= value < 2**31
            kind = gguf.GGUFValueType.UINT64 if wide else kind
            writer._pack_val(value, kind, add_vtype=True)
            writer.add_key_value(key, value, kind)
        except (ValueError, struct.error, IndexError, OverflowError, AttributeError):
            continue
    for name, shape in tensor_shapes(SHAPE, gguf_model.TENSOR_NAMES).items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@functools.cache
def _gguf_file() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.gguf"
        write_gguf(path, gguf_metadata())
        return path.read_bytes()


def use_model(location: Path) -> ModelConfig:
    """Loads a model and does with its tokenizer what a run does; returns what the file says of the model."""
    model, tokenizer = load_model(str(location))
    for special in (False, True):
        tokenizer.decode(tokenizer.encode("ab a", add_special_tokens=special))
    if tokenizer.chat_template is not None:
        tokenizer.chat("ab")
    return model.config


# Targets: model files.


@target
def config_json(chance: random.Random, directory: Path) -> None:
    model = model_directory(directory / "model")
    write_damaged_json(chance, model / "config.json")
    use_model(model)


@target
def tokenizer_json(chance: random.Random, directory: Path) -> None:
    model = model_directory(directory / "model")
    write_damaged_json(chance, model / "tokenizer.json")
    use_model(model)


@target
def tokenizer_config_json(chance: random.Random, directory: Path) -> None:
    model = model_directory(directory / "model")
    path = model / chance.choice(("tokenizer_config.json", "generation_config.json"))
    settings = json.loads(path.read_text())
    token = {"content": "<x>", "lstrip": False, "special": True}
    more = {"added_tokens_decoder": {"20": token}, "extra_special_tokens": ["a"], "bos_token": token}
    path.write_text(json.dumps(settings | more))
    write_damaged_json(chance, path)
    if chance.random() < 0.2:
        (model / "chat_template.jinja").write_bytes(damaged_bytes(chance, b"{{ messages[0].content }}"))
    use_model(model)


@target
def weight_map(chance: random.Random, directory: Path) -> None:
    model = model_directory(directory / "model")
    names = dict.fromkeys(tensor_shapes(SHAPE, huggingface.TENSOR_NAMES), WEIGHTS)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    write_damaged_json(chance, index)
    use_model(model)


@target
def safetensors_bytes(chance: random.Random, directory: Path) -> None:
    model = model_directory(directory / "model")
    path = model / WEIGHTS
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    if chance.random() < 0.5:
        path.write_bytes(damaged_bytes(chance, content, reach=8 + size))
    else:
        header = json.dumps(damaged_json(chance, json.loads(content[8 : 8 + size]))).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    use_model(model)


@target
def gguf_bytes(chance: random.Random, directory: Path) -> None:
    path = directory / "model.gguf"
    path.write_bytes(damaged_bytes(chance, _gguf_file(), reach=chance.choice((40, 800, 4000))))
    use_model(path)


@target
def gguf_values(chance: random.Random, directory: Path) -> None:
    path = directory / "model.gguf"
    metadata = gguf_metadata()
    for key in chance.sample(sorted(metadata), chance.randint(1, 2)):
        metadata[key] = chance.choice((*STRANGE, "qwen2", "qwen3", "llama-bpe", 2, 4, 8))
    if chance.random() < 0.3:
        metadata[chance.choice(("llama.", "tokenizer.ggml.", "general.", "")) + "x"] = chance.choice(STRANGE)
    write_gguf(path, metadata)
    use_model(path)


TEMPLATE_PIECES = (
    *("{{ ", " }}", "{% ", " %}", "{%- ", " -%}", "{# ", " #}", "(", ")", "x", "\x00", "break", "continue"),
    *("for m in messages", "endfor", "if a", "endif", "else", "macro f(n)", "endmacro", "call(x)", "endcall"),
    *("generation", "endgeneration", "block b", "endblock", "filter upper", "endfilter", "f(9)", "f(f)", "{{ f(1) }}"),
    *("set ns = namespace(x='ab')", "set ns.x = ns.x ~ ns.x", "for i in range(99999)", "ns.x * 10 ** 9"),
    *("1 / 0", "1 + 'a'", "10 ** (10 ** 9)", "include 'x'", "import 'x' as y", "''.__class__", "cycler(1).next()"),
    *("messages[0].content", "messages | tojson(indent=10 ** 9)", "'%99999999d' % 1", "'{:9999999}'.format(1)"),
    *("lipsum(n=10 ** 6)", "raise_exception('\x1b[2J')", "strftime_now('%Y' * 10 ** 6)"),
)


@target
def chat_template(chance: random.Random, directory: Path) -> None:
    if chance.random() < 0.5:
        pieces = chance.choices(TEMPLATE_PIECES, k=chance.randint(1, 12))
        template = "".join(chance.choice((piece, f"{{{{ {piece} }}}}", f"{{% {piece} %}}")) for piece in pieces)
    else:
        template = "{% for m in messages %}{{ m['role'] + ' ' + m.content | trim }}{% endfor %}{{ a | default(1) }}"
        template = damaged_bytes(chance, template.encode()).decode(errors="replace")
    render(template, {"messages": [{"role": "user", "content": "ab"}]}, time_limit_seconds=0.3)


# Running.


@target
def configuration(chance: random.Random, directory: Path) -> None:
    """`config.json` of a run."""
    path = directory / "config.json"
    path.write_text(json.dumps(load_config("tiny_dump").to_json()))
    write_damaged_json(chance, path)
    with naming(path):
        run_config(directory)


@target
def jsonl(chance: random.Random, directory: Path) -> None:
    """Rows of a user's own questions."""
    path = directory / "questions.jsonl"
    rows = [{"question": f"{number} + 1?", "answer": number + 1, "level": [0.5, None]} for number in range(12)]
    lines = [json.dumps(row) for row in rows]
    for _ in range(chance.randint(1, 3)):
        lines[chance.randrange(len(lines))] = json.dumps(damaged_json(chance, chance.choice(rows)))
    content = "\n".join(lines).encode()
    path.write_bytes(damaged_bytes(chance, content) if chance.random() < 0.5 else content)
    with naming(path):
        load_source(JsonlSource("questions", str(path), train_size=None, heldout_size=2, seed=0))


@target
def log_lines(chance: random.Random, directory: Path) -> None:
    """`metrics.jsonl` of a run that is read for its figures."""
    path = directory / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.5, "reward": None}) for step in range(20)]
    path.write_bytes(damaged_bytes(chance, "\n".join(lines).encode()))
    with naming(path):
        read_log(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Takes a ValueError that names the file for a refusal of its content."""
    try:
        yield
    except ValueError as error:
        if path.name not in str(error):
            raise
        raise BadFile(str(error)) from error


class Hang(BaseException):
    """A case took too long. It is no Exception, so that no reader takes it for damage."""


@dataclass
class Tally:
    """What became of the cases of one target."""

    read: int = 0
    refused: int = 0
    failures: list[int] = field(default_factory=list)
    slowest_seconds: float = 0.0


@contextmanager
def limits() -> Iterator[None]:
    """Ends what hangs, and refuses memory far beyond what any case needs."""

    def stop(*_: Any) -> None:
        raise Hang(f"it took longer than {HANG_SECONDS:g} seconds")

    handler = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory_bytes("VmSize") + 4 * MEMORY_BYTES, hard))
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _memory_bytes(kind: str) -> int:
    """A line of Linux's own account: `VmRSS` now, `VmHWM` at its peak, `VmSize` in address space."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def run_case(name: str, seed: int, number: int) -> bool:
    """Makes and reads one input.

    Returns:
        True where it was read, False where it was refused as it should be.

    Raises:
        BaseException: whatever else the reader raised; an AssertionError for a refusal that is no printable line
            or for too much memory.
    """
    chance = random.Random(f"{seed} {name} {number}")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    before = _memory_bytes("VmRSS")
    directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        TARGETS[name](chance, directory)
        was_read = True
    except REFUSALS as error:
        message = str(error)
        assert not isinstance(error.__cause__, MemoryError), f"it asked for more memory than there is: {message}"
        assert message.isprintable() and len(message) < MESSAGE_CHARACTERS, f"not one short line: {message!r:.3000}"
        was_read = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        shutil.rmtree(directory)
    added = _memory_bytes("VmHWM") - before
    assert added < MEMORY_BYTES, f"it took {added >> 20} MB"
    return was_read


def run(names: list[str], seed: int, first: int, cases: int | None, seconds: float) -> dict[str, Tally]:
    """Runs targets in turn and prints each failure; `cases` of each, or as many as `seconds` allow."""
    tallies = {name: Tally() for name in names}
    number, end = first, time.monotonic() + seconds
    with limits():
        while number < first + cases if cases is not None else time.monotonic() < end:
            for name, tally in tallies.items():
                begin = time.monotonic()
                try:
                    was_read = run_case(name, seed, number)
                except KeyboardInterrupt:
                    raise
                except BaseException:  # also Hang, and the panic of a library
                    tally.failures.append(number)
                    print(f"FAILED: --target {name} --seed {seed} --first {number} --cases 1\n{traceback.format_exc()}")
                else:
                    tally.read += was_read
                    tally.refused += not was_read
                tally.slowest_seconds = max(tally.slowest_seconds, time.monotonic() - begin)
            number += 1
    return tallies


def main(arguments: list[str] | None = None) -> int:
    """Runs targets, prints a table, and returns 1 where a case failed."""
    parser = argparse.ArgumentParser(description="Reads damaged files at random.")
    above_zero = a_number("more than 0", lambda seconds: seconds > 0)
    parser.add_argument("--seconds", type=above_zero, default=60.0, help="for all targets together")
    parser.add_argument("--cases", type=whole(1), help="so many of each target, instead of --seconds")
    parser.add_argument("--first", type=whole(0), default=0, help="number of the first case")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="these alone; default: all")
    known = parser.parse_args(arguments)
    tallies = run(known.target or list(TARGETS), known.seed, known.first, known.cases, known.seconds)
    print(f"{'target':24}{'read':>8}{'refused':>9}{'failed':>8}{'slowest':>10}")
    for name, tally in tallies.items():
        print(f"{name:24}{tally.read:8}{tally.refused:9}{len(tally.failures):8}{tally.slowest_seconds:9.2f}s")
    return int(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
