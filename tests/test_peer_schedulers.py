"""diffusers' configuration space against ours: nothing crashes, and nothing is off without a reason in the table."""

from __future__ import annotations

import pytest
from peer_schedulers import CUSTOM, KINDS, RESULTS, cases, choices, judged, pairs
from scheduler_judge import DIFFERENCES, REFUSALS, Verdict
from scheduler_runs import Case

from fastldm.samplers.classes import DIFFUSERS

NAMES = {row.name for row in (*DIFFERENCES, *REFUSALS)}


def check(results: list[tuple[Case, Verdict]]) -> None:
    wrong = [verdict for _, verdict in results if verdict.kind in ("unknown", "crashed")]
    assert not wrong, f"{len(wrong)} of {len(results)}:\n" + "\n".join(verdict.reasons[0] for verdict in wrong[:10])
    assert {verdict.kind for _, verdict in results} <= set(KINDS)
    assert {reason for _, verdict in results for reason in verdict.reasons} <= NAMES


@pytest.mark.parametrize("name", DIFFUSERS)
def test_sampled_configurations_agree_or_have_a_reason(name: str) -> None:
    check(judged([case for case in cases(name) if case.steps < 100][:6]))


@pytest.mark.full
@pytest.mark.parametrize("name", DIFFUSERS)
def test_all_configurations_agree_or_have_a_reason(name: str) -> None:
    check(judged(cases(name)))


@pytest.mark.full
@pytest.mark.parametrize("name", DIFFUSERS)
def test_configurations_cover_all_pairs_of_values(name: str) -> None:
    options = choices(name)
    rows = list(pairs(options, name))
    for a in options:
        for b in options:
            if a < b:
                together = {(str(row[a]), str(row[b])) for row in rows}
                assert len(together) == len(options[a]) * len(options[b])


def test_committed_table_has_all_configurations() -> None:
    """Of every class; none unknown, none crashed, and no reason that there no longer is."""
    text = RESULTS.read_text()
    counts = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in (*DIFFUSERS, "all"):
            counts[cells[0]] = [int(cell) for cell in cells[1:]]
        elif cells[0].isdigit():
            assert cells[1] in NAMES
    assert set(counts) == {*DIFFUSERS, "all"}
    for name, count in counts.items():
        assert count[KINDS.index("unknown") :] == [0, 0]
        assert count[KINDS.index("agree")] > 0
        if name != "all":
            assert sum(count) == len(cases(name)), "run `python tests/support/peer_schedulers.py`"
    assert set(CUSTOM) == {"timesteps", "sigmas"}
