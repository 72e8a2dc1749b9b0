"""benchmarks/tune.py: which tiles take part, and which is said to be best."""

import functools

import jax.numpy as jnp
import pytest
import tune
from timing import Timing
from tune import Case, Key

FWD = {
    "family": "sm90", "direction": "fwd", "arithmetic": "float16", "raw": False, "head_dim": 64,
}  # fmt: skip


def row(candidate, smem_bytes=1000, **changes):
    tile = {"block_m": 256, "block_n": 64, "stages": 8, "key_stages": 0}
    return FWD | tile | {"candidate": candidate, "smem_bytes": smem_bytes} | changes


def test_candidates_beside_the_shipped_tile():
    """The shipped one comes first; left out are portable kernels, those that normalise q and k
    themselves, and keys without another tile."""
    table = [
        row(0, raw=True), row(2), row(0), row(1, smem_bytes=3000),
        row(0, head_dim=128), row(1, head_dim=128, smem_bytes=3000),
        row(0, family="sm80"), row(1, family="sm80"),
        row(0, direction="bwd"), row(1, direction="bwd"),
    ]  # fmt: skip
    found = tune.candidates(table, smem_bytes=2000)
    assert {key: [x["candidate"] for x in rows] for key, rows in found.items()} == {
        Key("fwd", "float16", 64): [0, 2],
        Key("bwd", "float16", 64): [0, 1],
    }


def test_forward_cases_are_those_that_take_the_tiles():
    assert tune.cases_of("fwd", (512, 2048)) == [Case(2048, False), Case(2048, True)]
    assert [case.seq_len for case in tune.cases_of("bwd", (512, 2048))] == [512, 512, 2048, 2048]


def test_best_has_the_least_geometric_mean():
    short, long = Case(512, False), Case(4096, True)
    ms = {
        short: {"0": 1.0, "1": 0.5, "2": 0.9, "3": 0.1},
        long: {"0": 10.0, "1": 20.0, "2": 9.0},  # 3 was wrong here
    }
    order = tune.ranked(ms)
    assert order[0][0] == "2"
    assert dict(order) == pytest.approx({"0": 1.0, "1": 1.0, "2": 0.9})


def test_wrong_results_do_not_take_part():
    x = jnp.arange(8.0)
    calls = {"0": lambda: (x, -x), "1": lambda: (x, -x * 1.001), "2": lambda: (x, x)}
    calls["3"] = lambda: (x * jnp.nan, -x)
    assert list(tune.right(calls)) == ["0", "1"]


def test_each_candidate_must_have_run_a_kernel_of_its_own():
    def timing(*kernels):
        return Timing(1.0, "device span", kernels)

    apart = {"0": timing("norm", "cosine_attn<4>"), "1": timing("norm", "cosine_attn<2>")}
    tune.check_kernels(apart)
    with pytest.raises(AssertionError):
        tune.check_kernels(apart | {"2": timing("norm", "cosine_attn<4>")})


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_every_call_selects_its_candidate(direction, monkeypatch):
    """Whatever implementation runs here, the hook is told before a call, and put back after all are
    compiled."""
    selected, seen = [], []
    key, rows = Key(direction, "float16-bfloat16", 64), [row(0), row(1, block_n=128)]

    def timed(calls, num_times):
        seen.append(selected[-1])
        for name, call in calls.items():
            call()
            assert selected[-1] == int(name)
        return {name: Timing(1.0 + int(name), "wall", ()) for name in calls}

    monkeypatch.setattr(tune, "WIDTH", 128)
    monkeypatch.setattr(tune, "measure", timed)
    result = functools.partial(tune.tune, key, rows, [Case(16, True)], selected.append)(
        1, tokens=32
    )
    assert selected[:3] == [0, 1, 0] and seen
    assert (result["shipped"], result["best"]) == ("256x64, 8 stages",) * 2
    assert result["over_shipped"] == pytest.approx({"0": 1.0, "1": 2.0})
    assert result["ms"] == [{"seq_len": 16, "is_causal": True, "0": 1.0, "1": 2.0}]


def test_needs_a_hopper(monkeypatch):
    monkeypatch.setattr(tune.jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(tune, "launch_as_graphs", lambda: None)
    with pytest.raises(SystemExit, match=r"compute capability 9\.0"):
        tune.main([])
