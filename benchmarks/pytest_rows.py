"""A pytest plugin for a stage (benchmarks/stages.py): a row for each failed test at once, and one for the counts.

pytest -p benchmarks.pytest_rows ...
"""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.stages import emit

_counts: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        text = report.longreprtext.strip().split("\n")
        emit(
            test=report.nodeid,
            phase=report.when,
            failed=text[-1][:300],
            say=f"FAILED {report.nodeid}: {text[-1][:200]}",
        )
    if report.when == "call" or (report.when == "setup" and not report.passed):
        _counts[report.outcome] += 1


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        text = report.longreprtext.strip().split("\n")
        _counts["not collected"] += 1
        emit(test=report.nodeid, phase="collection", failed=text[-1][:300], say=f"NOT COLLECTED {report.nodeid}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # of pytest-xdist's processes the first alone
        emit(tests=dict(_counts), say=", ".join(f"{count} {outcome}" for outcome, count in _counts.items()))
