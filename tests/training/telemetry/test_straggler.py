"""The slowest rank is named with its host once it has been much slower for several reports."""

from megabert.training.telemetry.straggler import IN_A_ROW, Straggler


def test_a_lasting_straggler_is_named_once():
    straggler = Straggler(["n1", "n1", "n2", "n2"])
    slow = [1000.0, 1010.0, 800.0, 990.0]
    said = [straggler.update(slow) for _ in range(IN_A_ROW + 2)]
    assert [line for line in said if line] == [
        "straggler: rank 2 on n2 is slow in data and forward: 800 tokens/s, the median rank 995; all ranks wait for it"
    ]
    assert said[IN_A_ROW - 1]


def test_chance_is_no_straggler():
    straggler = Straggler(["n1", "n2", "n3"])
    assert all(straggler.update(rates) is None for rates in ([9.0, 10.0, 10.0], [1, 10, 10], [10, 1, 10]) * 5)
    assert Straggler(["n1"]).update([5.0]) is None
