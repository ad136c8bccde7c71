"""The package as a whole: what importing it costs, which room may import which, what it must never do."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from nested_reft.layer_plan import LayerPlan, PlanShape
from nested_reft.types import valid_mask

ROOT = Path(__file__).parents[1]
OPTIONAL = {
    "torch",
    "tensorflow",
    "reasoning_gym",
    "matplotlib",
    "IPython",
    "transformers",
    "tensorflow_datasets",
    "math_verify",
    "ray",
    "wandb",
}
# These are parts of namespaces that other packages share.
OPTIONAL_PARTS = {"google.cloud.storage", "google.auth"}

RULES = {
    "estimators", "losses", "curriculum", "replay", "replay_store", "replay_saving", "dataset_reset", "kl_control",
    "mix_control", "nesting_control",
    "rewards", "data",
}  # fmt: skip
# A room imports rooms of its own line or of lines above, never in a circle.
LAYERS = [
    {"untrusted"},
    {
        "templates",
        "literals",
        "fields",
        "json_files",
        "host_values",
        "diversity",
        "config_files",
        "compilation",
        "heartbeat",
        "intervals",
        "program_cache",
        "prompt_format",
        "processes",
        "exit_codes",
        "backends",
    },
    {"remote_files"},
    {"paths"},
    {"layer_plan"},
    {"types"},
    {"bridging"},
    {"layer_skip"},
    RULES,
    {"sharding"},
    {"models", "tokenizer"},
    {"plan_price"},
    {"checkpoints", "checkpoint_identity"},
    {"run_owner"},
    {"run_mirror"},
    {"rollout"},
    {"reward_model"},
    {"evaluation", "divergence", "run_logs"},
    {"bridge_fitting", "bridge_file", "benchmarks", "wandb_log"},
    {"run_directory"},
    {"reports"},
    {"training"},
    {"api"},
    {"sweeps"},
    {"verification"},
    {"cli"},
    {"command"},
    {"__main__"},
    {"configs", "experiments"},
]
MODEL_SIDE = {"sharding", "models", "tokenizer", "rollout"}  # knows no rule: what to sample is not how to train


def room_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return "experiments" if parts[0] == "experiments" else parts[1]


def imported_modules(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything a file imports, inside functions too."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def source_files(root: Path, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def room_imports(root: Path) -> dict[tuple[str, str], str]:
    """(importing room, imported room) -> where, for all rooms of the tree under `root`."""
    edges: dict[tuple[str, str], str] = {}
    for path in source_files(root, "nested_reft", "experiments"):
        room = room_of(path, root)
        for line, name in imported_modules(path, root):
            parts = name.split(".")
            if parts[0] == "experiments":
                target = "experiments"
            elif parts[0] == "nested_reft" and len(parts) > 1 and not parts[1].startswith("__"):
                target = parts[1]
            else:
                continue
            if target != room and room != "__init__":
                edges.setdefault((room, target), f"{path.relative_to(root)}:{line}")
    return edges


def dependency_violations(root: Path) -> list[str]:
    """Every import that goes against `LAYERS`, and every room that has no place in it."""
    rank = {room: index for index, rooms in enumerate(LAYERS) for room in rooms}
    edges = room_imports(root)
    rooms = {room_of(path, root) for path in source_files(root, "nested_reft", "experiments")} - {"__init__"}
    found = [f"room '{room}' has no place in LAYERS; give it one" for room in sorted(rooms - rank.keys())]
    for (room, target), where in sorted(edges.items()):
        if room not in rank or target not in rank:
            continue
        if rank[target] > rank[room]:
            found.append(f"{where}: {room} imports {target}, which stands above it")
        if room in MODEL_SIDE and target in RULES:
            found.append(f"{where}: {room} imports {target}, a rule of training")
        if room < target and (target, room) in edges:
            found.append(f"{where} and {edges[target, room]}: {room} and {target} import each other")
    return found


def unpickling(root: Path) -> list[str]:
    """Every place in the package that could run code found in data."""
    found = []
    for path in source_files(root, "nested_reft"):
        where = path.relative_to(root)
        for line, name in imported_modules(path, root):
            if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}:
                found.append(f"{where}:{line}: imports {name}")
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in {"eval", "exec", "torch.load"}:
                found.append(f"{where}:{node.lineno}: calls {called}")
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                    found.append(f"{where}:{node.lineno}: allow_pickle is not False")
    return found


def moves_of_arrays(root: Path) -> list[str]:
    """Every place but the sharding room that puts arrays on devices or fetches them by JAX's own functions.

    They know one process only: of several, they exchange more than is needed, or raise.
    """
    found = []
    for path in source_files(root, "nested_reft"):
        if room_of(path, root) == "sharding":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in {"device_put", "device_get", "process_allgather"}:
                found.append(f"{path.relative_to(root)}:{node.lineno}: {node.attr}")
    return found


# Where `Path` is made of what no user has given: names that the program made itself, or a path that `paths` has seen.
OWN_PATHS = {
    "nested_reft/paths.py": "the functions themselves",
    "nested_reft/checkpoints.py": "names in a seal",
    "nested_reft/cli/train.py": "`_check_runs_directory` after `is_remote`",
    "nested_reft/cli/verify_estimators.py": "after `local_file`",
    "nested_reft/command.py": "how the program was called",
    "nested_reft/data/datasets.py": "names in an archive, a variable of TFDS, a temporary file",
    "nested_reft/models/formats/gguf_reader.py": "what the registry found",
    "nested_reft/models/formats/huggingface.py": "what the registry found",
    "nested_reft/models/formats/huggingface_tokenizer.py": "what the registry found",
    "nested_reft/models/registry.py": "what `local_path` gave, packages, the hub's cache",
    "nested_reft/program_cache.py": "the user's cache",
    "nested_reft/rewards/worker.py": "a file that `with_absolute_paths` has seen",
    "nested_reft/run_directory.py": "a root that is not `is_remote`",
    "nested_reft/run_mirror.py": "a source that is not `is_remote`",
    "nested_reft/run_owner.py": "the system's files",
    "nested_reft/templates/render.py": "the package",
    "nested_reft/tokenizer.py": "a directory that is written",
}


def paths_of_users(root: Path) -> list[str]:
    """Every place that may make a `Path` of what a user gave: `Path("gs://x")` would be `gs:/x`, without a word."""
    found = []
    for path in source_files(root, "nested_reft"):
        where = str(path.relative_to(root))
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            is_made = ast.unparse(node.func) == "Path" and node.args and ast.unparse(node.args[0]) != "__file__"
            if is_made and where not in OWN_PATHS:
                found.append(f"{where}:{node.lineno}: {ast.unparse(node)}; use nested_reft.paths")
            if any(keyword.arg == "type" and ast.unparse(keyword.value) == "Path" for keyword in node.keywords):
                found.append(f"{where}:{node.lineno}: a Path as an option; use `local_file`, or text and `local_run`")
    return found


def run_python(code: str):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_import_is_quick_and_brings_nothing_optional():
    seconds, loaded = run_python(
        "import json, sys, time; start = time.perf_counter(); import nested_reft;"
        " print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))"
    )
    assert seconds < 2
    assert not OPTIONAL & {name.split(".")[0] for name in loaded} and not OPTIONAL_PARTS & set(loaded)


def test_no_module_imports_an_optional_package_at_its_top():
    loaded = run_python(
        # Flax imports IPython where it is installed; where it cannot be imported, a module of ours at its top fails.
        "import sys; sys.modules['IPython'] = None\n"
        "import importlib, json, pkgutil, nested_reft\n"
        "for module in pkgutil.walk_packages(nested_reft.__path__, 'nested_reft.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(json.dumps(sorted(name for name, module in sys.modules.items() if module)))"
    )
    assert not OPTIONAL & {name.split(".")[0] for name in loaded} and not OPTIONAL_PARTS & set(loaded)


def test_every_imported_package_is_declared():
    """A missing one is not noticed where a developer happens to have it, and breaks a fresh install."""
    try:
        requirements = importlib.metadata.requires("nested_reft") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nested_reft is not installed, so there is no list to compare with")
    normal = {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", text, maxsplit=1)[0]).lower() for text in requirements}
    providers = importlib.metadata.packages_distributions()
    undeclared = set()
    for path in source_files(ROOT, "nested_reft"):
        for line, name in imported_modules(path, ROOT):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "nested_reft":
                continue
            names = {re.sub(r"[-_.]+", "-", provider).lower() for provider in providers.get(top, [top])}
            if not names & normal:
                undeclared.add(f"{path.relative_to(ROOT)}:{line}: {top}")
    assert not undeclared


def test_signatures_are_checked_here():
    """conftest.py's hook: wrong arrays are refused where our code makes them, JAX's rebuilding is let through."""
    with pytest.raises(jaxtyping.TypeCheckError, match="layer_S"):
        LayerPlan(jnp.ones(3), jnp.ones(3, int), PlanShape(3))
    with pytest.raises(jaxtyping.TypeCheckError, match="length"):
        valid_mask(jnp.ones(2), 3)
    plan = LayerPlan.full(3)
    assert jax.device_get(plan).layer_S.tolist() == [0, 1, 2]
    assert jax.eval_shape(lambda p: p, plan).layer_S.shape == (3,)
    assert jax.device_count() == 8 or jax.default_backend() != "cpu"


def test_rooms_depend_one_way():
    assert dependency_violations(ROOT) == []


def test_arrays_move_in_one_place():
    # A row of each process is no array of the mesh.
    assert [each for each in moves_of_arrays(ROOT) if not each.startswith("nested_reft/processes.py")] == []


def test_a_move_elsewhere_is_found(tmp_path):
    files = {"nested_reft/sharding.py": "jax.device_put(x)", "nested_reft/rollout/a.py": "x = 1\njax.device_get(x)"}
    assert moves_of_arrays(write_tree(tmp_path, files)) == ["nested_reft/rollout/a.py:2: device_get"]


def test_paths_of_users_go_through_one_module():
    assert paths_of_users(ROOT) == []
    assert [name for name in OWN_PATHS if "Path(" not in (ROOT / name).read_text()] == []


def test_a_path_of_a_user_elsewhere_is_found(tmp_path):
    code = "Path(name)\nPath(__file__)\nparser.add_argument('--out', type=Path)"
    files = {"nested_reft/cli/a.py": code, "nested_reft/paths.py": "Path(name)"}
    first, second = paths_of_users(write_tree(tmp_path, files))
    assert first.startswith("nested_reft/cli/a.py:1: Path(name)") and second.startswith(
        "nested_reft/cli/a.py:3: a Path as"
    )


def test_nothing_is_unpickled():
    assert unpickling(ROOT) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"nested_reft/types.py": "from nested_reft.models import config"}, "types imports models, which stands above"),
        (
            {"nested_reft/types.py": "def f():\n    import nested_reft.training.step"},
            "nested_reft/types.py:2: types imports",
        ),
        ({"nested_reft/models/a.py": "from ..training import step"}, "models imports training, which stands above"),
        ({"nested_reft/models/a.py": "from nested_reft import losses"}, "models imports losses, a rule of training"),
        ({"nested_reft/rollout/a.py": "import nested_reft.replay"}, "rollout imports replay, a rule of training"),
        (
            {"nested_reft/rollout/a.py": "from nested_reft.data import tasks"},
            "rollout imports data, a rule of training",
        ),
        ({"nested_reft/literals.py": "from nested_reft import types"}, "literals imports types, which stands above"),
        (
            {"nested_reft/checkpoints.py": "from nested_reft.rollout.policy import Policy"},
            "checkpoints imports rollout, which stands above",
        ),
        ({"nested_reft/cli/main.py": "import experiments.ablation"}, "cli imports experiments, which stands above"),
        ({"nested_reft/helpers.py": ""}, "room 'helpers' has no place in LAYERS"),
        (
            {
                "nested_reft/data/a.py": "from nested_reft.rewards import b",
                "nested_reft/rewards/b.py": "from nested_reft.data import a",
            },
            "data and rewards import each other",
        ),
    ],
)
def test_wrong_dependency_is_found(tmp_path, files, message):
    found = dependency_violations(write_tree(tmp_path, files))
    assert len(found) == 1 and message in found[0]


def test_right_dependency_is_allowed(tmp_path):
    files = {
        "nested_reft/__init__.py": "__version__ = '1'",
        "nested_reft/cli/train.py": "from nested_reft import __version__\nfrom nested_reft.training import step",
        "nested_reft/training/step.py": "from . import other\nfrom ..losses import policy\nimport nested_reft.models",
        "nested_reft/types.py": "from nested_reft.layer_plan import LayerPlan",
        "experiments/configs/a.py": "from nested_reft.training.config import Config",
    }
    assert dependency_violations(write_tree(tmp_path, files)) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import pickle", "imports pickle"),
        ("def f(x):\n    from pickle import loads", "a.py:2: imports pickle.loads"),
        ("eval('1')", "calls eval"),
        ("torch.load('x')", "calls torch.load"),
        ("np.load('x', allow_pickle=True)", "allow_pickle is not False"),
    ],
)
def test_unpickling_is_found(tmp_path, code, message):
    found = unpickling(write_tree(tmp_path, {"nested_reft/a.py": code}))
    assert len(found) == 1 and message in found[0]


def test_harmless_namesakes_are_allowed(tmp_path):
    assert (
        unpickling(write_tree(tmp_path, {"nested_reft/a.py": "model.eval()\nnp.load('x', allow_pickle=False)"})) == []
    )
