"""Runs every compiled kernel instance on its smallest shapes, for compute-sanitizer to watch.

Instances come from the launch table, so a new one cannot be forgotten. `make sanitize` runs this
under memcheck and racecheck; on its own it checks that all results are finite.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jax_cosine_attn
from jax_cosine_attn import _cuda

# Arithmetic of an instance: the inputs' dtype and the precision that selects it.
ARITHMETIC = {
    "float16": ("float16", None),
    "bfloat16": ("bfloat16", None),
    "tf32": ("float32", "default"),
    "3xtf32": ("float32", "highest"),
}


def calls(head_dim: int):
    """(shapes and options) that reach every branch: whole rows, then ragged ones with masking."""
    yield "plain", dict(t=64, s=64, n=1, k=1, h=head_dim), {}
    lengths = np.array([60, 1], np.int32)
    mask = np.arange(131) % 3 != 1
    options = {
        "is_causal": True,
        "mask": mask[None, None, None],
        "query_seq_lengths": lengths,
        "key_value_seq_lengths": lengths + 70,
    }
    yield "ragged", dict(t=67, s=131, n=4, k=2, h=head_dim - 3), options


def run(instance: dict) -> None:
    dtype, precision = ARITHMETIC[instance["arithmetic"]]
    for name, size, options in calls(instance["head_dim"]):
        rng = np.random.default_rng(0)
        batch = 2
        q = rng.standard_normal((batch, size["t"], size["n"], size["h"]))
        k, v = rng.standard_normal((2, batch, size["s"], size["k"], size["h"]))
        scale = np.full(size["n"], 8.0, np.float32)
        # Without a bound the forward keeps a running maximum.
        bound = None if instance["unbounded"] else 8.0

        def attend(q, k, v, scale, bound=bound, options=options):
            return jax_cosine_attn.cosine_attention(
                q, k, v, scale=scale, scale_bound=bound, precision=precision,
                implementation="cuda", return_residual=True, **options,
            )  # fmt: skip

        def loss(*args, attend=attend):
            out, lse = attend(*args)
            return out.astype(jnp.float32).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

        args = (*(jnp.asarray(x, dtype) for x in (q, k, v)), scale)
        if instance["direction"] == "fwd":
            results = jax.jit(attend)(*args)[0]
        else:
            results = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*args)
        for result in jax.tree.leaves(results):
            assert np.isfinite(np.asarray(result, np.float32)).all(), (instance, name)
        print(instance["direction"], instance["arithmetic"], instance["head_dim"], name, flush=True)


if __name__ == "__main__":
    for instance in _cuda.instances():
        run(instance)
