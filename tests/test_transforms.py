"""JAX transformations of cosine_attention: each against plain calls, one at a time."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_cosine_attn import _primitive, cosine_attention

B, T, S, N, K, H = 2, 5, 7, 4, 2, 8
SIZE = 3  # of a mapped axis
PLAIN = ("query", "key", "value", "scale", "mask", "query_seq_lengths", "key_value_seq_lengths")
ALL = (*PLAIN, "bias", "relative_bias", "segment_ids")
GRADS = ("query", "key", "value", "scale", "bias", "relative_bias")

# The kernels without biases and segments, which are others, too.
implementations = pytest.mark.parametrize(
    ("implementation", "names"),
    [
        pytest.param("xla", ALL, id="xla"),
        pytest.param("reference", ALL, id="reference"),
        pytest.param("cuda", ALL, id="cuda", marks=pytest.mark.gpu),
        pytest.param("cuda", PLAIN, id="cuda-plain", marks=pytest.mark.gpu),
    ],
)
with_gradient = pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def operand(name, seed=0):
    """One call's value of an operand, with the batch dims that a plain call allows."""
    rng = np.random.default_rng([seed, *map(ord, name)])
    shapes = {
        "query": (B, T, N, H),
        "key": (B, S, K, H),
        "value": (B, S, K, H),
        "scale": (N,),
        "bias": (B, N, T, S),
        "relative_bias": (N, T + S - 1),
    }
    if name == "scale":
        value = rng.uniform(2, 9, N).astype(np.float32)
    elif name == "mask":
        value = rng.random((B, 1, 1, S)) < 0.8
    elif name == "query_seq_lengths":
        value = rng.integers(2, T + 1, B, dtype=np.int32)
    elif name == "key_value_seq_lengths":
        value = rng.integers(3, S + 1, B, dtype=np.int32)
    elif name == "segment_ids":
        value = rng.integers(0, 2, (B, T + S), dtype=np.int32)
    else:
        value = rng.normal(size=shapes[name]).astype(np.float32)
    return jnp.asarray(value)


def mapped(name, size=SIZE, axis=0, seed=1):
    return jnp.stack([operand(name, seed + i) for i in range(size)], axis)


def attend(ops, implementation, **options):
    """(out, lse) of a call whose operands are in a dict; segment_ids packs both sides."""
    ops = dict(ops)
    if "segment_ids" in ops:
        ids = ops["segment_ids"]
        ops["segment_ids"] = (ids[..., :T], ids[..., T:])
    return cosine_attention(
        **ops,
        scale_bound=20.0,
        is_causal=True,
        precision="highest",
        implementation=implementation,
        return_residual=True,
        **options,
    )


def loss(differentiable, rest, implementation, **options):
    """A scalar that depends on every element of out and, where it is finite, of lse."""
    out, lse = attend({**differentiable, **rest}, implementation, **options)
    finite = jnp.where(lse > -jnp.inf, lse, 0)
    weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
    return (weights * out).sum() + jnp.sin(finite).sum()


@functools.partial(jax.jit, static_argnames=("implementation", "deterministic"))
def value_and_grads(ops, implementation, deterministic=False):
    differentiable = {name: x for name, x in ops.items() if name in GRADS}
    rest = {name: x for name, x in ops.items() if name not in GRADS}
    gradients = jax.grad(loss)(differentiable, rest, implementation, deterministic=deterministic)
    return attend(ops, implementation), gradients


def assert_close(actual, expected, tolerance=2e-5):
    def check(path, x, y):
        assert x.shape == y.shape, (path, x.shape, y.shape)
        assert x.dtype == y.dtype, (path, x.dtype, y.dtype)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=str(path))

    jax.tree.map_with_path(check, actual, expected)


def one_by_one(f, ops, axes, out_axis=0):
    """vmap(f, (axes,), out_axis)(ops), one call after the other."""
    size = next(ops[name].shape[axis] for name, axis in axes.items() if axis is not None)
    results = [
        f({k: x if axes[k] is None else jnp.take(x, i, axes[k]) for k, x in ops.items()})
        for i in range(size)
    ]
    return jax.tree.map(lambda *xs: jnp.stack(xs, out_axis), *results)


@implementations
def test_operands_of_one_call_agree_between_implementations(implementation, names):
    ops = {name: operand(name) for name in names}
    assert_close(value_and_grads(ops, implementation), value_and_grads(ops, "reference"))


def case(implementation, mapped_names, others, marks=()):
    name = "all" if len(mapped_names) > 5 else "-".join(mapped_names)
    beside = "-plain" if PLAIN in (mapped_names, others) else ""
    return pytest.param(
        implementation, mapped_names, others, id=f"{implementation}-{name}{beside}", marks=marks
    )


ARRAYS = ("query", "key", "value")
# Each operand mapped alone beside the arrays that every call has, then several among the rest.
MAPPED = [
    *[case("xla", (name,), ARRAYS) for name in ALL],
    *[case("cuda", (name,), ARRAYS, pytest.mark.gpu) for name in ALL],
    case("xla", ARRAYS, ALL),
    case("xla", ("query", "mask"), ALL),
    case("xla", ("key", "bias", "query_seq_lengths"), ALL),
    case("xla", ("bias", "relative_bias", "scale"), ALL),
    case("xla", (*ARRAYS, "key_value_seq_lengths", "segment_ids"), ALL),
    case("xla", ALL, ()),
    case("reference", ALL, ()),
    *[
        case("cuda", names, among, pytest.mark.gpu)
        for among in (PLAIN, ALL)
        for names in (ARRAYS, ("key", "query_seq_lengths"), among)
    ],
    case("cuda", ("bias", "relative_bias", "scale"), ALL, pytest.mark.gpu),
    case("cuda", (*ARRAYS, "key_value_seq_lengths", "segment_ids"), ALL, pytest.mark.gpu),
]


@pytest.mark.parametrize(("implementation", "mapped_names", "others"), MAPPED)
def test_vmap_with_gradients(implementation, mapped_names, others):
    ops = {name: operand(name) for name in others} | {name: mapped(name) for name in mapped_names}
    axes = {name: 0 if name in mapped_names else None for name in ops}
    f = functools.partial(value_and_grads, implementation=implementation)
    assert_close(jax.jit(jax.vmap(f, (axes,)))(ops), one_by_one(f, ops, axes))


@with_gradient
def test_vmap_axes(implementation):
    axes = {"query": 2, "key": -1, "value": 1, "mask": 4, "scale": 1}
    ops = {name: mapped(name, axis=axis) for name, axis in axes.items()}
    f = functools.partial(value_and_grads, implementation=implementation)
    actual = jax.jit(jax.vmap(f, (axes,), out_axes=1))(ops)
    assert_close(actual, one_by_one(f, ops, axes, out_axis=1))


# (names mapped by the inner vmap, by the outer one). Axes lie in that order behind the batch; an
# operand that only the outer one maps is shared along the axis between two of its own.
NESTED = [
    (("query",), ("key", "value", "mask")),
    (("key", "value"), ("query", "scale")),
    (("query", "mask"), ("query", "key_value_seq_lengths")),
    (("scale",), ("mask", "query_seq_lengths")),
    (("mask",), ("query", "key", "value", "scale")),
]


@pytest.mark.parametrize(("inner", "outer"), NESTED)
@with_gradient
def test_nested_vmap_with_gradients(implementation, inner, outer):
    ops, inner_axes, outer_axes = {}, {}, {}
    for name in PLAIN:
        inner_axes[name] = 0 if name in inner else None
        outer_axes[name] = 0 if name in outer else None
        x = mapped(name) if name in inner else operand(name)
        if name in outer:
            again = mapped(name, seed=9) if name in inner else operand(name, 9)
            x = jnp.stack([x, again])
        ops[name] = x
    f = functools.partial(value_and_grads, implementation=implementation)
    actual = jax.jit(jax.vmap(jax.vmap(f, (inner_axes,)), (outer_axes,)))(ops)
    expected = one_by_one(lambda x: one_by_one(f, x, inner_axes), ops, outer_axes)
    assert_close(actual, expected)


@with_gradient
def test_three_vmaps_with_gradients(implementation):
    """Operands shared along the outer, the middle or the inner axis, or two of them. What lies
    between two axes of scale is repeated, scale having no batch."""
    sizes = 2, 2, 3
    levels = {  # of the outer, the middle and the inner vmap
        "query": (2,),
        "key": (0,),
        "value": (0, 2),
        "scale": (0, 2),
        "bias": (0, 2),
        "relative_bias": (1, 2),
        "mask": (0, 1, 2),
        "key_value_seq_lengths": (1,),
    }
    axes = [{}, {}, {}]
    ops = {}
    for name, own in levels.items():
        lead = [sizes[level] for level in own]
        x = mapped(name, np.prod(lead))
        ops[name] = x.reshape(*lead, *x.shape[1:])
        for level, names in enumerate(axes):
            names[name] = 0 if level in own else None
    f = functools.partial(value_and_grads, implementation=implementation)
    actual, expected = f, f
    for names in reversed(axes):
        actual = jax.vmap(actual, (names,))
        expected = functools.partial(one_by_one, expected, axes=names)
    assert_close(jax.jit(actual)(ops), expected(ops))


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@with_gradient
def test_nested_vmap_of_bias_gradients(implementation, deterministic):
    """dbias and drelative_bias of instances that share operands, through both divisor rules."""
    names = ("query", "key", "value", "bias", "relative_bias", "scale")
    ops = {name: operand(name) for name in names}
    ops["query"] = mapped("query")
    ops["bias"] = mapped("bias", 2)
    ops["relative_bias"] = mapped("relative_bias", 2)
    inner = {name: 0 if name == "query" else None for name in names}
    outer = {name: 0 if "bias" in name else None for name in names}
    f = functools.partial(
        value_and_grads, implementation=implementation, deterministic=deterministic
    )
    actual = jax.jit(jax.vmap(jax.vmap(f, (inner,)), (outer,)))(ops)
    assert_close(actual, one_by_one(lambda x: one_by_one(f, x, inner), ops, outer))


@implementations
def test_grad_of_vmap(implementation, names):
    """Unmapped operands collect the gradients of all instances."""
    ops = {name: mapped(name) if name in ("query", "bias") else operand(name) for name in names}
    axes = {name: 0 if name in ("query", "bias") else None for name in names}
    differentiable = {name: x for name, x in ops.items() if name in GRADS}
    rest = {name: x for name, x in ops.items() if name not in GRADS}
    split = [{n: axes[n] for n in part} for part in (differentiable, rest)]

    def total(differentiable, rest):
        each = jax.vmap(functools.partial(loss, implementation=implementation), split)
        return each(differentiable, rest).sum()

    actual = jax.jit(jax.grad(total))(differentiable, rest)
    f = functools.partial(value_and_grads, implementation=implementation)
    _, expected = one_by_one(f, ops, axes)
    expected = {k: x if axes[k] == 0 else x.sum(0) for k, x in expected.items()}
    assert_close(actual, expected)


@with_gradient
def test_jacobian_maps_over_cotangents_alone(implementation):
    ops = {name: operand(name) for name in ("query", "key", "value")}
    small = {"query": ops["query"][:, :2], "key": ops["key"], "value": ops["value"]}

    def first_head(ops, implementation):
        return attend(ops, implementation)[0][0, :, 0, :3]

    jacobian = jax.jit(jax.jacrev(first_head), static_argnums=1)
    assert_close(jacobian(small, implementation), jacobian(small, "reference"))


@with_gradient
def test_vmap_of_size_zero(implementation):
    q, k = operand("query"), operand("key")
    f = jax.vmap(lambda q: cosine_attention(q, k, k, implementation=implementation))
    assert f(jnp.zeros((0, *q.shape))).shape == (0, *q.shape)


# Rematerialisation and control flow.

SAVED = jax.checkpoint_policies.save_only_these_names("cosine_attn_out", "cosine_attn_lse")


@pytest.mark.parametrize(("policy", "forwards"), [(SAVED, 1), (None, 2)], ids=["named", "nothing"])
def test_checkpoint_recomputes_the_forward_unless_its_residuals_are_saved(policy, forwards):
    ops = {name: operand(name) for name in ("query", "key", "value")}
    f = jax.checkpoint(lambda ops: loss(ops, {}, None), policy=policy)
    text = str(jax.make_jaxpr(jax.grad(f))(ops))
    # A call holds itself once more, as its body, which has none.
    assert len(re.findall(r"cosine_attn_fwd\[\s*body=(?!None)", text)) == forwards
    assert len(re.findall(r"cosine_attn_bwd\[\s*body=(?!None)", text)) == 1


@pytest.mark.parametrize("policy", [SAVED, None], ids=["named", "nothing"])
@with_gradient
def test_checkpoint_gradients(implementation, policy):
    ops = {name: operand(name) for name in ("query", "key", "value", "scale")}
    f = functools.partial(loss, rest={}, implementation=implementation)
    actual = jax.jit(jax.grad(jax.checkpoint(f, policy=policy)))(ops)
    assert_close(actual, jax.jit(jax.grad(f))(ops))


@with_gradient
def test_scan_over_layers(implementation):
    """Weights that the layers share and weights of their own, checkpointed as in training."""
    scales = jnp.asarray([3.0, 5.0, 7.0])
    x = operand("query")

    def layer(x, scale, implementation):
        return x + cosine_attention(
            x, x, x, scale=scale, scale_bound=20.0, precision="highest",
            implementation=implementation,
        )  # fmt: skip

    def scanned(x, scales):
        step = jax.checkpoint(lambda x, s: (layer(x, s, implementation), None), policy=SAVED)
        return jnp.sin(jax.lax.scan(step, x, scales)[0]).sum()

    def unrolled(x, scales):
        for scale in scales:
            x = layer(x, scale, "reference")
        return jnp.sin(x).sum()

    actual = jax.jit(jax.value_and_grad(scanned, (0, 1)))(x, scales)
    expected = jax.jit(jax.value_and_grad(unrolled, (0, 1)))
    # Three layers amplify roundings: as much as the formula itself moves when x does by an ulp.
    ulps = jax.random.rademacher(jax.random.key(0), x.shape, x.dtype) * jnp.finfo(x.dtype).eps
    moved = jax.tree.map(
        lambda a, b: jnp.abs(a - b).max(), expected(x, scales), expected(x * (1 + ulps), scales)
    )
    tolerance = 2e-5 + float(max(jax.tree.leaves(moved)))
    assert_close(actual, expected(x, scales), tolerance)


@with_gradient
def test_cond(implementation):
    ops = {name: operand(name) for name in ("query", "key", "value")}

    def f(ops, flag):
        return jax.lax.cond(flag, lambda o: loss(o, {}, implementation), lambda o: 0.0, ops)

    actual = jax.jit(jax.grad(f))(ops, True)
    assert_close(actual, value_and_grads(ops, implementation)[1])
    assert not jnp.any(jax.jit(jax.grad(f))(ops, False)["query"])


# Differentiation.


def jaxpr_text(f, *args):
    return str(jax.make_jaxpr(f)(*args))


def test_gradients_that_nobody_asks_for_are_not_in_the_program():
    ops = {name: operand(name) for name in ALL}
    others = {name: x for name, x in ops.items() if name != "query"}
    f = functools.partial(loss, implementation=None)
    text = jaxpr_text(jax.grad(lambda q: f({"query": q}, others)), ops["query"])
    assert "wanted=()" in text
    for name in ("scale", "bias", "relative_bias"):
        rest = {n: x for n, x in ops.items() if n != name}
        text = jaxpr_text(jax.grad(lambda x, n=name, r=rest: f({n: x}, r)), ops[name])
        assert f"wanted=('{name}',)" in text


@pytest.mark.parametrize(
    ("reads_lse", "operands"), [(False, "has_dlse=False"), (True, "has_dlse=True")]
)
def test_cotangent_of_lse_only_where_lse_is_read(reads_lse, operands):
    ops = {name: operand(name) for name in ("query", "key", "value")}

    def f(ops):
        out, lse = attend(ops, None)
        return out.sum() + (lse.max() if reads_lse else 0)

    assert operands in jaxpr_text(jax.grad(f), ops)


@with_gradient
def test_gradient_of_lse_alone(implementation):
    ops = {name: operand(name) for name in ("query", "key", "value")}

    def f(ops, implementation):
        return jnp.sin(attend(ops, implementation)[1][:, -1]).sum()  # the last row is never dead

    g = jax.jit(jax.grad(f), static_argnums=1)
    assert_close(g(ops, implementation), g(ops, "reference"))


def test_gradient_of_a_stopped_result_is_zero():
    ops = {name: operand(name) for name in ("query", "key", "value")}
    gradient = jax.grad(lambda ops: jax.lax.stop_gradient(attend(ops, "xla")[0]).sum())(ops)
    assert all(not jnp.any(x) for x in jax.tree.leaves(gradient))


def test_integer_and_bool_operands_have_no_cotangent():
    ops = {name: operand(name) for name in ALL}
    _, vjp = jax.vjp(lambda ops: loss(ops, {}, "xla"), ops)
    (gradient,) = vjp(jnp.float32(1))
    for name in ("mask", "query_seq_lengths", "key_value_seq_lengths", "segment_ids"):
        assert gradient[name].dtype == jax.dtypes.float0


def test_reference_differentiates_in_every_mode():
    ops = {name: operand(name) for name in ("query", "key", "value", "scale", "bias")}
    f = functools.partial(loss, rest={}, implementation="reference")
    tangent = {name: operand(name, 5) for name in ops}
    gradient = jax.grad(f)

    def along_tangent(ops):
        return sum(jnp.vdot(g, tangent[name]) for name, g in gradient(ops).items())

    def forward(f):
        return jax.jit(lambda ops: jax.jvp(f, (ops,), (tangent,))[1])(ops)

    np.testing.assert_allclose(forward(f), jax.jit(along_tangent)(ops), rtol=1e-4)
    assert_close(forward(gradient), jax.jit(jax.grad(along_tangent))(ops), 1e-4)


def test_other_implementations_say_that_the_reference_is_needed():
    ops = {name: operand(name) for name in ("query", "key", "value")}
    f = functools.partial(loss, rest={}, implementation="xla")
    with pytest.raises(NotImplementedError, match="implementation='reference'"):
        jax.grad(lambda ops: jax.grad(f)(ops)["query"].sum())(ops)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(f, (ops,), (ops,))


# Compilation.


def test_one_compilation_per_static_description(monkeypatch):
    lowered = []
    plain = _primitive.blockwise_fwd
    monkeypatch.setattr(
        _primitive, "blockwise_fwd", lambda *a: lowered.append(a[1].bound) or plain(*a)
    )
    q = jnp.ones((1, 3, 2, 24))  # a shape of this test's own
    for value in (1.0, 2.0, 3.0):
        cosine_attention(q * value, q, q, implementation="xla")
    assert len(lowered) == 1
    for value in (4.0, 5.0):
        cosine_attention(q, q, q, scale=jnp.float32(value), scale_bound=9.0, implementation="xla")
    assert len(lowered) == 2
    cosine_attention(q, q, q, scale=4.0, implementation="xla")
    assert lowered == [8.0, 9.0, 4.0]


def test_without_jit():
    ops = {name: operand(name) for name in ("query", "key", "value")}
    f = functools.partial(loss, rest={}, implementation="xla")
    with jax.disable_jit():
        gradient = jax.grad(f)(ops)
    assert_close(gradient, jax.grad(f)(ops))


def test_ahead_of_time_compilation():
    ops = {name: operand(name) for name in ("query", "key", "value")}
    f = jax.jit(functools.partial(loss, rest={}, implementation=None))
    assert_close(f.lower(ops).compile()(ops), f(ops))


# Devices.

sizes = pytest.mark.parametrize("devices", [1, 2, 8])


def mesh_of(devices, axis_type=AxisType.Auto):
    if devices > len(jax.devices()):
        pytest.skip(f"needs {devices} devices, has {len(jax.devices())}")
    return jax.make_mesh((devices,), ("data",), axis_types=(axis_type,))


def sharded_case(names):
    """Operands for 8 batch entries: (of the whole batch, shared by all of it)."""
    batched = {
        name: jnp.concatenate([operand(name, seed) for seed in range(4)])
        for name in names
        if name not in ("scale", "bias", "relative_bias")
    }
    shared = {"scale": operand("scale")}
    if "bias" in names:
        shared |= {"bias": operand("bias")[:1], "relative_bias": operand("relative_bias")}
    return batched, shared


@sizes
@implementations
def test_shard_map_over_batch(implementation, names, devices):
    """Operands that the devices share get the gradient of the whole batch."""
    mesh = mesh_of(devices)
    batched, shared = sharded_case(names)
    integers = {n: batched.pop(n) for n in list(batched) if n not in GRADS}

    def local(batched, shared, integers):
        out, lse = attend({**batched, **shared, **integers}, implementation)
        finite = jnp.where(lse > -jnp.inf, lse, 0)
        return jax.lax.psum(jnp.sin(3 * out).sum() + jnp.sin(finite).sum(), "data"), out

    def whole(batched, shared, integers):
        out, lse = attend({**batched, **shared, **integers}, implementation)
        finite = jnp.where(lse > -jnp.inf, lse, 0)
        return jnp.sin(3 * out).sum() + jnp.sin(finite).sum(), out

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=(P(), P("data"))
    )
    actual, expected = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(batched, shared, integers)
        for f in (sharded, whole)
    )
    assert_close(actual, expected)


def test_vmap_inside_shard_map():
    mesh = mesh_of(2)
    ops = {"query": mapped("query"), "key": operand("key"), "value": operand("value")}
    axes = {"query": 0, "key": None, "value": None}
    specs = {"query": P(None, "data"), "key": P("data"), "value": P("data")}
    f = jax.vmap(lambda ops: attend(ops, "xla"), (axes,))

    def summed(f):
        return jax.jit(jax.grad(lambda ops: jnp.sin(f(ops)[0]).sum()))

    sharded = jax.shard_map(f, mesh=mesh, in_specs=(specs,), out_specs=P(None, "data"))
    assert_close(summed(sharded)(ops), summed(f)(ops))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@with_gradient
def test_jit_with_sharded_inputs(implementation, axis_type):
    names = ("query", "key", "value", "mask", "scale")
    batched, shared = sharded_case(names)
    mask = batched.pop("mask")

    def f(batched, shared, mask):
        out, _ = attend({**batched, **shared, "mask": mask}, implementation)
        return jnp.sin(3 * out).sum(), out

    gradient = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))
    expected = gradient(batched, shared, mask)
    mesh = mesh_of(min(8, len(jax.devices())), axis_type)
    batched, mask = jax.device_put((batched, mask), NamedSharding(mesh, P("data")))
    shared = jax.device_put(shared, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        assert_close(gradient(batched, shared, mask), expected)


# Empty axes.

EMPTY = [
    pytest.param(b, t, s, n, k, id=f"B{b}-T{t}-S{s}-N{n}-K{k}")
    for b, t, s, n, k in [
        (0, 3, 4, 2, 2),
        (2, 0, 4, 2, 2),
        (2, 3, 0, 2, 2),
        (2, 0, 0, 2, 2),
        (2, 3, 4, 0, 2),
        (2, 3, 4, 0, 0),
    ]
]


@pytest.mark.parametrize(("b", "t", "s", "n", "k"), EMPTY)
@implementations
def test_empty_axis(implementation, names, b, t, s, n, k):
    ops = {
        "query": jnp.ones((b, t, n, H)),
        "key": jnp.ones((b, s, k, H)),
        "value": jnp.ones((b, s, k, H)),
        "scale": jnp.ones(n),
    }
    if "bias" in names:
        ops |= {"bias": jnp.ones((b, 1, t, s)), "relative_bias": jnp.ones((n, max(t + s - 1, 0)))}
    (out, lse), gradients = value_and_grads(ops, implementation)
    assert out.shape == (b, t, n, H)
    assert lse.shape == (b, t, n)
    assert not jnp.any(out)
    assert jnp.all(lse == -jnp.inf)
    for name, x in gradients.items():
        assert x.shape == ops[name].shape
        assert not jnp.any(x)


def test_every_pair_of_operands_maps():
    """All pairs, values only: the batching rule alone, on abstract values."""
    for pair in itertools.combinations(ALL, 2):
        ops = {name: mapped(name) if name in pair else operand(name) for name in ALL}
        axes = {name: 0 if name in pair else None for name in ALL}
        f = jax.vmap(functools.partial(value_and_grads, implementation="xla"), (axes,))
        (out, lse), gradients = jax.eval_shape(f, ops)
        assert out.shape == (SIZE, B, T, N, H)
        assert lse.shape == (SIZE, B, T, N)
        assert all(x.shape == (SIZE, *operand(name).shape) for name, x in gradients.items())
