"""What the cases of the presets with targets reached of what is asked of them."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from shapes import GROWTH, GROWTH_FROM, TARGETS, Target

Row = dict[str, Any]
Key = tuple[Any, ...]
Table = Mapping[Key, list[Row]]  # the rows of each case, ours first

# Temporaries of the backward: an entry of dq summed in float32, and some numbers for a row of q.
_ENTRY_BYTES, _ROW_BYTES = 4, 32


class Verdict(NamedTuple):
    case: str
    what: str
    reached: float
    asked: float
    at_most: bool = False  # is what is asked; else at least

    @property
    def met(self) -> bool:
        return self.reached <= self.asked if self.at_most else self.reached >= self.asked

    def __str__(self) -> str:
        word, bound = "reached" if self.met else "missed", "most" if self.at_most else "least"
        return f"{word}: {self.what} {self.reached:.4g}, at {bound} {self.asked:.4g} is asked"


def key(row: Mapping[str, Any]) -> Key:
    """Of the case, from a row of it or the target's columns."""
    return tuple(row[name] for name in GROWTH[0].columns())


def _timed(target: Target, table: Table) -> Row | None:
    """Our row of the case, if there is one with a time."""
    rows = table.get(key(target.columns()))
    return rows[0] if rows and "ms" in rows[0] else None


def _ratio(target: Target, table: Table) -> float | None:
    return (_timed(target, table) or {}).get("best_peer_over_ours")


def of_case(target: Target, table: Table) -> Iterator[Verdict]:
    """What is asked of the case; of both passes in one, beside rows of either if those are there.

    One whose peers have no time is asked nothing beside them.
    """
    case, ours = str(target), _timed(target, table)
    if ours is None:
        return
    ratio = _ratio(target, table)
    if target.at_least is not None and ratio is not None:
        yield Verdict(case, "best peer / ours", ratio, target.at_least)
    if target.at_most_us is not None:
        yield Verdict(case, "microseconds", 1e3 * ours["ms"], target.at_most_us, at_most=True)
    if target.accuracy:
        for row in table[key(target.columns())][1:]:
            if "error" in row:
                what = f"relative error beside {row['implementation']}'s"
                yield Verdict(case, what, ours["error"], row["error"], at_most=True)
    if target.direction == "both":
        parts = [_ratio(target._replace(direction=part), table) for part in ("fwd", "bwd")]
        if ratio is not None and parts[0] is not None and parts[1] is not None:
            what = "best peer / ours beside the weaker pass's"
            yield Verdict(case, what, ratio, min(parts[0], parts[1]))


def of_table(table: Table) -> list[Verdict]:
    """All that its rows decide, of every preset."""
    of_cases = (verdict for target in _targets() for verdict in of_case(target, table))
    return [*of_cases, *of_all(table)]


def _targets() -> list[Target]:
    return [target for preset in TARGETS.values() for target in preset]


def of_all(table: Table) -> Iterator[Verdict]:
    """What is asked of many cases together."""
    targets = _targets()
    both = [_ratio(target, table) for target in targets if target.direction == "both"]
    if ratios := [ratio for ratio in both if ratio is not None]:
        mean = statistics.geometric_mean(ratios)
        yield Verdict(f"both, {len(ratios)} cases", "geometric mean", mean, 1.3)

    bytes_of_entry = {}
    for target in targets:
        ours = _timed(target, table)
        if target.direction == "bwd" and target.dtype != "float32" and ours is not None:
            rows = target.shape.batch * target.shape.seq_len * target.shape.num_heads
            beyond = ours["temporary_bytes"] - _ROW_BYTES * rows
            bytes_of_entry[str(target)] = beyond / (rows * target.shape.head_dim)
    if bytes_of_entry:
        worst = max(bytes_of_entry, key=lambda case: bytes_of_entry[case])
        what = f"temporary bytes for each entry of dq, most of {len(bytes_of_entry)} cases"
        yield Verdict(worst, what, bytes_of_entry[worst], _ENTRY_BYTES, at_most=True)

    long = [target for target in GROWTH if target.shape.seq_len >= GROWTH_FROM]
    grown = [(target.shape.seq_len, _timed(target, table)) for target in long]
    for what, name, power in (("time / T^2", "ms", 2), ("temporaries / T", "temporary_bytes", 1)):
        values = [ours[name] / t**power for t, ours in grown if ours is not None]
        if len(values) == len(long):
            least, most = min(values), max(values)
            spread = (most - least) / (least or 1)  # the call may need no temporaries
            yield Verdict(f"T from {GROWTH_FROM} up", f"spread of {what}", spread, 0.1, True)
