"""Sharded inputs under jit: what one device computes, and which collectives it takes."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_cosine_attn import cosine_attention, flash_cosine_sim_attention

B, T, S, N, K, H = 4, 8, 8, 8, 4, 8
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
axis_types = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
implementations = pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def collectives(compiled):
    """How many of each kind a compiled program has."""
    found = re.findall(rf"= .*? ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text())
    return dict(collections.Counter(found))


def gathers(compiled):
    return {k: n for k, n in collectives(compiled).items() if k != "all-reduce"}


def mesh_of(sizes, names, axis_type=AxisType.Auto):
    """A mesh of the given sizes, or of one device each where there are too few."""
    if np.prod(sizes) > len(jax.devices()):
        sizes = (1,) * len(sizes)
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(names))


def inputs(*names, heads=N, kv_heads=K, keys=S, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "query": (B, T, heads, H),
        "key": (B, keys, kv_heads, H),
        "value": (B, keys, kv_heads, H),
        "bias": (1, heads, T, keys),
        "relative_bias": (heads, T + keys - 1),
        "shared_relative_bias": (1, T + keys - 1),
        "row_bias": (B, 1, T, 1),
    }
    made = {}
    for name in ("query", "key", "value", *names):
        if name == "scale":
            made[name] = rng.uniform(2, 9, heads).astype(np.float32)
        elif name == "mask":
            made[name] = rng.random((B, 1, T, keys)) < 0.8
        elif name == "query_seq_lengths":
            made[name] = np.array([8, 3, 5, 0], np.int32)
        elif name == "key_value_seq_lengths":
            made[name] = np.array([6, 8, 3, 8], np.int32)
        elif name == "segment_ids":
            made[name] = rng.integers(0, 2, (B, T), dtype=np.int32)
        else:
            made[name.removeprefix("shared_")] = rng.normal(size=shapes[name]).astype(np.float32)
    return {name: jnp.asarray(x) for name, x in made.items()}


# How "data" and "model" cut each operand; what is not here is on every device.
SPECS = {
    "query": ("data", None, "model"),
    "key": ("data", None, "model"),
    "value": ("data", None, "model"),
    "scale": ("model",),
    "bias": (None, "model"),
    "relative_bias": ("model",),
    "mask": ("data",),
    "query_seq_lengths": ("data",),
    "key_value_seq_lengths": ("data",),
    "segment_ids": ("data",),
}


def put(ops, mesh, specs):
    def sharding(name):
        spec = (axis if axis in mesh.axis_names else None for axis in specs.get(name, ()))
        return NamedSharding(mesh, P(*spec))

    return {name: jax.device_put(x, sharding(name)) for name, x in ops.items()}


def value_and_grads(ops, **options):
    """(out, lse) and the gradients of all float operands, for uneven cotangents."""
    floats = {name: x for name, x in ops.items() if jnp.issubdtype(x.dtype, jnp.floating)}

    def attend(floats):
        return cosine_attention(
            **{**ops, **floats}, scale_bound=20.0, precision="highest", return_residual=True,
            **options,
        )  # fmt: skip

    def loss(floats):
        out, lse = attend(floats)
        return jnp.sin(3 * out).sum() + jnp.sin(jnp.where(lse > -jnp.inf, lse, 0)).sum()

    return attend(floats), jax.grad(loss)(floats)


def assert_close(actual, expected, tolerance=2e-5):
    """Equal but for a tolerance in units of the largest element, of 1 at least."""

    def check(path, x, y):
        assert x.shape == y.shape and x.dtype == y.dtype, path
        finite = jnp.where(jnp.isfinite(y), y, 0)
        atol = tolerance * max(1.0, float(jnp.abs(finite).max(initial=0)))
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=atol, err_msg=str(path))

    jax.tree.map_with_path(check, actual, expected)


def run_sharded(f, ops, mesh, specs=SPECS):
    """(results of f on sharded operands, the compiled program)."""
    with jax.set_mesh(mesh):
        ops = put(ops, mesh, specs)
        compiled = jax.jit(f).lower(ops).compile()
        return compiled(ops), compiled


def mesh_case(id, sizes, names, axis_type, full=False):
    marks = pytest.mark.full if full else ()
    return pytest.param(sizes, names, axis_type, id=f"{id}-{axis_type.name}", marks=marks)


MESHES = [
    mesh_case("dp8", (8,), ("data",), AxisType.Auto),
    mesh_case("dp8", (8,), ("data",), AxisType.Explicit, full=True),
    mesh_case("tp4", (4,), ("model",), AxisType.Auto, full=True),
    mesh_case("tp4", (4,), ("model",), AxisType.Explicit),
    mesh_case("dp2-tp4", (2, 4), ("data", "model"), AxisType.Auto),
    mesh_case("dp2-tp4", (2, 4), ("data", "model"), AxisType.Explicit),
]


@pytest.mark.parametrize(("sizes", "names", "axis_type"), MESHES)
@implementations
def test_batch_and_heads_need_no_gather(implementation, axis_type, sizes, names):
    """The sums of dscale and dbias over the batch are the only collectives."""
    ops = inputs("scale", "bias", "mask", "query_seq_lengths", "segment_ids")
    if names == ("data",):
        ops = {k: jnp.tile(x, (2, *[1] * (x.ndim - 1))) if x.shape[0] == B else x
               for k, x in ops.items()}  # fmt: skip
    f = functools.partial(value_and_grads, is_causal=True, implementation=implementation)
    actual, compiled = run_sharded(f, ops, mesh_of(sizes, names, axis_type))
    assert gathers(compiled) == {}
    assert_close(actual, jax.jit(f)(ops))
    assert actual[0][0].sharding.is_equivalent_to(
        put(ops, mesh_of(sizes, names), SPECS)["query"].sharding, 4
    )


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_forward_has_no_collective(is_causal):
    def f(ops):
        return cosine_attention(**ops, is_causal=is_causal)

    _, compiled = run_sharded(f, inputs("scale"), mesh_of((2, 4), ("data", "model")))
    assert collectives(compiled) == {}


@implementations
def test_one_head_of_keys_is_on_every_device(implementation):
    """dk and dv are added up over the heads' axis."""
    ops = inputs("relative_bias", kv_heads=1)
    f = functools.partial(value_and_grads, implementation=implementation)
    specs = SPECS | {"key": ("data",), "value": ("data",)}
    actual, compiled = run_sharded(f, ops, mesh_of((2, 4), ("data", "model")), specs)
    assert gathers(compiled) == {}
    assert_close(actual, jax.jit(f)(ops))


@pytest.mark.usefixtures("eight_devices")
def test_gradient_of_what_devices_hold_for_all_heads_is_gathered():
    """Of Explicit axes: else XLA leaves it where it is."""

    def gradients(ops):
        return jax.grad(lambda ops: cosine_attention(**ops).sum())(ops)

    mesh = mesh_of((2, 4), ("data", "model"), AxisType.Explicit)
    specs = {name: SPECS[name] for name in ("query", "key", "value")}
    _, compiled = run_sharded(gradients, inputs("scale"), mesh, specs)
    assert collectives(compiled) == {"all-reduce": 1, "all-gather": 1}


SEQUENCE = {
    **dict.fromkeys(("query", "key", "value", "segment_ids"), ("data", "cp")),
    **dict.fromkeys(("query_seq_lengths", "key_value_seq_lengths"), ("data",)),
}


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ((), {}),
        pytest.param(*(("query_seq_lengths",), {}), marks=pytest.mark.full),
        (("scale", "mask", "bias"), {"is_causal": True}),
        pytest.param(*(("query_seq_lengths",), {"is_causal": True}), marks=pytest.mark.full),
        (("query_seq_lengths", "key_value_seq_lengths"), {"is_causal": True}),
        (("segment_ids", "key_value_seq_lengths"), {"is_causal": True, "local_window_size": 3}),
    ],
    ids=lambda x: "-".join(x) or "plain",
)
@pytest.mark.parametrize(
    "axis_type",
    [
        pytest.param(AxisType.Auto, id="auto", marks=pytest.mark.full),
        pytest.param(AxisType.Explicit, id="explicit"),
    ],
)
@implementations
def test_sharded_queries_stay_where_they_are(implementation, axis_type, names, options):
    """Keys and values are gathered, queries are not, and keys get the sum of their gradients."""
    ops = inputs(*names)
    f = functools.partial(value_and_grads, implementation=implementation, **options)
    mesh = mesh_of((2, 4), ("data", "cp"), axis_type)
    actual, compiled = run_sharded(f, ops, mesh, SEQUENCE)
    assert_close(actual, jax.jit(f)(ops))
    if mesh.size > 1:
        local_rows = re.findall(rf"all-gather[^\n]*f32\[{B // 2},{T},{N}", compiled.as_text())
        assert local_rows == []
        assert actual[0][0].sharding.spec[1] == "cp"


@pytest.mark.usefixtures("eight_devices")
def test_collectives_of_sharded_queries():
    """Keys and values forward; backward one combined sum of their gradients."""
    mesh = mesh_of((2, 4), ("data", "cp"))

    def attend(ops):
        return cosine_attention(**ops, is_causal=True)

    def gradients(ops):
        return jax.grad(lambda ops: attend(ops).sum())(ops)

    _, forward = run_sharded(attend, inputs(), mesh, SEQUENCE)
    assert collectives(forward) == {"all-gather": 2}
    _, backward = run_sharded(gradients, inputs(), mesh, SEQUENCE)
    assert collectives(backward).keys() == {"all-gather", "all-reduce"}
    assert collectives(backward)["all-gather"] == 2


@axis_types
@implementations
def test_batch_heads_and_queries_at_once(implementation, axis_type):
    """Of keys only what this device's batch and heads need is gathered."""
    ops = inputs("scale", "mask", "query_seq_lengths", "key_value_seq_lengths", "segment_ids")
    mesh = mesh_of((2, 2, 2), ("data", "cp", "model"), axis_type)
    specs = SPECS | dict.fromkeys(("query", "key", "value"), ("data", "cp", "model"))
    f = functools.partial(value_and_grads, is_causal=True, implementation=implementation)
    actual, compiled = run_sharded(f, ops, mesh, specs)
    assert_close(actual, jax.jit(f)(ops))
    if mesh.size > 1:
        assert gathers(compiled).keys() == {"all-gather"}
        gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", compiled.as_text())
        assert set(gathered) == {f"{B // 2},{S},{K // 2},{H}"}


LENGTHS = ("query_seq_lengths", "key_value_seq_lengths")


def assert_keys_alone_are_gathered(compiled, batch):
    assert gathers(compiled).keys() == {"all-gather"}
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", compiled.as_text())
    # A mapped axis that they do not have is one of size 1.
    assert {shape.replace(",1,", ",") for shape in gathered} == {f"{batch},{2 * S},{K},{H}"}


@pytest.mark.parametrize(
    ("sizes", "names", "options"),
    [
        ((2, 4), (), {"local_window_size": (2, 1)}),
        ((1, 8), LENGTHS, {"local_window_size": (2, None)}),
        ((2, 4), LENGTHS, {"local_window_size": (None, 1)}),
        ((2, 4), LENGTHS, {"local_window_size": 3, "is_causal": True}),
        ((2, 4), ("relative_bias",), {}),
        ((1, 8), ("relative_bias",), {"is_causal": True}),
        ((1, 8), ("relative_bias", *LENGTHS), {"deterministic": True}),
        ((2, 4), ("relative_bias", *LENGTHS), {"is_causal": True}),
        ((2, 4), ("shared_relative_bias", LENGTHS[0]), {"local_window_size": (4, 2)}),
    ],
    ids=lambda x: "-".join(map(str, x)) or "plain",
)
@implementations
def test_place_of_sharded_queries(implementation, sizes, names, options):
    """Each device has the window and the entries of relative_bias of its own rows, some of which
    are all dead; no row of a query travels. Axes are Explicit where all devices cut queries."""
    ops = inputs(*names, keys=2 * S)
    f = functools.partial(value_and_grads, implementation=implementation, **options)
    axis_type = AxisType.Explicit if sizes[0] == 1 else AxisType.Auto
    mesh = mesh_of(sizes, ("data", "cp"), axis_type)
    actual, compiled = run_sharded(f, ops, mesh, SEQUENCE)
    assert_close(actual, jax.jit(f)(ops))
    if mesh.size > 1:
        assert_keys_alone_are_gathered(compiled, B // sizes[0])


@pytest.mark.parametrize("names", [(), LENGTHS], ids=["", "lengths"])
@implementations
def test_mapped_relative_bias_of_sharded_queries(implementation, names):
    """Rows of relative_bias and of its gradient are fewer than entries of the batch, or as many."""
    ops = inputs("relative_bias", *names, keys=2 * S)
    for name, axis in (("query", 1), ("relative_bias", 0)):
        ops[name] = jnp.stack([ops[name], -ops[name]], axis)

    def f(ops):
        def attend(query, relative_bias):
            return cosine_attention(
                **ops | {"query": query, "relative_bias": relative_bias},
                is_causal=True, precision="highest", implementation=implementation,
            )  # fmt: skip

        def loss(query, relative_bias):
            own = jax.vmap(attend, (1, 0), 1)(query, relative_bias)
            shared = jax.vmap(attend, (1, None), 1)(query, relative_bias[0])
            return jnp.sin(3 * own + shared).sum()

        return jax.value_and_grad(loss, (0, 1))(ops["query"], ops["relative_bias"])

    mesh = mesh_of((2, 4), ("data", "cp"))
    actual, compiled = run_sharded(f, ops, mesh, SEQUENCE | {"query": ("data", None, "cp")})
    assert_close(actual, jax.jit(f)(ops))
    if mesh.size > 1:
        assert_keys_alone_are_gathered(compiled, B // 2)


@implementations
def test_axes_that_do_not_divide_are_gathered(implementation):
    """Four heads of keys over eight devices, six entries over four."""
    ops = {name: jnp.concatenate([x, x[:2]]) for name, x in inputs().items()}
    f = functools.partial(value_and_grads, implementation=implementation)
    for sizes in ((1, 8), (8, 1)):
        mesh = mesh_of(sizes, ("data", "model"))
        specs = {"query": (None, None, "model")}
        assert_close(run_sharded(f, ops, mesh, specs)[0], jax.jit(f)(ops))


@axis_types
@implementations
def test_vmap_remat_and_scan(implementation, axis_type):
    """Layers scanned and checkpointed, instances mapped with operands of their own and shared."""
    ops = inputs("scale", "key_value_seq_lengths")
    scales = jnp.stack([ops.pop("scale"), jnp.full(N, 5.0)])
    ops["query"] = jnp.stack([ops["query"], 2 * ops["query"][::-1]], 1)

    def f(ops, scales):
        def attend(query, scale):
            return cosine_attention(
                query, ops["key"], ops["value"], scale=scale, scale_bound=20.0,
                key_value_seq_lengths=ops["key_value_seq_lengths"],
                precision="highest", implementation=implementation,
            )  # fmt: skip

        @jax.checkpoint
        def layer(x, scale):
            return x + jax.vmap(attend, (1, None), 1)(x, scale), None

        def loss(query, scales):
            return jnp.sin(jax.lax.scan(layer, query, scales)[0]).sum()

        return jax.value_and_grad(loss, (0, 1))(ops["query"], scales)

    expected = jax.jit(f)(ops, scales)
    mesh = mesh_of((2, 4), ("data", "model"), axis_type)
    with jax.set_mesh(mesh):
        specs = SPECS | {"query": ("data", None, None, "model")}
        ops = put(ops, mesh, specs)
        scales = jax.device_put(scales, NamedSharding(mesh, P(None, "model")))
        compiled = jax.jit(f).lower(ops, scales).compile()
        assert gathers(compiled) == {}
        assert_close(compiled(ops, scales), expected)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(("data", None, None, "model"), id="mapped axis"),
        pytest.param(("data", "model"), id="mapped axis and batch"),
        pytest.param((None, "data", None, "model"), id="batch", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("shared", [(), ("key", "value")], ids=["", "shared keys"])
@axis_types
@implementations
def test_sharded_mapped_axis(implementation, axis_type, shared, spec):
    """Instances over devices, each a batch of its own, with what they share on all of them."""
    ops = inputs("scale", "mask")
    names = [name for name in ops if name not in (*shared, "scale")]
    ops |= {name: jnp.stack([ops[name], ops[name][::-1]]) for name in names}
    axes = {name: 0 if name in names else None for name in ops}
    specs = {name: (*spec[:2], *((None,) * 2 if name == "mask" else spec[2:])) for name in names}
    specs["scale"] = ("model",) if spec[-1] == "model" and len(spec) == 4 else ()
    specs |= dict.fromkeys(shared, spec[1:])

    def f(ops):
        def attend(ops):
            return cosine_attention(
                **ops, scale_bound=20.0, precision="highest", implementation=implementation
            )

        def loss(grads):
            return jnp.sin(3 * jax.vmap(attend, (axes,))(ops | grads)).sum()

        return jax.value_and_grad(loss)({name: ops[name] for name in ops if name != "mask"})

    expected = jax.jit(f)(ops)
    mesh = mesh_of((2, 4), ("data", "model"), axis_type)
    actual, compiled = run_sharded(f, ops, mesh, specs)
    assert_close(actual, expected)
    assert gathers(compiled) == {}


@axis_types
@implementations
def test_mapped_queries_beside_an_operand_that_is_not_sharded(implementation, axis_type):
    """The gradient of a bias with a batch is on every device, as the bias is."""
    ops = inputs("row_bias")
    ops["bias"] = ops.pop("row_bias")
    ops["query"] = jnp.stack([ops["query"], 2 * ops["query"][::-1]], 1)

    def f(ops):
        def loss(ops):
            def attend(query):
                return cosine_attention(
                    **ops | {"query": query}, precision="highest", implementation=implementation
                )

            return jnp.sin(3 * jax.vmap(attend, 1, 1)(ops["query"])).sum()

        return jax.value_and_grad(loss)(ops)

    mesh = mesh_of((2, 4), ("data", "model"), axis_type)
    specs = dict.fromkeys(("query", "key", "value"), ("data",))
    assert_close(run_sharded(f, ops, mesh, specs)[0], jax.jit(f)(ops))


@axis_types
@implementations
def test_cotangents_alone_may_be_mapped(implementation, axis_type):
    """A Jacobian's rows over devices: gradients stay where their cotangents are."""
    ops = inputs()
    ops["cotangents"] = jnp.stack([ops["query"], ops["query"][::-1]])

    def f(ops):
        def attend(query, key, value):
            return cosine_attention(
                query, key, value, precision="highest", implementation=implementation
            )

        return jax.vmap(jax.vjp(attend, ops["query"], ops["key"], ops["value"])[1])(
            ops["cotangents"]
        )

    specs = dict.fromkeys(("query", "key", "value"), (None, None, "model"))
    specs["cotangents"] = ("data", None, None, "model")
    mesh = mesh_of((2, 4), ("data", "model"), axis_type)
    actual, compiled = run_sharded(f, ops, mesh, specs)
    assert_close(actual, jax.jit(f)(ops))
    assert collectives(compiled) == {}


@pytest.mark.parametrize("axes", [(0, 0, 0), (None, 0, 0)], ids=["", "shared queries"])
@implementations
def test_vmap_of_shard_map_over_another_axis(implementation, axes):
    """Instances over one axis of the mesh, heads over the other. Of what instances share there is
    no gradient: JAX cannot add it up for a custom_vjp, and says so."""
    ops = inputs()
    args = [
        ops[name] if axis is None else jnp.stack([ops[name], ops[name][::-1]])
        for name, axis in zip(("query", "key", "value"), axes, strict=True)
    ]
    attend = functools.partial(
        cosine_attention, is_causal=True, precision="highest", implementation=implementation
    )
    heads = P(None, None, "model")
    mesh = mesh_of((2, 4), ("data", "model"))
    local = jax.shard_map(attend, mesh=mesh, in_specs=(heads,) * 3, out_specs=heads)
    sharded = jax.vmap(local, axes, spmd_axis_name="data")
    whole = jax.vmap(attend, axes)

    def gradients(f):
        return jax.grad(lambda args: jnp.sin(3 * f(*args)).sum())

    with jax.set_mesh(mesh):
        assert_close(jax.jit(sharded)(*args), jax.jit(whole)(*args))
        if None not in axes:
            assert_close(jax.jit(gradients(sharded))(args), jax.jit(gradients(whole))(args))
        elif mesh.size > 1:
            with pytest.raises(ValueError, match="cotangent"):
                gradients(sharded)(args)


def test_mesh_need_not_be_set():
    """The devices of the inputs are enough, outside jit too."""
    ops = inputs()
    mesh = mesh_of((2, 4), ("data", "model"))
    out = cosine_attention(**put(ops, mesh, SPECS))
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "model")), 4)
    np.testing.assert_allclose(out, cosine_attention(**ops), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [(), ("data", None, "model")], ids=["", "constrained"])
@implementations
def test_mesh_is_set_and_no_argument_is_sharded(implementation, spec):
    """As where parameters are made. Of arrays that are constrained inside, devices have parts."""
    ops = inputs("scale")
    f = functools.partial(value_and_grads, is_causal=True, implementation=implementation)

    def constrained(ops):
        arrays = {name: x for name, x in ops.items() if name != "scale"}
        return f(ops | jax.lax.with_sharding_constraint(arrays, P(*spec)))

    mesh = mesh_of((2, 4), ("data", "model"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(constrained if spec else f).lower(ops).compile()
        actual = compiled(ops)
    assert_close(actual, jax.jit(f)(ops))
    assert gathers(compiled) == {}
    assert actual[0][0].sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), 4)


def test_layout_of_the_original():
    ops = {name: x.swapaxes(1, 2) for name, x in inputs(kv_heads=N).items()}
    mesh = mesh_of((2, 4), ("data", "model"))

    def f(ops):
        q, k, v = (ops[name] for name in ("query", "key", "value"))
        return flash_cosine_sim_attention(q, k, v, causal=True)

    actual, compiled = run_sharded(f, ops, mesh, dict.fromkeys(ops, ("data", "model")))
    assert collectives(compiled) == {}
    np.testing.assert_allclose(actual, f(ops), rtol=1e-5, atol=1e-6)


def test_mapped_layout_of_the_original():
    ops = {name: x.swapaxes(1, 2) for name, x in inputs(kv_heads=N).items()}
    ops["query"] = jnp.stack([ops["query"], ops["query"][::-1]])
    mesh = mesh_of((2, 4), ("data", "model"))

    def f(ops):
        def attend(q):
            return flash_cosine_sim_attention(q, ops["key"], ops["value"], causal=True)

        return jax.vmap(attend)(ops["query"])

    specs = dict.fromkeys(("key", "value"), (None, "model"))
    specs["query"] = ("data", None, "model")
    actual, compiled = run_sharded(f, ops, mesh, specs)
    assert collectives(compiled) == {}
    np.testing.assert_allclose(actual, f(ops), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "axis_type",
    [
        pytest.param(AxisType.Auto, id="auto"),
        pytest.param(AxisType.Explicit, id="explicit", marks=pytest.mark.full),
    ],
)
@implementations
def test_inside_a_partly_manual_shard_map(implementation, axis_type):
    """Over the batch; heads are XLA's. What devices share gets the gradient of the whole batch."""
    ops = inputs("scale", "bias")
    specs = {name: P("data") if name in ("query", "key", "value") else P() for name in ops}
    mesh = mesh_of((2, 4), ("data", "model"), axis_type)

    def attend(ops):
        return cosine_attention(
            **ops, is_causal=True, scale_bound=20.0, precision="highest",
            implementation=implementation, return_residual=True,
        )  # fmt: skip

    def gradient(f, ops):
        def loss(ops):
            out, lse = f(ops)
            return jnp.sin(3 * out).sum() + jnp.sin(lse).sum()

        return jax.value_and_grad(loss)(ops)

    mapped = jax.shard_map(
        attend, mesh=mesh, in_specs=(specs,), out_specs=P("data"), axis_names={"data"}
    )
    actual, _ = run_sharded(functools.partial(gradient, mapped), ops, mesh)
    assert_close(actual, jax.jit(functools.partial(gradient, attend))(ops))
