"""What the tests of both Flax packages share: inputs, the formula, and how close is close."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle

B, T, FEATURES, HEADS = 2, 9, 16, 4
HEAD_DIM = FEATURES // HEADS

# Options of both modules beside Flax's own.
ATTENTION_OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (3, 1)},
    "causal-window": {"is_causal": True, "local_window_size": 2},
    "scale": {"scale": -3.0},
    "groups": {"l2norm_groups": 2},
    "learned": {"learned_scale": True, "scale": 5.0},
    "kv-heads": {"num_kv_heads": 2},
    "layer-norm": {"normalize_qk": True},
}
# Those a decode cache has to get right, causal anyhow.
DECODE_OPTIONS = {name: ATTENTION_OPTIONS[name] for name in ATTENTION_OPTIONS if name != "causal"}
DECODE_OPTIONS["window"] = {"local_window_size": (3, 0)}


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def formula(query, key, value, mask=None, dout=None, **options):
    """The oracle's results for [batch..., length, heads, head dim], batch dims merged."""
    query, key, value = (np.asarray(x).reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    known = {"scale", "l2norm_groups", "is_causal", "local_window_size", "l2norm_qk"}
    options = {name: value for name, value in options.items() if name in known}
    return oracle.attention(query, key, value, mask=mask, dout=dout, **options)


def assert_close(actual, expected, ulps=16):
    """Within ulps of actual's dtype, of the largest expected value."""
    actual = jnp.asarray(actual)
    expected = np.asarray(expected, np.float64).reshape(actual.shape)
    tolerance = ulps * float(jnp.finfo(actual.dtype).eps) * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance)


def rotary(x, positions):
    """Turns pairs (i, i + H/2) of x [T, H] by angles that grow with the position."""
    half = x.shape[-1] // 2
    angle = positions[:, None] / 3.0 ** jnp.arange(half)
    a, b = x[:, :half], x[:, half:]
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=1
    )
