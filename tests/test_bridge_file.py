"""Bridges in a file: fitted by a command, trained with, and refused where they are of something else."""

import contextlib
import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nested_reft import processes
from nested_reft.bridge_file import FittedBridges, load_bridges, save_bridges, sealed
from nested_reft.bridging import BridgeConfig
from nested_reft.cli.main import main
from nested_reft.layer_plan import LayerPlan, Part
from nested_reft.models.bridges import Bridges
from nested_reft.models.fingerprint import fingerprint
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.policy import Policy
from nested_reft.run_directory import read_log
from nested_reft.tokenizer import Tokenizer
from nested_reft.training.setup import RunData, Setup, check_bridges
from nested_reft.untrusted import BadFile
from tests.tiny_models import TINY, tiny_model
from tests.training.runs import nano

PLAN = LayerPlan.skipping(5, [1, 2], Part.BRIDGE)


def model_with_bridges() -> Transformer:
    model = tiny_model()
    model.bridges = Bridges(TINY.num_layers, TINY.width)
    return model


def written(path: Path, model: str = "tiny", rank: int | None = None, seed: int = 0) -> FittedBridges:
    stack = {name: value + 1.5 for name, value in Bridges(TINY.num_layers, TINY.width, rank).stack().items()}
    weights = fingerprint(tiny_model(seed=seed))
    fitted = FittedBridges(stack, np.arange(5.0), model, weights, tuple(PLAN.host_parts(5).tolist()))
    save_bridges(path, fitted)
    return fitted


def rewritten(path: Path, about: dict[str, str] | None = None, **arrays: np.ndarray) -> None:
    """A file with other contents, and the checksum of these."""
    written(path)
    with safe_open(path, framework="numpy") as stored:
        found = {name: value for name, value in stored.metadata().items() if name != "checksum"} | (about or {})
    held = load_file(path) | arrays
    save_file(held, path, metadata=sealed(held, found))


def test_a_file_comes_back_as_it_was(tmp_path):
    fitted = written(tmp_path / "b.safetensors")
    found = load_bridges(tmp_path / "b.safetensors", model_with_bridges(), "tiny")
    assert found.parts == fitted.parts and found.divergence_L.tolist() == [0, 1, 2, 3, 4]
    assert all(np.array_equal(found.stack[name], value) for name, value in fitted.stack.items())
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


def test_everybody_may_read_a_file_that_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        written(tmp_path / "b.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "b.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "which is no file; write it with 'nested-reft fit-bridges'"),
        (lambda path: path.mkdir(), "which is no file"),
        (lambda path: path.write_bytes(b""), "which cannot be read: damaged or not understood"),
        (lambda path: path.write_bytes(b"\x08"), "which cannot be read: damaged or not understood"),
        (lambda path: path.write_bytes(b"not a file of bridges " * 40), "which cannot be read: damaged"),
        (lambda path: written(path, "the model 'other'", seed=1), "of other weights, those of the model 'other'; this"),
        (lambda path: written(path, rank=3), r"which holds .*; this model and nesting\.bridge\.rank need"),
        (lambda path: save_file({"first": np.zeros((5, 16))}, path), "which has no checksum: it is damaged or of an"),
        (
            lambda path: rewritten(path, map=np.ones((5, 16, 16), np.int8)),
            r"'map': \('int8', \(5, 16, 16\)\).* need .*'map': \('float32', \(5, 16, 16\)\)",
        ),
        (
            lambda path: rewritten(path, divergence=np.array([0, 1, -0.5, 1, 1], np.float32)),
            "whose layer 2 has a divergence below 0",
        ),
        (
            lambda path: rewritten(path, divergence=np.array([0, 1, np.nan, 1, 1], np.float32)),
            "which holds a value that is not finite",
        ),
        (lambda path: rewritten(path, {"parts": "7"}), "whose plan is '7'; allowed is null, or a part for each of 5"),
        (lambda path: rewritten(path, {"parts": "[1, 1, 9, 1, 1]"}), r"whose plan is '\[1, 1, 9"),
        (lambda path: rewritten(path, {"parts": "[1,"}), r"whose plan is '\[1,'"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, make, message):
    path = tmp_path / "b.safetensors"
    make(path)
    with pytest.raises(BadFile, match=rf"nesting\.bridge\.file is '.*b\.safetensors', .*{message}"):
        load_bridges(path, model_with_bridges(), "tiny")


def test_every_bit_counts(tmp_path):
    """One bit is flipped in many places, of the header as well; no such file passes."""
    path, model = tmp_path / "b.safetensors", model_with_bridges()
    written(path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in [*range(0, header, 11), *range(header, len(content), 499), len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(BadFile, match=r"nesting\.bridge\.file is '.*b\.safetensors', which "):
            load_bridges(path, model, "tiny")


def test_bridges_of_another_plan_are_refused(tmp_path):
    path = tmp_path / "b.safetensors"
    fitted = written(path)
    with pytest.raises(BadFile, match=r"fitted for another plan, \[1, 2, 2, 1, 1\]; this configuration's is \[1, 1, 2"):
        fitted.check_plan(path, LayerPlan.skipping(5, [2], Part.BRIDGE))
    alone = dataclasses.replace(fitted, parts=None)
    alone.check_plan(path, PLAN)
    alone.check_plan(path, None)
    run_of_layers = LayerPlan.of_parts(np.array([Part.KEEP, Part.BRIDGE, Part.SKIP, Part.KEEP, Part.KEEP]))
    with pytest.raises(BadFile, match=r"each stand in for one layer; those of nesting\.bridge\.kind 'per_run' have to"):
        alone.check_plan(path, run_of_layers)


def test_processes_begin_with_the_same_bridges(tmp_path, monkeypatch):
    """Each reads a file of its own host, and both files may be of the right weights."""
    fitted = written(tmp_path / "b.safetensors")
    other = dataclasses.replace(fitted, stack={name: value + 1 for name, value in fitted.stack.items()})
    config = nano(nesting__bridge=BridgeConfig("per_layer", file=str(tmp_path / "b.safetensors")))
    policy = Policy(model_with_bridges(), Tokenizer.characters("01"))
    nothing = RunData((), (), (), (), prompt_size=1, shared_prefix=0)
    setup = Setup(config, policy, nothing, fitted.divergence_L, fitted)
    for checksums, message in (
        ((fitted.checksum, other.checksum), r"b\.safetensors', and process 1 finds other bridges there than process 0"),
        ((fitted.checksum,) * 2, None),
    ):
        monkeypatch.setattr(processes, "gather_text", lambda text, found=checksums: found)
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            check_bridges(setup)


def test_a_run_begins_with_the_bridges_of_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--warm-start.steps", "0", "--evaluation.samples-per-prompt", "0", "--train.steps", "1"]
    nesting = ["--nesting.skip-ratio", "0.34", "--nesting.bridge.kind", "per_layer", "--nesting.bridge.tokens", "200"]
    command = ["fit-bridges", "scratch", "--config", "tiny", "--out", "b.safetensors"]
    assert main([*command, *nesting]) == 0
    assert "bridges of all layers, fitted on " in capsys.readouterr().out
    # Without the bonus an untrained model earns no reward, and no update moves it.
    moving = ["--loss.entropy-coefficient", "1"]
    assert main(["train", "tiny", *small, *nesting, *moving, "--nesting.bridge.file", "b.safetensors"]) == 0
    (run,) = Path("runs").iterdir()
    (_, first) = read_log(run / "metrics.jsonl")
    assert len(first["bridged_layers"]) == 2  # from the first step on
    # No fit is due, so those of the file are still there.
    found, stored = Policy.load(run).model.stacked_bridges()["map"], load_file("b.safetensors")["map"]
    np.testing.assert_array_equal(found, stored)
    # Another seed makes other weights, and so does training, as the next fit will show.
    file = ["--nesting.bridge.file", "b.safetensors"]
    assert main(["train", "tiny", *small, *nesting, *file, "--train.seed", "1"]) == 2
    message = (
        "those of the model 'scratch' with train.seed 0; this run begins with those of the model 'scratch' with train"
    )
    assert f"{message}.seed 1. Fit bridges to these" in capsys.readouterr().err
    # From here on its checkpoints hold them, so the file may go: to continue it, and to fit others to the run.
    os.rename("b.safetensors", "elsewhere")
    assert main(["train", "--resume", str(run), "--train.steps", "2"]) == 0
    assert [len(line.get("bridged_layers", [])) for line in read_log(run / "metrics.jsonl")] == [0, 2, 2]
    assert main(["sample", str(run), "1", "--max-tokens", "2"]) == 0
    assert ", bridges in their place)" in capsys.readouterr().out
    assert main(["eval", str(run), "--prompts", "4", "--nested"]) == 0
    assert re.search(r"^4 of 6 layers, without layers \[.*\], bridges in their place$", capsys.readouterr().out, re.M)
    assert main(["eval", str(run), "--nested", "--skip-layers", "2"]) == 2
    assert "--nested and --skip-layers are given; allowed is one of them" in capsys.readouterr().err
    assert main(["fit-bridges", str(run), "--out", "again.safetensors"]) == 0
    assert main(["train", "tiny", *small, *nesting, *file[:1], "again.safetensors"]) == 2
    assert "of the model 'scratch' with train.seed 0 after 2 updates; this run begins with" in capsys.readouterr().err
    # Bridges of a fixed plan are of no other.
    fixed = ["--nesting.choice", "fixed", "--nesting.layers", "2", "3"]
    bridge = ["--nesting.bridge.kind", "per_layer", "--nesting.bridge.tokens", "200"]
    assert main([*command, *fixed, *bridge]) == 0
    capsys.readouterr()
    assert main(["train", "tiny", *small, *nesting, "--nesting.bridge.file", "b.safetensors"]) == 2
    assert "fitted for another plan, [1, 1, 2, 2, 1, 1]; this configuration draws others" in capsys.readouterr().err
    # The cheapest layers as the file's own divergences say, always: fitted in sequence, and of no other plan.
    cheapest = [*nesting, "--nesting.choice", "measured", "--nesting.divergence-temperature", "0"]
    assert main([*command, *cheapest]) == 0
    assert "bridges of layers [" in capsys.readouterr().out
    assert main(["train", "tiny", *small, *cheapest, "--nesting.bridge.file", "b.safetensors"]) == 0
    capsys.readouterr()
    assert main(["train", "tiny", *small, *nesting, "--nesting.bridge.file", "b.safetensors"]) == 2
    assert "fitted for another plan, " in capsys.readouterr().err
    assert main([*command, "--nesting.skip-ratio", "0.34"]) == 2
    assert "nesting.bridge.kind of 'tiny' is 'off'; give" in capsys.readouterr().err
    assert main(["train", "tiny", *small, *nesting, "--nesting.bridge.file", "absent"]) == 2
    assert "absent', which is no file" in capsys.readouterr().err
