"""examples/lm/plot.py: the arithmetic behind the figures."""

import pytest

plot = pytest.importorskip("lm.plot")


def test_smooth_and_spread() -> None:
    assert plot.smooth([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
    low, middle, high = plot.spread([1.0, 1.0, 5.0], 0.5)
    assert middle - low == pytest.approx(0.5, abs=1e-6) and high == 5.0
