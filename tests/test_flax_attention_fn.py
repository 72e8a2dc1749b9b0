"""jax_cosine_attn.flax.attention_fn inside Flax's own modules, and the package's import."""

import functools
import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen, nnx
from flax_cases import FEATURES, HEAD_DIM, HEADS, B, T, assert_close, formula, normal

from jax_cosine_attn.flax import attention_fn
from jax_cosine_attn.flax.linen import MultiHeadCosineAttention as LinenModule
from jax_cosine_attn.flax.nnx import MultiHeadCosineAttention as NnxModule

pytestmark = pytest.mark.usefixtures("exact_products")

QKV = tuple(normal(B, T, HEADS, HEAD_DIM, seed=i) for i in range(3))


def test_names_every_argument_of_flax_s():
    ours = inspect.signature(attention_fn).parameters
    assert all(p.kind is not p.VAR_KEYWORD for p in ours.values())
    theirs = inspect.signature(linen.dot_product_attention).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    # promote_dtype of the nnx function is nothing that the nnx module passes.
    nnx_names = inspect.signature(nnx.dot_product_attention).parameters.keys()
    assert nnx_names - {"promote_dtype"} <= ours.keys()


class TestInFlaxModules:
    @pytest.mark.parametrize("dtype", [jnp.bool_, jnp.float32], ids=["bool", "float"])
    def test_nnx(self, dtype):
        x = normal(B, T, FEATURES)
        fn = functools.partial(attention_fn, scale=5.0)
        theirs = nnx.MultiHeadAttention(
            HEADS, FEATURES, attention_fn=fn, decode=False, rngs=nnx.Rngs(0)
        )
        ours = NnxModule(HEADS, FEATURES, scale=5.0, rngs=nnx.Rngs(0))
        mask = nnx.make_causal_mask(x[..., 0], dtype=dtype)
        assert_close(theirs(x, mask=mask), ours(x, is_causal=True))
        assert_close(theirs(x, is_causal=True), ours(x, is_causal=True))

    @pytest.mark.parametrize("dtype", [jnp.bool_, jnp.float32], ids=["bool", "float"])
    def test_linen(self, dtype):
        x = normal(B, T, FEATURES)
        theirs = linen.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn)
        variables = theirs.init(jax.random.key(0), x)
        mask = linen.make_causal_mask(x[..., 0], dtype=dtype)
        ours = LinenModule(HEADS, is_causal=True)
        assert_close(theirs.apply(variables, x, mask=mask), ours.apply(variables, x))

    def test_nnx_decode(self):
        x = normal(B, 3, FEATURES)
        module = nnx.MultiHeadAttention(
            HEADS, FEATURES, attention_fn=attention_fn, decode=True, rngs=nnx.Rngs(0)
        )
        module.init_cache(x.shape)
        steps = [module(x[:, i : i + 1]) for i in range(3)]
        whole = module(x, decode=False, is_causal=True)
        assert_close(jnp.concatenate(steps, axis=1), whole)

    def test_linen_decode(self):
        x = normal(B, 3, FEATURES)
        module = linen.MultiHeadAttention(HEADS, attention_fn=attention_fn, decode=True)
        variables, steps = module.init(jax.random.key(0), x), []
        for i in range(3):
            out, cache = module.apply(variables, x[:, i : i + 1], mutable=["cache"])
            steps.append(out)
            variables = {**variables, **cache}
        ours = LinenModule(HEADS, is_causal=True)
        assert_close(jnp.concatenate(steps, axis=1), ours.apply({"params": variables["params"]}, x))

    def test_dropout_raises_only_while_active(self):
        x = normal(B, T, FEATURES)
        module = nnx.MultiHeadAttention(
            HEADS,
            FEATURES,
            dropout_rate=0.1,
            attention_fn=attention_fn,
            decode=False,
            rngs=nnx.Rngs(0),
        )
        assert module(x, deterministic=True).shape == x.shape
        with pytest.raises(NotImplementedError, match="dropout_rate=0.1"):
            module(x, deterministic=False)

    def test_sow_weights_raises(self):
        x = normal(B, T, FEATURES)
        options = {"attention_fn": attention_fn, "decode": False}
        with pytest.raises(NotImplementedError, match="sow_weights"):
            nnx.MultiHeadAttention(HEADS, FEATURES, **options, rngs=nnx.Rngs(0))(
                x, sow_weights=True
            )
        module = linen.MultiHeadAttention(HEADS, attention_fn=attention_fn)
        with pytest.raises(NotImplementedError, match="sow_weights"):
            module.init(jax.random.key(0), x, sow_weights=True)


class TestFunction:
    def test_is_the_formula(self):
        bias = normal(B, HEADS, T, T, seed=3)
        mask = jax.random.bernoulli(jax.random.key(4), 0.7, (B, 1, T, T))
        actual = attention_fn(*QKV, bias, mask, scale=3.0, l2norm_groups=2, local_window_size=4)
        expected = oracle.attention(
            *QKV, bias, mask, scale=3.0, l2norm_groups=2, local_window_size=4
        )
        assert_close(actual, expected.out)

    def test_numeric_mask_is_not_zero(self):
        mask = jnp.array([0.0, 0.5, 1.0, 2.0, 0.0, 1.0, 1.0, 1.0, 0.0])
        expected = formula(*QKV, mask=np.asarray(mask) != 0)
        assert_close(attention_fn(*QKV, mask=mask), expected.out)

    @pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
    def test_leading_dims(self, batch):
        q, k, v = (normal(*batch, T, HEADS, HEAD_DIM, seed=i) for i in range(3))
        bias = normal(*batch, 1, T, T, seed=3)
        actual = attention_fn(q, k, v, bias, is_causal=True)
        assert actual.shape == q.shape
        merged = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v, bias))
        assert_close(actual, attention_fn(*merged, is_causal=True))

    def test_learned_scale(self):
        scale = jnp.array([1.0, 2.0, 30.0, 4.0])
        expected = formula(*QKV, scale=np.array([1.0, 2.0, 10.0, 4.0]))
        assert_close(attention_fn(*QKV, scale=scale, scale_bound=10.0), expected.out)

    def test_dtype(self):
        q, k, v = QKV[0].astype(jnp.bfloat16), QKV[1].astype(jnp.float16), QKV[2]
        assert attention_fn(q, k, v).dtype == linen.dot_product_attention(q, k, v).dtype
        assert attention_fn(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16

    @pytest.mark.parametrize(
        "hook", ["einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"]
    )
    def test_hooks_raise(self, hook):
        with pytest.raises(NotImplementedError, match=hook):
            attention_fn(*QKV, **{hook: jnp.einsum})

    def test_shapes_that_do_not_match_raise(self):
        q, k, v = QKV
        with pytest.raises(ValueError, match="same batch"):
            attention_fn(q, k[:1], v[:1])
        with pytest.raises(ValueError, match=r"mask must broadcast .* \(1, 2, 1, 9, 9\)"):
            attention_fn(q, k, v, mask=jnp.ones((1, B, 1, T, T)))


def test_flax_is_only_imported_on_demand():
    script = """
import sys
import jax_cosine_attn
assert "flax" not in sys.modules
sys.modules["flax"] = None
try:
    import jax_cosine_attn.flax
except ImportError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert "pip install 'jax_cosine_attn[flax]'" in run.stdout
