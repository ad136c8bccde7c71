"""The notebooks: what each has to say and keep, and that they run from top to bottom with few steps."""

import re
from pathlib import Path

import jax
import nbformat
import pytest
from nbclient.exceptions import CellTimeoutError

from nested_reft.models.config import ModelConfig
from nested_reft.models.formats.gguf_tokenizer import gguf_tokenizer
from nested_reft.models.formats.huggingface import save_huggingface
from nested_reft.models.parameters import initial_parameters
from nested_reft.models.registry import resolve_model
from nested_reft.models.transformer import Transformer
from scripts.run_notebooks import NOTEBOOKS, ROOT, clean, execute, with_parameters
from tests.shared_data import original_files

SMALL = {
    "first_steps": {"QUESTIONS": '["What is 2 + 2?"]', "MAX_TOKENS": "4", "WARM_STEPS": "2", "STEPS": "5"},
    "what_skipping_costs": {"FIT_SAMPLES": "1", "MEASURE_SAMPLES": "1", "MAX_TOKENS": "4", "COUNTS": "[2]"},
    "your_task_and_reward": {"ROWS": "400", "WARM_STEPS": "2", "STEPS": "2", "MENDED_STEPS": "5"},
    "correcting_off_policy": {"CORRECTIONS": '["mixture"]', "WARM_STEPS": "2", "STEPS": "2", "CONTROLLED_STEPS": "5"},
}
# Without the model and the data, which the test provides.
SMALL_QWEN = {
    "DTYPE": '"float32"',
    "SKIP_RATIOS": "[0.0, 0.1]",
    "STEPS": "1",
    "PROMPTS": "2",
    "GROUP_SIZE": "2",
    "MAX_TOKENS": "8",
    "HELDOUT": "2",
}
NAMES = [*SMALL, "qwen_gsm8k_lora"]
MOST_BYTES = 300_000
CELL_SECONDS = 600  # on one busy core, the longest notebook takes 210 seconds as a whole
# Folders in which machines keep what is theirs.
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|tmp|work|usr|opt|var|mnt|Users|private)/")


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def run(name: str, values: dict[str, str], folder: Path) -> nbformat.NotebookNode:
    notebook = read(name)
    with_parameters(notebook, values)
    execute(notebook, folder, CELL_SECONDS)
    return notebook


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_five_notebooks_and_the_readme_lists_them():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"(notebooks/{name}.ipynb)" in readme for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_begins_with_what_a_reader_needs(name):
    first, install, *rest = read(name).cells
    assert first.source.startswith("# ")
    for words in (
        "colab-badge.svg",
        "https://colab.research.google.com/",
        "**What you learn.**",
        "**Time and hardware.**",
    ):
        assert words in first.source
    # What is there already is not installed anew.
    assert 'if importlib.util.find_spec("nested_reft") is None:\n    ' in install.source
    assert "%pip install" in install.source and "\n%pip" not in install.source
    assert [cell for cell in rest if "parameters" in cell.metadata.get("tags", [])]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_keeps_outputs_and_nothing_of_the_machine_that_made_them(name):
    path, notebook = NOTEBOOKS / f"{name}.ipynb", read(name)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert pictures(notebook) and any(output.output_type == "stream" for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not [cell.metadata for cell in cells if "execution" in cell.metadata]
    assert MACHINE_PATH.search(path.read_text(encoding="utf-8")) is None
    assert path.stat().st_size < MOST_BYTES


def test_parameters_are_replaced_in_their_cell_and_unknown_ones_refused():
    notebook = read("first_steps")
    with_parameters(notebook, {"STEPS": "3", "QUESTIONS": r'["\1"]'})
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    assert cell.source == 'MODEL = "smollm2-135m"\nQUESTIONS = ["\\1"]\nMAX_TOKENS = 32\nWARM_STEPS = 200\nSTEPS = 3'
    with pytest.raises(ValueError, match="sets 'STEP' 0 times; allowed is once"):
        with_parameters(notebook, {"STEP": "3"})


def test_bars_and_messages_are_left_out_of_the_outputs():
    cell = nbformat.v4.new_code_cell("train()")
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="start\n"),
        nbformat.v4.new_output("stream", name="stderr", text="50 %"),
        nbformat.v4.new_output("stream", name="stdout", text="1 %\r99 %\rdone\r\nend\n"),
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    clean(notebook)
    assert [output.text for output in notebook.cells[0].outputs] == ["start\ndone\r\nend\n"]


def test_a_cell_that_is_stuck_ends_the_notebook(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import time; time.sleep(60)")])
    with pytest.raises(CellTimeoutError):
        execute(notebook, tmp_path, cell_seconds=1)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> str:
    """A random model of Qwen2's family as deep as SmolLM2, with a tokenizer that has a chat template."""
    config = ModelConfig(
        vocab_size=49_152,
        num_layers=30,
        width=16,
        hidden_width=16,
        num_heads=2,
        num_kv_heads=1,
        head_size=8,
        qkv_bias=True,
        max_positions=512,
        family="qwen2",
    )
    directory = tmp_path_factory.mktemp("model") / "stand_in"
    model = Transformer(config, initial_parameters(config, jax.random.key(0)))
    save_huggingface(model, directory, gguf_tokenizer(resolve_model("smollm2-135m").location))
    return repr(str(directory))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs_from_top_to_bottom(name, stand_in, tmp_path):
    model = {"MODEL": stand_in} if name in ("first_steps", "what_skipping_costs") else {}
    found = run(name, SMALL[name] | model, tmp_path)
    # Each has as many pictures as when it was made, live curves included.
    assert pictures(found) == pictures(read(name))


@pytest.mark.slow
def test_the_notebook_for_qwen_runs_with_a_stand_in(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    places = {"MODEL": stand_in, "GSM8K_FOLDER": repr(original_files("gsm8k"))}
    found = run("qwen_gsm8k_lora", SMALL_QWEN | places, tmp_path)
    text = "".join(output.get("text", "") for cell in found.cells for output in cell.get("outputs", []))
    # The table of runs, and that of slices.
    assert re.search(r"^10%\s+3 of 30 ", text, re.MULTILINE) and "| qwen2.5-7b |" in text
