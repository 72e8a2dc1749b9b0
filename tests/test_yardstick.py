"""What the yardstick lets pass, and what it does not."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import yardstick
from yardstick import Errors, check, hold, make_inputs

F32 = np.dtype(np.float32)
SCALE = np.array([8, -2], np.float32)
RESULTS = ("out", "lse", "dq", "dk", "dv", "dscale")
inputs = functools.partial(make_inputs, F32, b=1, t=9, s=17)


def off_by(monkeypatch: pytest.MonkeyPatch, name: str, limits: Callable[[int], float]) -> None:
    """One element of result `name` is off by so many limits more, per number of the call."""
    errors, calls = yardstick.errors, iter(range(yardstick.CALLS))

    def with_defect(*args):
        found = errors(*args)
        error, of_plain, exact = found[name]
        limit = 2 * of_plain.max() + 4 * np.finfo(F32).eps * max(1, np.abs(exact).max())
        error.flat[error.argmax()] += limits(next(calls)) * limit
        return found

    monkeypatch.setattr(yardstick, "errors", with_defect)


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize(
    "limits", [lambda call: 1.0, lambda call: 20.0 * (call == 0)], ids=["every call", "one call"]
)
def test_defects_are_seen(monkeypatch, name, limits):
    off_by(monkeypatch, name, limits)
    with pytest.raises(AssertionError, match=f"(?m)^{name}: maximum error"):
        check("reference", inputs, scale=SCALE)


@pytest.mark.parametrize("name", RESULTS)
def test_luck_averages_out(monkeypatch, name):
    """Off in one call of 16, by no more than the plain formula is with luck: a defect only where
    there are no other calls to tell."""
    off_by(monkeypatch, name, lambda call: 3.0 * (call == 0))
    with pytest.raises(AssertionError, match=f"(?m)^{name}: maximum error"):
        check("reference", inputs(), scale=SCALE)
    monkeypatch.undo()
    off_by(monkeypatch, name, lambda call: 3.0 * (call == 0))
    check("reference", inputs, scale=SCALE)


def test_other_calls_are_made_where_one_misses():
    """The mean of the errors is held to the mean of the limits, here 2."""

    def seeds(errors: Callable[[int], float]) -> list[int]:
        seen = []

        def errors_of(seed: int) -> Errors:
            seen.append(seed)
            return {"out": (np.array([errors(seed)]), np.ones(1), np.zeros(1))}

        hold(errors_of, F32)
        return seen

    assert seeds(lambda seed: 2.0) == [0]
    assert seeds(lambda seed: 3.0 if seed == 0 else 1.5) == list(range(yardstick.CALLS))
    with pytest.raises(AssertionError, match="out: maximum error 2.06, at most 2 "):
        seeds(lambda seed: 3.0 if seed == 0 else 2.0)
