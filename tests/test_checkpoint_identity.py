"""What a checkpoint is of: which are read, and which are refused."""

import dataclasses

import pytest

from nested_reft.checkpoint_identity import FORMAT, check_format, check_identity, checkpoint_identity
from nested_reft.tokenizer import Tokenizer
from tests.tiny_models import TINY

WHERE = "checkpoint 3"


def identity(**changes):
    """The identity of a checkpoint of a small model, with other values."""
    return checkpoint_identity("tiny", TINY, Tokenizer.characters("0123")) | changes


@pytest.mark.parametrize("stored", [None, identity(), identity(version="0.0.1", format=FORMAT - 1)])
def test_a_checkpoint_of_the_same_or_from_before_identities_is_read(stored):
    check_format(stored, WHERE)
    check_identity(stored, identity(), WHERE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "other"}, "^checkpoint 3 is of model 'other', and this run has model 'tiny'$"),
        ({"shape": dataclasses.asdict(dataclasses.replace(TINY, width=8))}, "'tiny': width was 8 and is 16. Its"),
        ({"tokenizer": "another"}, "^checkpoint 3 was written with another tokenizer of model 'tiny'"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_identity(identity(**changes), identity(), WHERE)
