"""Arithmetic and plumbing of the benchmarks; no peer is installed and nothing is timed."""

import dataclasses
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks import compaction, exact, peers, replay_saves, rollouts, updates, worker
from experiments.benchmarks.common import disturbance, measured, parser, prepare_process, write_results
from experiments.benchmarks.floors import (
    Ceilings,
    decode_rate,
    head_parameters,
    layer_parameters,
    predicted_speedup,
    ratio,
    rollout_floor,
    update_floor,
    update_tokens,
)
from experiments.benchmarks.peers import Skipped, System
from experiments.benchmarks.stages import Stage, breakdown_table, with_rest
from experiments.benchmarks.worker import Case, Spec
from nested_reft.cli.bad_input import BadInput
from nested_reft.layer_plan import PlanShape
from tests.tiny_models import TINY

CASE = Case(prompts=2, group=3, prompt_tokens=4, new_tokens=5)
SPEC = Spec("float32", (CASE, Case(1, 1, 4, 5, 0.5)), "weights", "file.gguf", 300, 2, 1)


def compute_bound(rows: int) -> Ceilings:
    """Two operations a second, whatever the rows."""
    return Ceilings(flops=2.0, bandwidth=math.inf)


def test_parameters_of_layers_and_head():
    # query and output 16 x 32, key and value 16 x 16, gate, up and down 16 x 24; head 31 x 16
    assert layer_parameters(TINY) == 2 * 16 * 32 + 2 * 16 * 16 + 3 * 16 * 24 == 2688
    assert head_parameters(TINY) == 31 * 16


def test_rollout_floor_runs_prompts_once_and_one_step_fewer_than_tokens():
    """At 2 operations a second, a vector through a matrix takes as many seconds as it has weights."""
    found = rollout_floor(TINY, CASE, PlanShape(4), compute_bound, sampling_seconds=10.0)
    assert found == {
        "prefill": 4 * 2688 * (2 * 4),  # not 6 rows x 4 tokens
        "layers": 4 * 2688 * 6 * (5 - 1),
        "head": 496 * 6 * 5,
        "sampling": 5 * 10.0,
    }


def test_prefill_and_decode_each_run_at_the_rate_of_their_rows():
    found = rollout_floor(TINY, CASE, PlanShape(1), lambda rows: Ceilings({8: 4.0, 6: 2.0}[rows], math.inf))
    assert found["prefill"] == 2688 * 8 / 2 and found["layers"] == 2688 * 6 * 4


def test_few_rows_cost_the_reading_of_the_weights():
    ceilings = Ceilings(flops=1e12, bandwidth=100.0, weight_bytes=2.0)
    assert ceilings.product_seconds(500, rows=1) == 500 * 2 / 100


def test_predicted_speedup_is_below_the_ratio_of_layers_because_head_and_sampling_stay():
    assert predicted_speedup(TINY, CASE, PlanShape(TINY.num_layers), compute_bound, 1.0) == 1
    layer, head = 2688 * (8 + 24), 496 * 30
    assert predicted_speedup(TINY, CASE, PlanShape(2), compute_bound) == pytest.approx(
        (5 * layer + head) / (2 * layer + head)
    )
    assert predicted_speedup(TINY, CASE, PlanShape(2), compute_bound, 1e9) == pytest.approx(1, abs=1e-3)


def test_a_bridge_costs_its_matrix():
    """3 whole layers, 2 bridges of 16 x 16 weights."""
    found = rollout_floor(TINY, CASE, PlanShape(3, bridged=2), compute_bound)
    assert found["layers"] == (3 * 2688 + 2 * 256) * 6 * 4


def test_update_tokens_and_floor():
    case = Case(prompts=8, group=8, prompt_tokens=53, new_tokens=12)
    assert update_tokens(case, shared_prompt=True) == 8 * 53 + 64 * 11 == 1128
    assert update_tokens(case, shared_prompt=False) == 64 * 65
    layers, head = 5 * 2688 * (2 * 4 + 6 * 4), 496 * 6 * 5  # not 6 x 5 completion tokens, not 38 through the head
    assert (layers, head) == (430_080, 14_880)
    found = update_floor(TINY, CASE, compute_bound(32))
    assert found == {"layers": layers, "head": head, "backward": 2 * (layers + head)}
    adapters = update_floor(TINY, CASE, compute_bound(32), trains_all=False)
    assert adapters == found | {"backward": layers + head}  # no gradients of the weights


def test_decode_rate_leaves_the_first_token_out():
    assert decode_rate(CASE, seconds=5.0, first_token_seconds=1.0) == 6 * 4 / 4
    assert decode_rate(CASE, seconds=1.0, first_token_seconds=1.1) is None
    assert ratio(3.0, 2.0) == 1.5 and ratio(None, 2.0) is None and ratio(1.0, None) is None


def row(system: System, variant: str, case: Case = CASE, **found):
    return {"system": system.title, "variant": variant, "case": case} | found


COSTS: dict[str, Any] = {"first_seconds": 1.0, "peak_bytes": 1e9}


def test_rollout_ratios_compare_whole_calls_and_with_llama_cpp_decode_steps():
    short = Case(2, 3, 4, 1)
    rows = [
        row(rollouts.OURS, "float32", short, seconds=1.0, **COSTS),
        row(rollouts.OURS, "float32", seconds=3.0, **COSTS),  # 10 tokens/s; decode 24 in 2 s
        row(rollouts.OURS, "bfloat16", short, seconds=0.5, **COSTS),
        row(rollouts.OURS, "bfloat16", seconds=2.0, **COSTS),  # 15; decode 16
        row(rollouts.TUNIX, "float32", seconds=6.0, **COSTS),  # 5
        row(rollouts.LLAMA_CPP, "Q4_1", seconds=7.5, **COSTS),  # decode 4
    ]
    rollouts.add_rates(rows)
    found = {row["system"]: row for row in rollouts.compared(rows, CASE)}
    tunix, llama = found[rollouts.TUNIX.title], found[rollouts.LLAMA_CPP.title]
    assert (tunix["ours_float32_ratio"], tunix["ours_best_ratio"]) == (2.0, 3.0)
    assert (llama["ours_float32_ratio"], llama["ours_best_ratio"]) == (3.0, 4.0)


def test_calls_that_shared_the_machine_are_named():
    alone = row(rollouts.TUNIX, "float32", others_cpu=0.05)
    assert disturbance([alone]) == ""
    assert "up to 0.7 cores during the best calls of ours float32;" in disturbance(
        [alone, row(rollouts.OURS, "float32", others_cpu=0.7)]
    )


def test_nested_share_is_the_speedup_over_the_floors():
    """Of 5 layers: 5 x 86,016 + head 14,880 + draws 5 x 83,040 = 860,160; of 3: 688,128; so 1.25 is predicted."""
    rows = [
        row(rollouts.OURS, "float32", seconds=4.0, tokens_per_second=10.0),
        row(rollouts.OURS, "float32", Case(2, 3, 4, 5, 0.4), seconds=2.0, tokens_per_second=20.0),
    ]
    (found,) = rollouts.nested_rows(TINY, CASE, "float32", compute_bound, 83_040, rows)
    assert (found["kept"], found["speedup"]) == (3, 2.0)
    assert found["predicted"] == pytest.approx(1.25) and found["share"] == pytest.approx(1.6)


def test_update_ratios_and_share_of_the_floor():
    """The floor is 444,960 forward (see above) and twice that backward, once for adapters."""
    rows = [
        row(updates.OURS, "float32", seconds=2_669_760.0),
        row(updates.OURS, "float32 LoRA", seconds=1_779_840.0),
        row(updates.PLAIN, "float32", seconds=6_674_400.0),
    ]
    ours, lora, plain = updates.compared(rows, TINY, compute_bound(32))
    assert (ours["tokens"], ours["floor_seconds"], ours["share_of_floor"]) == (32, 1_334_880, 0.5)
    assert (lora["tokens"], lora["floor_seconds"], lora["share_of_floor"]) == (32, 889_920, 0.5)
    assert (plain["tokens"], plain["floor_seconds"], plain["share_of_floor"]) == (54, None, None)
    assert plain["ours_float32_ratio"] == 2.5  # adapters are no full update


def test_stages_and_what_they_leave_of_the_whole():
    whole = {"seconds": 8.0, "compile_seconds": 1.5, "compilations": 3, "peak_bytes": 2_500_000_000}
    found = with_rest("call", whole, [Stage("layers", 4.0, 2.0), Stage("sampling", 5.0)])
    assert found.stages[-1] == Stage("the rest", -1.0)  # stages that the compiler fuses take less than alone
    lines = breakdown_table(found).splitlines()
    assert [line.split() for line in lines[2:-1]] == [
        ["layers", "4.000", "0.50", "2.000", "0.50"],
        ["sampling", "5.000", "0.62", "-", "-"],
        ["the", "rest", "-1.000", "-0.12", "-", "-"],
        ["whole", "8.000", "1.00", "2.000", "0.25"],
    ]
    assert lines[-1] == "compiled in 1.5 s (3 programs); peak 2.5 GB"


def test_stop_tokens_are_a_fixed_share_of_the_vocabulary():
    found = compaction.stop_ids(480, 1 / 16)
    assert found == compaction.stop_ids(480, 1 / 16) and len(set(found)) == 30 and max(found) < 480
    assert max(found) - min(found) > 240  # from all over it


def test_compaction_table_pairs_rows_without_and_with():
    common = {"case": CASE, "stop_share": 1 / 16, "mean_length": 3.25, "longest": 5}
    rows = [common | {"seconds": 3.0, "first_seconds": 9.0}, common | {"seconds": 2.0, "first_seconds": 14.0}]
    line = compaction.compaction_table(rows).splitlines()[-1]
    assert line.split() == ["5", "0.062", "3.2", "5", "3.00", "2.00", "1.50x", "9.0", "14.0"]


def test_exact_table_says_from_which_acceptance_a_round_pays():
    plain = row(rollouts.OURS, "plain", seconds=2.0, plain_seconds=2.0)
    drafted = row(rollouts.OURS, "exact, 1 drafts", seconds=4.0, plain_seconds=2.0)
    drafted |= {"accepted": 0.5, "kept": 3, "bridged": 0, "round_cost": 1.75, "pays_from": 0.75}
    first, second, third = exact.exact_table([plain, drafted, drafted | {"pays_from": None}]).splitlines()[2:]
    assert "1.00x" in first and first.split()[-2:] == ["-", "-"]
    assert "0.50x" in second and second.endswith("0.75") and third.endswith("never")
    assert exact.acceptance_of(1.75, 1) == pytest.approx(0.75)  # 1 + a tokens
    assert exact.acceptance_of(1.75, 2) == pytest.approx(0.5)  # 1 + a + a^2 tokens
    assert exact.acceptance_of(3.5, 2) is None  # even three tokens are fewer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--new-tokens", "1000000"], "--prompt-tokens + --new-tokens must be at most 128"),
        (["--new-tokens", "1"], "--new-tokens is 1; allowed is a whole number from 2"),
        (["--skip-ratios", "1.5"], "--skip-ratios is 1.5; allowed is 0 or more and less than 1"),
        (["--skip-ratios", "0.99"], "--skip-ratios: "),
        (["--repeats", "x"], "--repeats is 'x'; allowed is a whole number from 1"),
        (["--json", "no/such/dir/file.json"], "cannot write 'no/such/dir/file.json'"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(rollouts, "spec_maker", lambda known: (dataclasses.replace(TINY, max_positions=128), None))
    assert rollouts.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_results_are_kept_with_the_options_that_a_caller_gave(tmp_path):
    path = tmp_path / "results.json"
    write_results(parser("x", None).parse_args(["--threads", "1", "--json", str(path)]), {"rows": [1]})
    found = json.loads(path.read_text())
    assert found["arguments"] == {"threads": 1, "repeats": 3, "json": str(path)} and found["rows"] == [1]


def test_more_threads_than_cores_are_refused():
    with pytest.raises(BadInput, match="--threads is 100000; allowed is 1 to"):
        prepare_process(100_000)


def test_spec_round_trip_and_prompts_are_the_same_for_everybody():
    assert Spec.from_json(SPEC.to_json()) == SPEC
    prompts = CASE.prompt_ids(300)
    assert prompts == Case(2, 3, 4, 5).prompt_ids(300) and len(prompts) == 2 and prompts[0] != prompts[1]
    assert all(len(ids) == 5 for ids in CASE.completion_ids(300)) and len(CASE.completion_ids(300)) == 6


def test_a_worker_answers_each_case(tmp_path, monkeypatch):
    calls, seen = [], []

    def since_last():
        new = calls[len(seen) :]
        seen.extend(new)
        return {"calls": len(new)}

    monkeypatch.setattr(sys, "stdin", io.StringIO(SPEC.to_json()))
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "answer.json")])
    worker.serve(lambda spec: lambda case: lambda: calls.append(case.skip_ratio), since_last)
    answers = json.loads((tmp_path / "answer.json").read_text())
    assert calls == [0.0, 0.5, 0.0, 0.5]  # in turn: once to warm up, once timed
    assert [answer["calls"] for answer in answers] == [2, 2] and all(answer["peak_bytes"] > 0 for answer in answers)


def test_a_peer_that_cannot_start_is_skipped_with_its_reason(capsys):
    missing = System("absent system", "no_such_worker")
    rows = measured(missing, SPEC)
    assert "absent system, float32: skipped: " in capsys.readouterr().out
    assert len(rows) == 2 and all("no_such_worker" in row["skipped"] for row in rows)
    assert "skipped: " in rollouts.speed_table([CASE], rows) and "skipped: " in updates.update_table(
        updates.compared(rows, TINY, compute_bound(32))
    )


def test_a_peer_that_cannot_be_installed_is_skipped_and_tried_again_next_time(tmp_path, monkeypatch):
    peer = System("peer", "peer_tunix", "home", ("no-such-package==1",))
    ran = []

    def run_limited(command, *_):
        ran.append(command)
        if "install" in command:
            raise Skipped("no matching distribution")
        (tmp_path / "home").mkdir(exist_ok=True)

    monkeypatch.setattr(peers, "run_limited", run_limited)
    for _ in range(2):
        with pytest.raises(Skipped, match="no matching distribution"):
            peers.ask(peer, SPEC, tmp_path)
    assert len(ran) == 4


def test_a_ready_environment_is_reused_until_its_requirements_change(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "run_limited", lambda *_: pytest.fail("it must not be made again"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "ready.json").write_text('["a==1"]')
    python = peers.environment_python(System("peer", "w", "home", ("a==1",)), tmp_path)
    assert python == tmp_path / "home" / "bin" / "python"
    with pytest.raises(pytest.fail.Exception):
        peers.environment_python(System("peer", "w", "home", ("a==2",)), tmp_path)


@pytest.mark.parametrize(
    ("script", "seconds", "reason"),
    [
        ("echo one; echo the reason >&2; exit 3", 60, "the reason"),
        ("exit 3", 60, "ended with status 3"),
        ("kill -SEGV $$", 60, "crashed: SIGSEGV"),
        ("sleep 60", 0.5, "took more than 0.5 seconds"),
    ],
)
def test_a_command_that_fails_says_why(script, seconds, reason):
    with pytest.raises(Skipped, match=reason):
        peers.run_limited(["sh", "-c", script], seconds)


def test_an_interpreter_that_is_not_there_is_a_reason_too():
    with pytest.raises(Skipped, match="cannot be started"):
        peers.run_limited([str(Path("/no/such/python"))], 1)


def test_a_save_of_replay_does_not_grow_with_the_store(tmp_path, capsys):
    sizes = ["--completions", "1000", "4000", "--json", str(tmp_path / "found.json")]
    assert replay_saves.main(sizes) == 0 and "restore_seconds" in capsys.readouterr().out
    small, large = json.loads((tmp_path / "found.json").read_text())["saves"]
    assert large["first_save_bytes"] > 3 * small["first_save_bytes"]
    # 3000 more completions have a bit each, and 30 more prompts a few bytes.
    assert large["save_bytes"] < small["save_bytes"] + 3000 < small["first_save_bytes"]
