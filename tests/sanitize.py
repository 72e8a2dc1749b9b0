"""Runs every compiled kernel instance on its smallest shapes, for compute-sanitizer to watch.

Instances come from the launch table, so a new one cannot be forgotten. `make sanitize` runs this
under memcheck and racecheck; on its own it checks that all results are finite. Two arguments, I and
N: every N-th instance from the I-th on.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import jax_cosine_attn
from jax_cosine_attn import _cuda

# Arithmetic of an instance: the inputs' dtype and the precision that selects it.
ARITHMETIC = {
    "float16": ("float16", None),
    "bfloat16": ("bfloat16", None),
    "float16-bfloat16": ("bfloat16", None),
    "tf32": ("float32", "default"),
    "3xtf32": ("float32", "highest"),
}


# Bytes of shared memory on compute capability 8.6 and 8.9; and what every portable kernel fits into
# and none for Hopper, a kilobyte less than an A100 has.
SMALL_GPU, PORTABLE = 99 * 1024, 162 * 1024


def shared_memory(instance: dict) -> int:
    """The limit under which calls take this instance and not another one; 0: none."""
    if instance["small"]:
        return SMALL_GPU
    return PORTABLE if instance["family"] == "sm80" else 0


def calls(instance: dict):
    """(name, shapes, options, differentiable options) that reach every branch: whole blocks, then
    ragged ones with masking by position, then what is data."""
    head_dim = instance["head_dim"]
    if instance["direction"] == "decode":
        yield from decode_calls(head_dim, instance["block_m"] // 4)
        return
    with_biases = instance["unbounded"] and instance["direction"] != "dq"
    lengths = np.array([60, 1], np.int32)
    kind = {}
    if (instance["family"], instance["direction"]) == ("sm90", "fwd"):
        # Several tiles for each CTA; more blocks of keys than there are stages.
        many, long = (
            dict(t=64, s=64, n=240, k=240, h=head_dim),
            dict(t=300, s=1024, n=1, k=1, h=head_dim),
        )
        if instance["raw"]:
            yield "many", many, {}, {}
            yield "long", long, {"is_causal": True}, {}
        else:
            # Lists of keys and two norms a row each take k^ of a pass before, and the former raw q.
            yield "many", many, {"mask": np.ones((1, 1, 1, many["s"]), bool)}, {}
            yield "long", long, {"mask": np.ones((1, 1, 1, long["s"]), bool)}, {}
            if instance["arithmetic"] != "float16-bfloat16":
                yield "unit rows", long, {"l2norm_qk": False}, {}
            if instance["makes_keys"]:
                # More boxes of keys for each CTA than there are stages, the last of them ragged.
                yield "own keys", dict(t=300, s=1090, n=1, k=1, h=head_dim), {}, {}
            kind = {"l2norm_groups": 2}
    if instance["direction"] != "dbias":
        yield "plain", dict(t=64, s=64, n=1, k=1, h=head_dim), kind, {}
    key_mask = np.arange(131) % 3 != 1
    # Rows of a multiple of 8 elements are all that the kernels for Hopper take.
    ragged = dict(t=67, s=131, n=4, k=2, h=head_dim - (8 if instance["family"] == "sm90" else 3))
    options = {
        "is_causal": True,
        "query_seq_lengths": lengths,
        "key_value_seq_lengths": lengths + 70,
    }
    if not instance["raw"]:
        options["mask"] = key_mask[None, None, None]
    if instance["direction"] != "dbias":
        yield "ragged", ragged, options, {}
    rng = np.random.default_rng(1)
    options = {
        "mask": rng.random((2, 1, 67, 131)) < 0.7,
        "segment_ids": tuple(
            np.sort(rng.integers(0, 2, (2, x)).astype(np.int32)) for x in (67, 131)
        ),
        "local_window_size": (40, 30),
        **kind,
    }
    biases = {}
    if with_biases:
        biases = {
            "bias": rng.standard_normal((4, 67, 131)).astype(np.float32),
            "relative_bias": rng.standard_normal((4, 67 + 131 - 1)).astype(np.float32),
        }
    yield "data", ragged, options, biases
    if with_biases:
        for shape in ((131,), (67, 1), (1, 1)):
            yield f"bias {shape}", ragged, {}, {"bias": np.ones(shape, np.float16)}


def decode_calls(head_dim: int, t: int):
    """The same for four query heads a kv head, with one split and with several."""
    yield "plain", dict(t=t, s=128, n=4, k=1, h=head_dim), {}, {}
    ragged = dict(t=t - 1, s=601, n=8, k=2, h=head_dim - 8)
    options = {
        "is_causal": True,
        "mask": (np.arange(601) % 3 != 1)[None, None, None],
        "query_seq_lengths": np.array([t - 1, 1], np.int32),
        "key_value_seq_lengths": np.array([601, 300], np.int32),
    }
    yield "ragged", ragged, options, {}
    rng = np.random.default_rng(1)
    options = {
        "mask": rng.random((2, 8, t - 1, 601)) < 0.7,
        "segment_ids": tuple(
            np.sort(rng.integers(0, 2, (2, x)).astype(np.int32)) for x in (t - 1, 601)
        ),
        "local_window_size": (400, 30),
        "l2norm_qk": False,
    }
    yield "data", ragged, options, {}


def run(instance: dict) -> None:
    dtype, precision = ARITHMETIC[instance["arithmetic"]]
    for name, size, options, differentiable in calls(instance):
        rng = np.random.default_rng(0)
        batch = 2
        q = rng.standard_normal((batch, size["t"], size["n"], size["h"]))
        k, v = rng.standard_normal((2, batch, size["s"], size["k"], size["h"]))
        if not options.get("l2norm_qk", True):
            q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        # Without a bound the forward keeps a running maximum; above 16 its unit rows are bfloat16.
        bound = None if instance["unbounded"] else 8.0
        if (instance["direction"], instance["arithmetic"], bound) == ("fwd", "bfloat16", 8.0):
            bound = 40.0
        if bound is not None:
            bound /= options.get("l2norm_groups", 1)
        differentiable = differentiable | {"scale": np.full(size["n"], 4.0, np.float32)}
        deterministic = instance["direction"] in ("dq", "dbias")

        def attend(
            q, k, v, differentiable, bound=bound, options=options, deterministic=deterministic
        ):  # fmt: skip
            return jax_cosine_attn.cosine_attention(
                q, k, v, **differentiable, **options, scale_bound=bound, precision=precision,
                deterministic=deterministic, implementation="cuda", return_residual=True,
            )  # fmt: skip

        def loss(*args, attend=attend):
            out, lse = attend(*args)
            return out.astype(jnp.float32).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

        args = (*(jnp.asarray(x, dtype) for x in (q, k, v)), differentiable)
        if instance["direction"] in ("fwd", "decode"):
            results = jax.jit(attend)(*args)[0]
        else:
            results = [jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*args)]
            if instance["family"] == "sm90":  # which has a kernel for calls without dscale
                results += jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args)
        for result in jax.tree.leaves(results):
            assert np.isfinite(np.asarray(result, np.float32)).all(), (instance, name)
        of = (
            "family", "direction", "arithmetic", "unbounded", "small", "raw", "head_dim",
            "candidate",
        )  # fmt: skip
        print(*(instance[x] for x in of), name, flush=True)


if __name__ == "__main__":
    first, processes = (int(x) for x in sys.argv[1:] or (0, 1))
    for instance in _cuda.instances()[first::processes]:
        _cuda.limit_shared_memory(shared_memory(instance))
        _cuda.select_candidate(instance["candidate"])
        run(instance)
