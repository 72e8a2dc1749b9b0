"""The benchmark: what a row holds, and what counts as the time of a call."""

import functools
import json
import math
import os
import re
import types

import bench_attention
import bench_cpu
import bench_decode
import bench_features
import bench_scaling
import jax
import numpy as np
import oracle
import pytest
import timing
import verdicts
from jax.sharding import AxisType
from shapes import GROWTH, PRESETS, TARGETS, Shape, Target
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


SMALL = Target("fwd", "all-in", Shape(1, 32, 2, 1, 8), "float32", True, peers=("xla",))


def run_small(tmp_path, monkeypatch, *targets, options=()):
    monkeypatch.setitem(bench_attention.TARGETS, "small", targets)
    file = tmp_path / "small.json"
    arguments = ["--preset", "small", "--num-times", "1", "--peers", "xla", "--commit", "c0ffee"]
    bench_attention.main([*arguments, "--json", str(file), *options])
    return json.loads(file.read_text())


def test_targets_are_compared_with_the_best_peer(tmp_path, monkeypatch, capsys):
    easy = SMALL._replace(at_least=1e-9)
    hard = easy._replace(direction="bwd", mask_prob=0.25, at_least=1e9)
    alone = SMALL._replace(direction="fwd+res", peers=(), at_most_us=1e-9)
    content = run_small(tmp_path, monkeypatch, easy, hard, alone)
    rows = content["rows"]
    found = [(row["direction"], row["implementation"], row["masked"]) for row in rows]
    assert found == [
        ("fwd", "jax_cosine_attn", False), ("fwd", "xla", False),
        ("bwd", "jax_cosine_attn", True), ("bwd", "xla", True),
        ("fwd+res", "jax_cosine_attn", False),
    ]  # fmt: skip
    for mine, peers in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert mine["best_peer_over_ours"] == pytest.approx(peers["ms"] / mine["ms"])
    assert "best_peer_over_ours" not in rows[4]
    assert [verdict["met"] for verdict in content["verdicts"]] == [True, False, False]
    assert content["verdicts"][1]["case"] == "bwd all-in float32 B 1 T 32 N 2 K 1 H 8 causal mask"
    printed = capsys.readouterr().out
    assert "reached: best peer / ours" in printed and "missed: best peer / ours" in printed
    assert "2 of 3 missed" in printed


def test_medians_of_several_runs_of_the_same_calls(tmp_path, monkeypatch, capsys):
    medians = iter((3.0, 1.0, 2.0))
    measured = []

    def measure(calls, num_times):
        measured.append(list(calls.values()))
        return dict.fromkeys(calls, timing.Timing(next(medians), "wall", ()))

    monkeypatch.setattr(bench_attention, "measure", measure)
    monkeypatch.setattr(bench_attention, "check_family", lambda target, row: None)  # of no kernels
    content = run_small(tmp_path, monkeypatch, SMALL._replace(peers=()), options=("--runs", "3"))
    (row,) = content["rows"]
    assert (row["ms"], row["spread"]) == (2.0, [1.0, 3.0])
    assert measured[0] == measured[1] == measured[2]
    assert "  1-3" in capsys.readouterr().out


def test_parts_of_a_preset_go_into_one_file(tmp_path, monkeypatch):
    """Rows of other cases stay if the commit is the same, also when a run is cut."""
    short, long = (
        SMALL._replace(shape=Shape(1, t, 1, 1, 8), peers=(), direction="fwd") for t in (16, 24)
    )
    times = iter(range(1, 6))

    def run_case(target, num_times, runs):
        ms = next(times)
        if ms == 5:
            raise KeyboardInterrupt
        row = target.columns() | {"implementation": "jax_cosine_attn", "family": "xla", "ms": ms}
        return [row | {"spread": [ms, ms], "tflops": 1, "temporary_bytes": 0, "clock": "wall"}]

    def run(*options):
        rows = run_small(tmp_path, monkeypatch, short, long, options=options)["rows"]
        return [(row["seq_len"], row["ms"]) for row in rows]

    monkeypatch.setattr(bench_attention, "run_case", run_case)
    monkeypatch.setattr(bench_attention, "check_family", lambda target, row: None)  # of no kernels
    assert run("--seq-lens", "16") == [(16, 1)]
    assert run("--seq-lens", "24") == [(16, 1), (24, 2)]
    assert run("--seq-lens", "16") == [(16, 3), (24, 2)]
    with pytest.raises(KeyboardInterrupt):
        run("--commit", "0ther")
    content = json.loads((tmp_path / "small.json").read_text())
    assert content["commit"] == "0ther" and [row["ms"] for row in content["rows"]] == [4]


@pytest.mark.parametrize("precision", [None, "highest"])
def test_precision_is_that_of_every_implementation(tmp_path, monkeypatch, precision):
    attend, used = bench_attention.PEERS["xla"], []

    def spied(case):
        def call(*qkv):
            used.append(jax.config.jax_default_matmul_precision)
            return attend(case)(*qkv)

        return call

    monkeypatch.setitem(bench_attention.PEERS, "xla", spied)
    content = run_small(tmp_path, monkeypatch, SMALL._replace(precision=precision))
    assert used == [precision]
    assert [row["precision"] for row in content["rows"]] == [precision] * 2


def test_errors_are_against_float64(tmp_path, monkeypatch):
    shape = Shape(1, 24, 2, 2, 8)
    target = Target(
        "fwd", "all-in", shape, "float32", precision="highest", peers=("xla",), accuracy=True
    )
    content = run_small(tmp_path, monkeypatch, target)
    mine, xla = (row["error"] for row in content["rows"])
    assert 1e-9 < mine < 1e-5 and 1e-9 < xla < 1e-5
    (verdict,) = content["verdicts"]
    assert (verdict["reached"], verdict["asked"]) == (mine, xla)
    assert verdict["met"] == (mine <= xla)

    qkv = np.random.default_rng(0).standard_normal((3, 2, 24, 3, 8))
    expected = oracle.attention(*qkv, scale=bench_attention.SCALE).out
    np.testing.assert_allclose(bench_attention.exact(*qkv), expected, rtol=1e-12, atol=1e-12)


def test_programs_of_each_direction():
    """Both passes in one give what they give apart; residuals are neither inputs nor out."""
    q, k, v, dout = jax.random.normal(jax.random.key(0), (4, 1, 24, 2, 8))
    attend = functools.partial(bench_attention.jax_cosine_attn.cosine_attention, scale=10.0)
    call = {
        direction: bench_attention.prepare(attend, direction, (q, k, v, dout))
        for direction in ("fwd", "fwd+res", "bwd", "both")
    }
    for x, y in zip(call["both"](), (call["fwd"](), *call["bwd"]()), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    out, residuals = call["fwd+res"]()
    np.testing.assert_array_equal(out, call["fwd"]())
    assert residuals and all(x.size <= 24 * 2 for x in residuals)


def test_what_is_asked_on_hopper():
    forward, backward = TARGETS["hopper-forward"], TARGETS["hopper-backward"]
    every = forward + backward
    by_case = {verdicts.key(target.columns()): target for target in every}
    assert len(by_case) == len(every)
    for target in every:
        assert ("xla" in target.peers) == (target.dtype == "float32"), target
        assert "flash_attn3_jax" not in target.peers or target.shape.head_dim == 128, target

    def of(direction, **fields):
        wanted = {"mode": "all-in", "direction": direction} | fields
        return [t for t in every if wanted.items() <= (t.columns() | t._asdict()).items()]

    # 16k tokens, N * H = 2048
    for h, at_512 in ((64, [1.6, 2.0]), (128, [1.6, 1.6])):
        assert [t.at_least for t in of("bwd", head_dim=h, seq_len=512, batch=32)] == at_512
    lengths = {t.shape.seq_len for t in of("fwd", mode="kernel")}
    assert lengths == {512, 1024, 2048, 4096, 16_384}
    assert [t.at_most_us for t in of("fwd", seq_len=128)] == [5.0] * 3
    assert {t.shape.head_dim for t in of("fwd+res")} == {64, 128, 256}
    assert len(of("fwd", accuracy=True)) == 6
    for precision, ratio in ((None, 1.5), ("highest", 2.0)):
        float32 = of("bwd", dtype="float32", precision=precision)
        assert {t.shape.seq_len for t in float32} == {1024, 2048, 4096, 8192}
        assert {t.at_least for t in float32} == {ratio}
    # Both passes in one: every 16-bit backward from raw inputs, and its forward is timed too.
    parts = [t for t in of("bwd") if t.dtype != "float32"]
    assert [t._replace(direction="both", at_least=None) for t in parts] == of("both")
    for part in parts:
        assert verdicts.key(part._replace(direction="fwd").columns()) in by_case, part


def table(*cases):
    """Rows of ours with the given numbers."""
    return {
        verdicts.key(target.columns()): [target.columns() | {"ms": 1.0, "temporary_bytes": 0} | row]
        for target, row in cases
    }


def test_both_passes_are_compared_with_the_weaker_one():
    both = [target for target in TARGETS["hopper-backward"] if target.direction == "both"][:2]
    cases = [(both[1], {"best_peer_over_ours": 1.6})]
    for direction, ratio in (("fwd", 1.5), ("bwd", 1.2), ("both", 1.3)):
        cases += [(both[0]._replace(direction=direction), {"best_peer_over_ours": ratio})]
    (verdict,) = verdicts.of_case(both[0], table(*cases))
    assert (verdict.reached, verdict.asked, verdict.met) == (1.3, 1.2, True)
    cases[-1][1]["best_peer_over_ours"] = 1.1
    (verdict,) = verdicts.of_case(both[0], table(*cases))
    assert not verdict.met
    assert not list(verdicts.of_case(both[1], table(*cases)))  # its parts are not there
    mean = next(verdict for verdict in verdicts.of_all(table(*cases)) if "mean" in verdict.what)
    assert mean.reached == pytest.approx((1.6 * 1.1) ** 0.5) and mean.met


@pytest.mark.parametrize("name", ["ms", "temporary_bytes"])
@pytest.mark.parametrize("more", [1.09, 1.11])
def test_growth(name, more):
    rows = [
        (t, {"ms": 1e-9 * t.shape.seq_len**2, "temporary_bytes": 4 * t.shape.seq_len})
        for t in GROWTH
    ]
    rows[0][1]["ms"] *= 2  # below 8k
    rows[-2][1][name] *= more
    time, memory = verdicts.of_all(table(*rows))
    changed, same = (time, memory) if name == "ms" else (memory, time)
    assert changed.reached == pytest.approx(more - 1) and changed.met == (more < 1.1)
    assert same.reached == pytest.approx(0, abs=1e-9) and same.met
    assert not list(verdicts.of_all(table(*rows[:-1])))


@pytest.mark.parametrize("beyond", [0, 1])
def test_temporaries_of_the_backward(beyond):
    some = [t for t in TARGETS["hopper-backward"] if t.direction == "bwd"]
    float32 = next(t for t in some if t.dtype == "float32")
    b, t, n, _, h = some[0].shape
    allowed = b * t * n * (4 * h + 32)
    cases = [(some[0], {"temporary_bytes": allowed + beyond}), (some[1], {})]
    (verdict,) = verdicts.of_all(table(*cases, (float32, {"temporary_bytes": 1e15})))
    assert verdict.case == str(some[0]) and verdict.met == (beyond == 0)


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
            if bench_attention.expected_family("bfloat16", 64, comparison.call.bounded(direction))
            == "cuda-sm80"
        }

    biased = {"bias of all batch entries", "relative bias", "running maximum"}
    biased |= {"deterministic dscale, dbias", "deterministic drelative_bias"}
    assert portable("fwd") == biased
    assert portable("bwd") == biased | {"deterministic"}


@pytest.mark.parametrize(
    ("dtype", "head_dim", "ran"),
    [("bfloat16", 256, "sm90"), ("float16", 20, "sm80"), ("float32", 64, "sm80")],
)
def test_families_that_are_expected(monkeypatch, dtype, head_dim, ran):
    device = types.SimpleNamespace(compute_capability="9.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert bench_attention.expected_family(dtype, head_dim) == f"cuda-{ran}"


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


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_bytes_of_a_ring_of_two():
    """As many entries as hop in its program, where no loop is left: keys once, their gradients
    twice. A CPU widens the 16-bit ones."""
    mesh = jax.make_mesh(
        (2,), (bench_scaling.AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )
    lengths = {"dp": [], "tp": [], "ring": [64], "decode": []}
    (case,) = bench_scaling.cases(2, lengths, Shape(1, 0, 8, 8, 8), mesh)
    call, _ = bench_scaling.prepare(case, mesh)
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* collective-permute", call.func.as_text())
    entries = [math.prod(map(int, shape.split(","))) for shape in shapes]
    assert entries == [64 // 2 * 8 * 8] * 6
    assert bench_scaling.bytes_sent(case, 2) == sum(entries[:2]) * 2 + sum(entries[2:]) * 4


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
            assert (sent > 0) == (n > 1)
        elif row["case"] == "decode":
            assert kinds <= {"all-reduce"}
            assert sent == 2 * (n - 1) * 8 * 9 * 4 // n
        else:
            assert not kinds and sent == 0
    assert "efficiency" in capsys.readouterr().out
