"""`Trainer.step` belongs to the last phase."""

import pytest

from nested_reft.run_directory import RunDirectory
from nested_reft.training.config import load_config
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer


def test_a_step_before_the_warm_start_is_refused(tmp_path):
    """It would train on its own samples as if they were demonstrations."""
    setup = prepare(load_config("tiny", warm_start={"steps": 2}))
    with Trainer(setup, RunDirectory(tmp_path)).open() as trainer, pytest.raises(RuntimeError, match="'warm start'"):
        trainer.step(0)
