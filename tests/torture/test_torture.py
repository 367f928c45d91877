"""A small draw of ``make torture`` with a seed. docs/reliability.md has the counts of the whole."""

from __future__ import annotations

import pytest

from tests.torture.__main__ import run


@pytest.mark.slow
def test_a_small_draw_of_attacks_has_no_faults() -> None:
    tallies = run(kill_count=2, flip_count=8, input_count=12, seed=1)
    assert [fault for tally in tallies for fault in tally.faults] == []
    assert all(tally.counts for tally in tallies)
