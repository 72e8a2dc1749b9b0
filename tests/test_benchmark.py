"""The benchmark: what a row holds, and what counts as the time of a call."""

import functools
import json
import os
import types

import bench_attention
import bench_cpu
import bench_decode
import bench_features
import bench_scaling
import jax
import pytest
import timing
from shapes import PRESETS, Shape, Target
from timing import Kernel

TINY = ["--shape", "2", "4", "2", "16", "--seq-lens", "24", "--num-times", "2"]


@pytest.fixture(autouse=True)
def flags_are_put_back(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])


def run(tmp_path, *options):
    file = tmp_path / "results" / "bench.json"
    bench_attention.main([*TINY, *options, "--json", str(file), "--commit", "c0ffee"])
    return json.loads(file.read_text())


def test_runs_every_direction_and_mode_beside_xla(tmp_path, capsys):
    content = run(tmp_path, "--causal", "--mask-prob", "0.3", "--peers", "xla")
    rows = content["rows"]
    assert [(row["direction"], row["mode"], row["implementation"]) for row in rows] == [
        (direction, mode, implementation)
        for direction in ("fwd", "bwd")
        for mode in ("kernel", "all-in")
        for implementation in ("jax_cosine_attn", "xla")
    ]
    for row in rows:
        assert row["ms"] > 0 and row["is_causal"] and row["masked"]
        assert row["clock"].startswith(("wall", "device span"))
    assert rows[0]["ms_over_ours"] == 1.0
    assert content["commit"] == "c0ffee"
    assert {"jax", "jaxlib"} <= content["versions"].keys()
    assert {"date", "device", "backend"} <= content.keys()
    assert "--xla_gpu_graph_min_graph_size=1" in content["xla_flags"].split()
    assert "jax_cosine_attn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "direction"), [("--only-forwards", "fwd"), ("--only-backwards", "bwd")]
)
def test_one_direction_only(tmp_path, option, direction):
    rows = run(tmp_path, option, "--modes", "kernel", "--peers")["rows"]
    assert [row["direction"] for row in rows] == [direction]


def test_failures_of_peers_are_rows(tmp_path, monkeypatch, capsys):
    def out_of_memory(q, k, v):
        raise RuntimeError("RESOURCE_EXHAUSTED: 1 TiB")

    def refuse(case):
        raise bench_attention.Unsupported("no such thing")

    peers = bench_attention.PEERS
    monkeypatch.setitem(peers, "xla", lambda case: out_of_memory)
    monkeypatch.setitem(peers, "cudnn", refuse)
    options = ("--only-forwards", "--modes", "all-in", "--peers", "xla", "cudnn")
    rows = run(tmp_path, *options)["rows"]
    problems = [row.get("problem") for row in rows]
    assert problems == [None, "out of memory", "Unsupported: no such thing"]
    assert "out of memory" in capsys.readouterr().out


def test_failures_of_this_library_fail(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise NotImplementedError("broken")

    monkeypatch.setattr(bench_attention.jax_cosine_attn, "cosine_attention", broken)
    with pytest.raises(NotImplementedError, match="broken"):
        run(tmp_path, "--only-forwards")


def test_lengths_that_the_preset_lacks_need_a_shape():
    with pytest.raises(SystemExit, match="--shape"):
        bench_attention.main(["--preset", "cpu", "--seq-lens", "7"])


def test_targets_are_compared_with_the_best_peer(tmp_path, monkeypatch, capsys):
    shape = Shape(1, 32, 2, 1, 8)
    easy = Target("fwd", "all-in", shape, "float32", is_causal=True, at_least=1e-9)
    cases = (easy, easy._replace(direction="bwd", mask_prob=0.25, at_least=1e9))
    cases += (easy._replace(at_least=None),)
    monkeypatch.setitem(bench_attention.TARGETS, "some", cases)
    file = tmp_path / "targets.json"
    bench_attention.main(
        ["--preset", "some", "--num-times", "1", "--peers", "xla", "--json", str(file)]
    )
    rows = json.loads(file.read_text())["rows"]
    found = [(row["direction"], row["implementation"], row["masked"]) for row in rows]
    assert found == [
        ("fwd", "jax_cosine_attn", False), ("fwd", "xla", False),
        ("bwd", "jax_cosine_attn", True), ("bwd", "xla", True),
        ("fwd", "jax_cosine_attn", False),
    ]  # fmt: skip
    for mine, peers in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert mine["best_peer_over_ours"] == pytest.approx(peers["ms"] / mine["ms"])
    assert "best_peer_over_ours" not in rows[4]
    printed = capsys.readouterr().out
    assert [word in printed for word in ("reached: ", "missed: ", "1 targets missed")] == [True] * 3


def test_targets_say_their_options_themselves(capsys):
    with pytest.raises(SystemExit):
        bench_attention.main(["--preset", "hopper-forward", "--causal", "--dtype", "float32"])
    assert "causal, dtype: the cases of hopper-forward" in capsys.readouterr().err


def test_flops():
    shape = Shape(batch=2, seq_len=10, num_heads=3, num_heads_kv=1, head_dim=5)
    assert shape.flops("fwd", is_causal=False) == 4 * 2 * 3 * 10 * 10 * 5
    assert shape.flops("bwd", is_causal=True) == 2.5 * shape.flops("fwd", is_causal=False) / 2


def test_16k_preset_keeps_tokens_and_width():
    shapes = PRESETS["tokens16k"].shapes
    assert {shape.batch * shape.seq_len for shape in shapes} == {16_384}
    assert {shape.num_heads * shape.head_dim for shape in shapes} == {2048}


def test_flags_that_are_given_stay(monkeypatch):
    given = "--xla_cpu_multi_thread_eigen=false --xla_gpu_graph_min_graph_size=5"
    monkeypatch.setenv("XLA_FLAGS", given)
    for _ in range(2):
        timing.launch_as_graphs()
    during_profiling = "--xla_enable_command_buffers_during_profiling=true"
    assert os.environ["XLA_FLAGS"] == f"{given} {during_profiling}"


MS = 1e6  # ns


def test_span_counts_overlaps_once_and_gaps_in_full():
    starts = [(0 * MS, "a"), (10 * MS, "b"), (20 * MS, "a")]
    kernels = [
        Kernel(1 * MS, 4 * MS, "norm"),
        Kernel(2 * MS, 3 * MS, "inside"),
        Kernel(5 * MS, 6 * MS, "after a gap"),
        # The device's clock may be a little behind the host's.
        Kernel(9.9 * MS, 11 * MS, "b"),
        Kernel(21 * MS, 24 * MS, "norm"),
        Kernel(22 * MS, 23 * MS, "inside"),
        Kernel(25 * MS, 28 * MS, "after a gap"),
    ]
    timings = timing.spans(starts, kernels)
    assert timings["a"].ms == pytest.approx((5 + 7) / 2)
    assert timings["a"].kernels == ("norm", "inside", "after a gap")
    assert timings["b"].ms == pytest.approx(1.1)


def test_what_comes_before_a_call_is_not_counted():
    starts = [(0 * MS, timing._BEFORE), (5 * MS, "a"), (10 * MS, timing._BEFORE), (15 * MS, "a")]
    kernels = [Kernel(t * MS, (t + 1) * MS, "k") for t in (1, 6, 11, 12, 16)]
    assert timing.spans(starts, kernels) == {"a": (pytest.approx(1), "device span", ("k",))}


def test_each_call_is_preceded():
    order = []
    calls = {name: functools.partial(order.append, name) for name in "ab"}
    before = functools.partial(order.append, "before")
    timings = timing._wall_times(calls, 2, before, "wall")
    assert order == ["before", "a", "before", "b"] * 2
    assert timings.keys() == {"a", "b"}


@pytest.mark.parametrize(
    "kernels",
    [[Kernel(1 * MS, 2 * MS, "x")], [Kernel(t * MS, t * MS + 1, "x") for t in (1, 11, 12)]],
    ids=["none-in-the-second", "different-numbers"],
)
def test_calls_that_the_trace_tells_apart_badly_are_refused(kernels):
    with pytest.raises(timing.TraceError, match="calls of a"):
        timing.spans([(0.0, "a"), (10 * MS, "a")], kernels)


def test_another_trace_is_taken_where_one_is_not_whole(monkeypatch):
    whole, taken = {"a": timing.Timing(1.0, "device span", ("k",))}, []

    def spans(*_):
        taken.append(None)
        if len(taken) % 4 != 3:
            raise timing.TraceError("no kernels")
        return whole

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(timing, "_device_spans", spans)
    calls = {"a": lambda: None}
    assert timing.measure(calls, 1) == whole and len(taken) == 3
    taken *= 0
    monkeypatch.setattr(timing, "_TRACES", 2)
    assert timing.measure(calls, 1)["a"].clock == "wall (no kernels)"


def test_features_beside_plain_calls(tmp_path, capsys, monkeypatch):
    some = bench_features.comparisons(64)[::4]  # padding, packed documents, relative bias
    some[1] = some[1]._replace(at_most=0.0)
    monkeypatch.setattr(bench_features, "comparisons", lambda tokens: some)
    file = tmp_path / "features.json"
    bench_features.main(["--num-times", "1", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["direction"] for row in rows] == ["fwd", "bwd"] * len(some)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ms"] / row["against_ms"])
        assert row["family"] and row["clock"].startswith(("wall", "device span"))
    printed = capsys.readouterr().out.splitlines()
    assert ["missed" in line for line in printed if line.startswith("packed")] == [True] * 2


def test_families_that_are_expected_of_features(monkeypatch):
    """Of kernels on a Hopper: what is without a bound or in order is the portable family's."""
    device = types.SimpleNamespace(compute_capability="9.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])

    def portable(direction):
        return {
            comparison.name
            for comparison in bench_features.comparisons(64)
            if bench_attention.expected_family(
                direction, "bfloat16", 64, comparison.call.bounded(direction)
            )
            == "cuda-sm80"
        }

    biased = {"bias of all batch entries", "relative bias", "running maximum"}
    biased |= {"deterministic dscale, dbias", "deterministic drelative_bias"}
    assert portable("fwd") == biased
    assert portable("bwd") == biased | {"deterministic"}


def test_cpu_beside_jax_nn(tmp_path, capsys, monkeypatch):
    """Forward and gradient, causal and not, each beside the ratio that is asked for."""
    file = tmp_path / "cpu.json"
    sizes = ("--length", "64", "--heads", "2", "--head-dim", "8", "--repeats", "1")
    monkeypatch.setattr(bench_cpu, "LEAST_RATIO", {False: 0.0, True: 1e9})
    assert bench_cpu.main([*sizes, "--json", str(file)]) == 1
    rows = json.loads(file.read_text())["rows"]
    found = [(row["pass"], row["is_causal"], row["met"]) for row in rows]
    assert found == [
        (name, is_causal, not is_causal)
        for name in ("forward", "gradient")
        for is_causal in (False, True)
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["jax_nn_ms"] / row["ours_ms"])
    assert "NOT MET" in capsys.readouterr().out


def test_decode_beside_a_copy(tmp_path, capsys):
    file = tmp_path / "decode.json"
    sizes = ("--batches", "1", "--seq-lens", "256", "--copy-mib", "1", "--peers", "xla")
    bench_decode.main([*sizes, "--num-times", "1", "--json", str(file)])
    (row,) = json.loads(file.read_text())["rows"]
    assert row["bytes"] == 2 * 2 * 256 * 8 * 128
    assert row["implementations"].keys() == {"copy", "jax_cosine_attn", "xla"}
    assert row["family"] and not row["problems"]
    mine, xla = (row["implementations"][name]["ms"] for name in ("jax_cosine_attn", "xla"))
    assert row["missed"] == (["faster than xla"] if xla <= mine else [])
    for name, result in row["implementations"].items():
        moved = 2 * 2**20 if name == "copy" else row["bytes"]
        assert result["gb_per_s"] == pytest.approx(1e-6 * moved / result["ms"])
    assert row["implementations"]["copy"]["of_copy"] == 1.0
    assert "jax_cosine_attn" in capsys.readouterr().out


def test_scaling_over_devices(tmp_path, capsys):
    file = tmp_path / "scaling.json"
    lengths = ("--dp-length", "32", "--tp-length", "32", "--ring-lengths", "64")
    options = ("--decode-lengths", "64", "--heads", "8", "8", "8", "--num-times", "1")
    counts = [n for n in (1, 4) if n <= len(jax.devices())]
    devices = ("--devices", *map(str, counts))
    bench_scaling.main([*lengths, *options, *devices, "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["devices"], row["case"]) for row in rows] == [
        (n, case) for n in counts for case in ("dp", "tp", "ring", "decode")
    ]
    for row in rows:
        n, sent = row["devices"], row["bytes_sent"]
        first = next(r for r in rows if r["case"] == row["case"])
        scale = 1 if row["case"] == "dp" else n
        assert row["efficiency"] == pytest.approx(first["ms"] / row["ms"] / scale)
        kinds = row["collectives"].keys()
        if row["case"] == "ring":
            assert kinds == ({"collective-permute"} if n > 1 else set())
            assert sent == 2 * 64 * 8 * 8 // n * ((n - 1) * 4 + (n * 4 if n > 1 else 0))
        elif row["case"] == "decode":
            assert kinds <= {"all-reduce"}
            assert sent == 2 * (n - 1) * 8 * 9 * 4 // n
        else:
            assert not kinds and sent == 0
    assert "efficiency" in capsys.readouterr().out
