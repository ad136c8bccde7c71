"""What more devices cost: the expected time, and the table, by hand."""

import pytest

from experiments import scaling
from nested_reft.plan_price import Ceilings

RATES = Ceilings(bytes_per_second=100.0, flops_per_second=1000.0)


def cost(devices: int, flops: float, hbm: float, sent: float, times: int = 0) -> dict:
    found = {"devices": devices, "flops": flops, "hbm_bytes": hbm, "ici_bytes": sent}
    return found | {"collectives": [{"times": times}, {"times": times}]}


def test_a_machine_does_the_work_of_all_its_devices():
    # 5,000 products take 5 s, and 100 bytes 1 s.
    assert scaling.expected_seconds(cost(1, 5000, 100, 0), RATES) == 5.0
    # Twice 500 products take 1 s; twice 150 bytes of memory and 50 that are sent take 4 s.
    assert scaling.expected_seconds(cost(2, 500, 150, 50), RATES) == 4.0


def test_times_stand_beside_those_of_one_device():
    one = scaling.figures(cost(1, 1000, 0, 0), [0.02, 0.01, 0.09], RATES)
    two = scaling.figures(cost(2, 1000, 0, 7000.0, times=3), [0.05], RATES)
    found = {"1": {"update": one}, "2, data": {"update": two}}
    assert scaling.rows_of(found, "update") == [
        ["1", "20.0", "1.00", "1000.00", "1.00", "0", "0.0"],
        # Sending takes 2 * 7,000 bytes / 100 = 140 s.
        ["2, data", "50.0", "2.50", "140000.00", "140.00", "6", "7.0"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "2", "4"], "--devices does not begin with 1, which the others are compared with"),
        (["--devices", "1", "3"], "mesh.data is 3; it must divide the prompts of a micro-batch, 16"),
        (["--config", "smollm2_chain_sum"], "--config is 'smollm2_chain_sum', whose model is not from scratch"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert scaling.main(arguments) == 2
    assert message in capsys.readouterr().err
