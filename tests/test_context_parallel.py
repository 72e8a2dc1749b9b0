"""Ring and KV-sharded attention: what one device computes, its gradients, and what is moved."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_sharding import assert_close, collectives, mesh_of

from jax_cosine_attn import cosine_attention, has_cuda_kernels
from jax_cosine_attn.parallel import (
    kv_sharded_cosine_attention,
    ring_cosine_attention,
    zigzag_indices,
)

B, T, N, K, H = 2, 32, 4, 2, 8
GRADS = ("query", "key", "value", "bias", "scale")
implementations = pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def inputs(*names, t=T, s=T, dtype=np.float32):
    rng = np.random.default_rng(0)
    ops = {
        "query": rng.normal(size=(B, t, N, H)),
        "key": rng.normal(size=(B, s, K, H)),
        "value": rng.normal(size=(B, s, K, H)),
    }
    ops = {name: jnp.asarray(x, dtype) for name, x in ops.items()}
    made = {
        "scale": jnp.asarray(rng.uniform(2, 9, N), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=(B, N, t, s)), jnp.float32),
        "key_bias": jnp.asarray(rng.normal(size=(1, N, 1, s)), jnp.float32),
        "mask": jnp.asarray(rng.random((B, 1, t, s)) < 0.7),
        "segment_ids": jnp.asarray(np.sort(rng.integers(0, 3, (B, t)), 1), jnp.int32),
        "seq_lengths": jnp.array([21, s], jnp.int32),
    }
    for name in names:
        ops["bias" if name == "key_bias" else name] = made[name]
    return ops


def axes_of(mesh):
    """How a call over the mesh is cut beside its sequence."""
    return {
        "batch_axis": "data" if "data" in mesh.axis_names else None,
        "head_axis": "model" if "model" in mesh.axis_names else None,
    }


def run(f, ops):
    """((out, lse), gradients of a scalar of both) of f(ops), compiled."""
    floats = {name: x for name, x in ops.items() if name in GRADS}

    def loss(floats):
        out, lse = f({**ops, **floats})
        finite = jnp.where(lse > -jnp.inf, lse, 0)
        return jnp.sin(3 * out.astype(jnp.float32)).sum() + jnp.sin(finite).sum(), (out, lse)

    (_, results), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)
    return results, gradients


def zigzag(ops, order):
    """Operands with the sequence, its positions and those of biases in another order."""
    moved = dict(ops)
    for name in ("query", "key", "value", "segment_ids"):
        if name in ops:
            moved[name] = ops[name][:, order]
    if "bias" in ops:
        bias = ops["bias"]
        bias = bias[..., order] if bias.shape[3] > 1 else bias
        moved["bias"] = bias[:, :, order] if bias.shape[2] > 1 else bias
    return moved


def on_one_device(ops, **options):
    lengths = ops.pop("seq_lengths", None)
    return cosine_attention(
        **ops, query_seq_lengths=lengths, key_value_seq_lengths=lengths,
        return_residual=True, **options,
    )  # fmt: skip


def check_ring(mesh, names, is_causal, implementation, tolerance=2e-5, **options):
    ops = inputs(*names)
    devices = mesh.shape["cp"]
    order = zigzag_indices(T, devices) if is_causal else np.arange(T)
    back = np.argsort(order)
    options |= dict(is_causal=is_causal, precision="highest", implementation=implementation)
    expected = run(lambda x: on_one_device(dict(x), **options), ops)
    f = functools.partial(
        ring_cosine_attention, axis_name="cp", mesh=mesh, return_residual=True,
        **axes_of(mesh), **options,
    )  # fmt: skip
    results, gradients = run(lambda x: f(**x), zigzag(ops, order))
    results = jax.tree.map(lambda x: x[:, back], results)
    assert_close((results, zigzag(gradients, back)), expected, tolerance)


def case(id, *values, full=False):
    return pytest.param(*values, id=id, marks=pytest.mark.full if full else ())


@pytest.mark.parametrize(
    ("sizes", "names", "is_causal"),
    [
        case("cp8", (8,), ("cp",), False, full=True),
        case("cp8-causal", (8,), ("cp",), True),
        case("dp2-cp4", (2, 4), ("data", "cp"), False),
        case("dp2-cp4-causal", (2, 4), ("data", "cp"), True, full=True),
        case("dp2-tp2-cp2", (2, 2, 2), ("data", "model", "cp"), False, full=True),
        case("dp2-tp2-cp2-causal", (2, 2, 2), ("data", "model", "cp"), True),
    ],
)
@implementations
def test_ring(implementation, sizes, names, is_causal):
    """Grouped queries, lengths, segments and a learned scale."""
    features = ("scale", "seq_lengths", "segment_ids")
    check_ring(mesh_of(sizes, names), features, is_causal, implementation, scale_bound=20.0)


@pytest.mark.parametrize(
    ("names", "is_causal"),
    [
        case("full", ("bias", "scale"), False, full=True),
        case("full-causal", ("bias", "scale"), True),
        case("keys", ("key_bias",), False),
        case("keys-causal", ("key_bias",), True, full=True),
    ],
)
@implementations
def test_ring_with_bias(implementation, names, is_causal):
    check_ring(mesh_of((2, 4), ("data", "cp")), names, is_causal, implementation)


@pytest.mark.parametrize("is_causal", [case("", False, full=True), case("causal", True)])
@implementations
def test_ring_of_a_scale_that_needs_a_maximum(implementation, is_causal):
    """exp(100) is beyond float32."""
    options = {"scale": 100.0, "l2norm_groups": 2}
    check_ring(mesh_of((4,), ("cp",)), ("seq_lengths",), is_causal, implementation, **options)


def test_ring_of_an_explicit_mesh_and_cross_attention():
    mesh = mesh_of((2, 4), ("data", "cp"), AxisType.Explicit)
    ops = inputs(t=16)
    lengths = jnp.array([16, 9], jnp.int32), jnp.array([30, 12], jnp.int32)
    expected = cosine_attention(
        **ops, query_seq_lengths=lengths[0], key_value_seq_lengths=lengths[1]
    )
    with jax.set_mesh(mesh):
        ops = jax.device_put(ops, NamedSharding(mesh, P("data", "cp")))
        f = functools.partial(
            ring_cosine_attention, axis_name="cp", mesh=mesh, batch_axis="data",
            seq_lengths=lengths,
        )  # fmt: skip
        out = jax.jit(lambda ops: f(**ops))(ops)
    assert out.sharding.spec[:2] == ("data", "cp")
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("kind", ["ring", "keys"])
def test_inside_shard_map(kind, check_vma):
    """Operands that the devices share, queries among them, get whole gradients."""
    mesh = mesh_of((4,), ("cp",))
    ops = inputs("scale", s=T, t=T if kind == "ring" else 3)
    attend = ring_cosine_attention if kind == "ring" else kv_sharded_cosine_attention
    rows = P(None, "cp") if kind == "ring" else P()
    specs = {"query": rows, "key": P(None, "cp"), "value": P(None, "cp"), "scale": P()}

    options = {"scale_bound": 20.0, "precision": "highest", "return_residual": True}

    def local(ops):
        return attend(**ops, axis_name="cp", **options)

    f = jax.shard_map(
        local, mesh=mesh, in_specs=(specs,), out_specs=(rows, rows), check_vma=check_vma
    )
    expected = run(lambda ops: cosine_attention(**ops, **options), ops)
    assert_close(run(f, ops), expected)


def test_ring_in_a_partly_manual_shard_map():
    mesh = mesh_of((2, 4), ("data", "cp"))
    ops = inputs("scale")
    specs = {name: P(None, "cp") for name in ("query", "key", "value")} | {"scale": P()}
    options = {"scale_bound": 20.0, "precision": "highest", "return_residual": True}
    f = jax.shard_map(
        lambda ops: ring_cosine_attention(**ops, axis_name="cp", **options),
        mesh=mesh, in_specs=(specs,), out_specs=P(None, "cp"), axis_names={"cp"},
    )  # fmt: skip
    expected = run(lambda ops: cosine_attention(**ops, **options), ops)
    with jax.set_mesh(mesh):
        assert_close(run(f, ops), expected)


def test_ring_in_16_bits_is_as_good_as_one_device():
    ops = inputs("scale", dtype=jnp.bfloat16)
    wide = {name: x.astype(jnp.float32) for name, x in ops.items()}

    def one(ops):
        return cosine_attention(**ops, scale_bound=20.0, return_residual=True)

    ring = functools.partial(
        ring_cosine_attention, axis_name="cp", mesh=mesh_of((8,), ("cp",)), scale_bound=20.0,
        return_residual=True,
    )  # fmt: skip
    exact = jax.tree.leaves(run(one, wide))
    errors = [
        [float(jnp.abs(x.astype(jnp.float32) - y).max()) for x, y in zip(tree, exact, strict=True)]
        for tree in (jax.tree.leaves(run(lambda x: ring(**x), ops)), jax.tree.leaves(run(one, ops)))
    ]
    for (ring_error, one_error), y in zip(zip(*errors, strict=True), exact, strict=True):
        assert ring_error <= 2 * one_error + 4 * 2**-8 * float(jnp.abs(y).max())


@pytest.mark.parametrize("policy", ["saved", case("recomputed", "recomputed", full=True)])
def test_ring_in_checkpointed_scan(policy):
    names = ("cosine_attn_out", "cosine_attn_lse")
    saved = jax.checkpoint_policies.save_only_these_names(*names) if policy == "saved" else None
    mesh, ops = mesh_of((4,), ("cp",)), inputs()
    ring = functools.partial(ring_cosine_attention, axis_name="cp", mesh=mesh)

    def loss(attend, ops):
        def layer(x, _):
            return x + attend(x, ops["key"], ops["value"]), None

        step = jax.checkpoint(layer, policy=saved)
        return jnp.sin(jax.lax.scan(step, ops["query"], None, length=2)[0]).sum()

    actual, expected = (
        jax.jit(jax.grad(functools.partial(loss, f)))(ops) for f in (ring, cosine_attention)
    )
    assert_close(actual, expected)


@pytest.mark.parametrize("is_causal", [case("", False, full=True), case("causal", True)])
@pytest.mark.usefixtures("eight_devices")
def test_ring_moves_keys_forward_and_gradients_too_backward(is_causal):
    """Hops stand in the program beside the loop over the ring and in it; nothing is gathered."""
    ops = inputs()
    f = functools.partial(
        ring_cosine_attention, axis_name="cp", mesh=mesh_of((8,), ("cp",)), is_causal=is_causal
    )
    forward = jax.jit(lambda ops: f(**ops)).lower(ops).compile()
    assert collectives(forward) == {"collective-permute": 4}  # k and v, before and in the loop
    gradient = jax.jit(jax.grad(lambda ops: f(**ops).sum()))
    # The backward's first hop of keys is the forward's. dk and dv hop in the loop, then to the last
    # device and home.
    assert collectives(gradient.lower(ops).compile()) == {"collective-permute": 4 + 2 + 6}


def jaxprs_of(eqn):
    for value in eqn.params.values():
        for x in value if isinstance(value, tuple | list) else [value]:
            jaxpr = getattr(x, "jaxpr", x)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def holds(eqn, name):
    return eqn.primitive.name.startswith(name) or any(
        holds(inner, name) for jaxpr in jaxprs_of(eqn) for inner in jaxpr.eqns
    )


def loops_with_hops(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan" and holds(eqn, "ppermute"):
            yield from jaxprs_of(eqn)
        else:
            for inner in jaxprs_of(eqn):
                yield from loops_with_hops(inner)


def waits_for(jaxpr, later, earlier):
    """Whether an equation that holds `later` reads what one that holds `earlier` has led to."""
    led_to = set()
    for eqn in jaxpr.eqns:
        reads = not led_to.isdisjoint(x for x in eqn.invars if not hasattr(x, "val"))
        if reads and holds(eqn, later):
            return True
        if reads or holds(eqn, earlier):
            led_to.update(eqn.outvars)
    return False


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.usefixtures("eight_devices")
def test_hops_of_a_step_stand_beside_its_attention(is_causal):
    """Neither waits for the other, so that what moves is on its way during the products."""
    f = functools.partial(
        ring_cosine_attention, axis_name="cp", mesh=mesh_of((8,), ("cp",)), is_causal=is_causal
    )
    gradient = jax.make_jaxpr(jax.grad(lambda ops: f(**ops).sum()))(inputs())
    steps = list(loops_with_hops(gradient.jaxpr))
    assert len(steps) == 2  # forward and backward
    for step in steps:
        assert any(holds(eqn, "cosine_attn") for eqn in step.eqns)
        assert not waits_for(step, "ppermute", "cosine_attn")
        assert not waits_for(step, "cosine_attn", "ppermute")


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("attend", [ring_cosine_attention, kv_sharded_cosine_attention])
def test_backward_repeats_no_forward(attend, is_causal):
    """Its parts take lse and out of whole rows: as many calls forward as without a gradient."""
    ops = inputs()
    f = functools.partial(attend, axis_name="cp", mesh=mesh_of((4,), ("cp",)), is_causal=is_causal)

    def calls(f, name):
        return len(re.findall(rf"cosine_attn_{name}\[", str(jax.make_jaxpr(f)(ops))))

    def gradient(ops):
        return jax.grad(lambda ops: f(**ops).sum())(ops)

    forwards = calls(lambda ops: f(**ops), "fwd")
    assert calls(gradient, "fwd") == calls(gradient, "bwd") == forwards > 0


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("attend", [ring_cosine_attention, kv_sharded_cosine_attention])
def test_one_head_of_keys_serves_all_heads(attend):
    """Heads of queries are cut, over Explicit axes, and the one of keys is on all devices."""
    q, k, v = inputs().values()
    ops = {"query": q, "key": k[:, :, :1], "value": v[:, :, :1]}
    mesh = mesh_of((2, 4), ("model", "cp"), AxisType.Explicit)
    f = functools.partial(attend, axis_name="cp", mesh=mesh, **axes_of(mesh), return_residual=True)
    actual = run(lambda ops: f(**ops), ops)
    assert_close(actual, run(lambda ops: cosine_attention(**ops, return_residual=True), ops))


@pytest.mark.usefixtures("exact_products")
def test_over_a_mesh_without_jit():
    ops, mesh = inputs(), mesh_of((8,), ("cp",))
    for f in (ring_cosine_attention, kv_sharded_cosine_attention):
        f = functools.partial(f, axis_name="cp", mesh=mesh)
        np.testing.assert_allclose(f(**ops), cosine_attention(**ops), atol=1e-5)
        dq = jax.grad(lambda q, f=f, **others: f(q, **others).sum())
        expected = jax.grad(lambda q, **others: cosine_attention(q, **others).sum())
        others = {name: x for name, x in ops.items() if name != "query"}
        np.testing.assert_allclose(
            dq(ops["query"], **others), expected(ops["query"], **others), atol=1e-4
        )


@pytest.mark.usefixtures("eight_devices")
def test_memory_of_a_device_does_not_grow_with_the_ring():
    def temporaries(devices):
        mesh = jax.make_mesh((devices,), ("cp",), devices=jax.devices()[:devices])
        x = jax.ShapeDtypeStruct(
            (1, 256 * devices, 2, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "cp"))
        )
        f = functools.partial(ring_cosine_attention, axis_name="cp", mesh=mesh)
        loss = jax.jit(jax.grad(lambda q, k, v: f(q, k, v).sum(), (0, 1, 2)))
        return loss.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8) <= 1.05 * temporaries(4)


# Keys over devices.


def check_keys(mesh, names, implementation, t=3, **options):
    ops = inputs(*names, t=t)
    lengths = ops.pop("seq_lengths", None)
    options |= dict(
        key_value_seq_lengths=lengths, precision="highest", implementation=implementation,
        return_residual=True,
    )  # fmt: skip
    f = functools.partial(
        kv_sharded_cosine_attention, axis_name="cp", mesh=mesh, **axes_of(mesh), **options
    )
    expected = run(lambda ops: cosine_attention(**ops, **options), ops)
    assert_close(run(lambda ops: f(**ops), ops), expected)


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        case("cp8", (8,), ("cp",)),
        case("dp2-cp4", (2, 4), ("data", "cp"), full=True),
        case("dp2-tp2-cp2", (2, 2, 2), ("data", "model", "cp")),
    ],
)
@implementations
def test_keys_apart(implementation, sizes, names):
    features = ("scale", "seq_lengths", "mask")
    check_keys(mesh_of(sizes, names), features, implementation, scale_bound=20.0)


@pytest.mark.parametrize(
    ("names", "t"),
    [
        case("mask-T1", ("mask",), 1, full=True),
        case("lengths-T1", ("seq_lengths",), 1),
        case("mask-T3", ("mask",), 3),
        case("lengths-T3", ("seq_lengths",), 3, full=True),
    ],
)
@implementations
def test_keys_apart_causal(implementation, names, t):
    check_keys(mesh_of((2, 4), ("data", "cp")), names, implementation, t, is_causal=True)


@pytest.mark.parametrize(
    ("names", "options"), [(("bias",), {}), (("key_bias",), {}), ((), {"scale": 100.0})],
    ids=["bias", "key-bias", "scale100"],
)  # fmt: skip
@implementations
def test_keys_apart_where_a_maximum_is_needed(implementation, names, options):
    check_keys(mesh_of((4,), ("cp",)), names, implementation, **options)


@pytest.mark.usefixtures("eight_devices")
def test_keys_apart_take_one_all_reduce():
    mesh, ops = mesh_of((8,), ("cp",)), inputs("seq_lengths", t=1)
    lengths = ops.pop("seq_lengths")

    def count(**options):
        f = functools.partial(
            kv_sharded_cosine_attention, axis_name="cp", mesh=mesh,
            key_value_seq_lengths=lengths, **options,
        )  # fmt: skip
        gradient = jax.grad(lambda ops: f(**ops).sum())
        programs = (lambda ops: f(**ops), gradient)
        return [collectives(jax.jit(g).lower(ops).compile()) for g in programs]

    # The backward adds one, of dq.
    assert count() == [{"all-reduce": 1}, {"all-reduce": 2}]
    assert count(scale=100.0) == [{"all-reduce": 2}, {"all-reduce": 3}]


# Indices and errors.


def test_zigzag_indices():
    assert zigzag_indices(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="length=12, devices=4"):
        zigzag_indices(12, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (1, 2, 4, 8)}, "T=2, S=4"),
        ({"query": (1, 3, 4, 8), "key": (1, 3, 2, 8), "value": (1, 3, 2, 8)}, "T=3, S=3"),
        ({"query": (4, 4, 8), "key": (4, 2, 8), "value": (4, 2, 8)}, r"must be \[B, T, N, H\]"),
        ({"seq_lengths": (jnp.ones(1, int),) * 2}, "a pair of seq_lengths"),
        ({"implementation": "reference"}, "got 'reference'"),
        ({"batch_axis": "data"}, "batch_axis='data'"),
        ({"bias": jnp.ones((1, 1, 1, 3))}, "bias must broadcast"),
        ({"bias": jnp.ones((4, 4))}, "bias must have the four axes"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    ops = {"query": (1, 4, 4, 8), "key": (1, 4, 2, 8), "value": (1, 4, 2, 8), **change}
    ops = {name: jnp.ones(x) if name in ("query", "key", "value") else x for name, x in ops.items()}
    mesh = mesh_of((1,), ("cp",))
    f = jax.shard_map(
        lambda: ring_cosine_attention(**ops, axis_name="cp", is_causal=True),
        mesh=mesh, in_specs=(), out_specs=P(),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        f()


def test_ring_lowers_to_the_kernels():
    """Parts of a ring want no sums over a row's keys, which are not all theirs: an empty result."""
    if not has_cuda_kernels():
        pytest.skip("needs the compiled kernels")
    ops = inputs("scale", dtype=jnp.bfloat16)

    def text(devices):
        mesh = jax.make_mesh((devices,), ("cp",), devices=jax.devices()[:devices])
        f = functools.partial(
            ring_cosine_attention, axis_name="cp", mesh=mesh, scale_bound=20.0, is_causal=True
        )
        loss = jax.jit(jax.grad(lambda ops: f(**ops).sum()))
        return loss.trace(ops).lower(lowering_platforms=("cuda",)).as_text()

    counts = [1, 8] if len(jax.devices()) >= 8 else [1]
    for devices in counts:
        lowered = text(devices)
        assert "@jax_cosine_attn_fwd" in lowered and "@jax_cosine_attn_bwd" in lowered
        assert (f"tensor<{B}x{N}x0x2xf32>" in lowered) == (devices > 1)
