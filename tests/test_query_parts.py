"""Some rows of a call as a call of their own: lengths beyond T tell where they stand."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import assert_close

from jax_cosine_attn._config import Config, Operands
from jax_cosine_attn._reference import reference_attention
from jax_cosine_attn._vjp import attention

# Of a call as the primitives know it, with T = 200 rows of B = 3 entries.
OPERANDS = {
    "bias": (3, 1, 200, 150),
    "relative_bias": (1, 4, 349),
    "mask": (3, 1, 200, 150),
    "key_mask": (3, 1, 1, 150),
    "q_segments": (3, 200),
    "kv_segments": (3, 150),
}
ROWS_AXIS = {"q": 1, "bias": 2, "mask": 2, "q_segments": 1}


def primitive_operands(names, dtype):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(3, n, h, 64)) for n, h in ((200, 4), (150, 2), (150, 2)))
    made = {"scale": np.array([[5, 6, 7, 8]], np.float32)}
    made |= {name: jnp.asarray(x, dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    for name in names:
        if name == "lengths":
            made["q_lengths"] = np.array([200, 140, 40], np.int32)
            made["kv_lengths"] = np.array([150, 90, 130], np.int32)
        elif name == "segments":
            for side in ("q_segments", "kv_segments"):
                made[side] = np.sort(rng.integers(0, 3, OPERANDS[side], np.int32))
        elif "mask" in name:
            made["mask"] = rng.random(OPERANDS[name]) < 0.8
        else:
            made[name] = rng.normal(size=OPERANDS[name]).astype(np.float32)
    return Operands(**{name: jnp.asarray(x) for name, x in made.items()})


def in_parts(attend, ops, cuts):
    """`attend` of rows [cuts[i], cuts[i + 1]) at a time; lengths tell where they stand."""
    t, s = ops.q.shape[1], ops.k.shape[1]
    t_b = jnp.array([t]) if ops.q_lengths is None else ops.q_lengths
    s_b = s if ops.kv_lengths is None else ops.kv_lengths
    results = []
    for begin, end in itertools.pairwise(cuts):
        part = {"q_lengths": jnp.maximum(t_b - begin, 0)}
        for name, axis in ROWS_AXIS.items():
            x = getattr(ops, name)
            if x is not None and x.shape[axis] > 1:
                part[name] = jax.lax.slice_in_dim(x, begin, end, axis=axis)
        if ops.relative_bias is not None:
            # Of the first row and key, in the whole and in the part.
            entry = begin + s_b - t_b + t - 1
            own = s_b - jnp.minimum(part["q_lengths"], end - begin) + end - begin - 1
            entries = (entry - own)[:, None] + jnp.arange(end - begin + s - 1)
            part["relative_bias"] = jnp.moveaxis(ops.relative_bias[0][:, entries], 1, 0)
        results.append(attend(ops._replace(**part)))
    outs, lses = zip(*results, strict=True)
    return jnp.concatenate(outs, 1), jnp.concatenate(lses, 2)


def primitive_cases():
    """For blockwise JAX and the formula, which know one kind of positions, few of them."""
    cases = [
        (("lengths", "relative_bias", "bias", "mask", "segments"), {"is_causal": True}),
        (("lengths", "relative_bias"), {"window": (60, 20)}),
        (("segments",), {"window": (None, 10)}),
        (("bias", "mask"), {"window": (30, None)}),
        (("lengths", "relative_bias"), {"is_causal": True, "deterministic": True}),
        (("lengths",), {"is_causal": True}),
        (("lengths", "key_mask"), {"is_causal": True}),
    ]
    for i, (names, options) in enumerate(cases):
        id = "-".join((*names, *options))
        for implementation, few in (("reference", 1), ("xla", 2)):
            marks = () if i < few else pytest.mark.full
            yield pytest.param(
                implementation,
                names,
                options,
                jnp.float32,
                id=f"{implementation}-{id}",
                marks=marks,
            )
        for dtype in (jnp.float32, jnp.bfloat16):
            yield pytest.param(
                "cuda",
                names,
                options,
                dtype,
                id=f"cuda-{id}-{dtype.__name__}",
                marks=pytest.mark.gpu,
            )


@pytest.mark.parametrize(("implementation", "names", "options", "dtype"), [*primitive_cases()])
def test_first_rows_of_a_longer_sequence(implementation, names, options, dtype):
    """Rows of a call are a call of their own, whose lengths exceed its T."""
    ops = primitive_operands(names, dtype)
    floats = ("q", "k", "v", "scale", "bias", "relative_bias")
    floats = {name: getattr(ops, name) for name in floats if getattr(ops, name) is not None}
    config = Config(batch=3, bound=8.0, precision="highest", **options)
    if implementation == "reference":
        attend = functools.partial(reference_attention, config=config)
    else:
        config = dataclasses.replace(config, implementation=implementation)
        attend = functools.partial(attention, config=config)

    def results_and_gradients(call):
        def loss(floats):
            out, lse = call(ops._replace(**floats))
            live = jnp.where(lse > -jnp.inf, lse, 0)
            return jnp.sin(3 * out.astype(jnp.float32)).sum() + jnp.sin(live).sum(), (out, lse)

        return jax.jit(jax.grad(loss, has_aux=True))(floats)

    # Few rows are what the decode kernel takes.
    parts = results_and_gradients(functools.partial(in_parts, attend, cuts=(0, 120, 136, 200)))
    tolerance = 2e-5 if dtype == jnp.float32 else 4 * float(jnp.finfo(dtype).eps)
    assert_close(parts, results_and_gradients(attend), tolerance)
