"""benchmarks/scaling.py: fitted exponents, and series that measure every size in every round."""

from __future__ import annotations

import pytest

from benchmarks import scaling


def test_exponents_are_fitted() -> None:
    points = [(n, 0.5 * n**1.5) for n in (1, 2, 4, 8)]
    assert scaling.slope(points) == pytest.approx(1.5)
    assert scaling.between([*points, (16, 2 * 0.5 * 8**1.5)]) == pytest.approx([1.5, 1.5, 1.5, 1.0])


def test_every_size_is_timed_in_every_round() -> None:
    sizes: list[int] = []

    def timed(size: int) -> float:
        sizes.append(size)
        return float(size)

    measured = scaling.measure({"steps": ((2, 4), timed)}, rounds=3)
    assert sizes == [2, 4] * 4
    assert measured == {"steps": [(2, 2.0), (4, 4.0)]}
    record = {"model": "m", "dtype": "float32", "machine": {"name": "A <CPU>"}}
    series = {"points": measured["steps"], "exponent": 1.0, "expected": 1.0, "between": [1.0]}
    page = scaling.page({**record, "series": {"steps": series}})
    assert "A &lt;CPU&gt;" in page
    assert page.count("<circle") == 2
