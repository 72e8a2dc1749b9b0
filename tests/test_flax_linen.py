"""jax_cosine_attn.flax.linen.MultiHeadCosineAttention beside Flax's module."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax_cases import (
    ATTENTION_OPTIONS,
    DECODE_OPTIONS,
    FEATURES,
    HEADS,
    B,
    T,
    assert_close,
    normal,
    rotary,
)

from jax_cosine_attn.flax.linen import MultiHeadCosineAttention
from jax_cosine_attn.flax.nnx import MultiHeadCosineAttention as NnxModule

pytestmark = pytest.mark.usefixtures("exact_products")

Flax = nn.MultiHeadDotProductAttention


def initialised(module, *shape):
    return module.init(jax.random.key(0), normal(*(shape or (B, T, FEATURES))))


# Every attribute of Flax's module, at a value other than its default.
DIFFERENT = {
    "num_heads": 2,
    "dtype": jnp.bfloat16,
    "param_dtype": jnp.bfloat16,
    "qkv_features": 8,
    "out_features": 5,
    "broadcast_dropout": False,
    "dropout_rate": 0.5,
    "deterministic": True,
    "precision": jax.lax.Precision.HIGHEST,
    "kernel_init": nn.initializers.ones_init(),
    "out_kernel_init": nn.initializers.ones_init(),
    "bias_init": nn.initializers.ones_init(),
    "out_bias_init": nn.initializers.ones_init(),
    "use_bias": False,
    "decode": True,
    "normalize_qk": True,
    "force_fp32_for_softmax": True,
    "parent": None,
    "name": None,
}
DOT_GENERALS = {
    "qkv_dot_general",
    "out_dot_general",
    "qkv_dot_general_cls",
    "out_dot_general_cls",
}
REJECTED = {
    "attention_fn": nn.dot_product_attention,
    "qk_attn_weights_einsum_cls": lambda: jnp.einsum,
    "attn_weights_value_einsum_cls": lambda: jnp.einsum,
}


class TestSignature:
    def test_every_attribute_is_known(self):
        theirs = inspect.signature(Flax).parameters
        assert theirs.keys() == DIFFERENT.keys() | DOT_GENERALS | REJECTED.keys()
        ours = inspect.signature(MultiHeadCosineAttention).parameters
        for name in theirs.keys() - {"attention_fn"}:
            assert ours[name].default == theirs[name].default, name

    @pytest.mark.parametrize("name", DIFFERENT)
    def test_attribute_has_its_effect(self, name):
        options = {"num_heads": HEADS, "deterministic": True, name: DIFFERENT[name]}
        ours, theirs = (
            cls(**options).init_with_output(jax.random.key(0), normal(B, T, FEATURES))
            for cls in (MultiHeadCosineAttention, Flax)
        )
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        assert (ours[0].shape, ours[0].dtype) == (theirs[0].shape, theirs[0].dtype)

    @pytest.mark.parametrize("name", sorted(DOT_GENERALS))
    def test_dot_general_is_used(self, name):
        calls = []

        def dot_general(*args, **kwargs):
            calls.append(args)
            return jax.lax.dot_general(*args, **kwargs)

        given = (lambda: dot_general) if name.endswith("cls") else dot_general
        initialised(MultiHeadCosineAttention(HEADS, **{name: given}))
        assert len(calls) == (3 if name.startswith("qkv") else 1)

    @pytest.mark.parametrize("name", REJECTED)
    def test_rejected_attribute_raises(self, name):
        with pytest.raises(NotImplementedError, match=name):
            initialised(MultiHeadCosineAttention(HEADS, **{name: REJECTED[name]}))

    def test_every_call_argument_is_known(self):
        theirs = inspect.signature(Flax.__call__).parameters
        ours = inspect.signature(MultiHeadCosineAttention.__call__).parameters
        assert {n: (p.kind, p.default) for n, p in theirs.items()} == {
            n: (p.kind, p.default) for n, p in ours.items()
        }

    def test_sow_weights_raises(self):
        module = MultiHeadCosineAttention(HEADS)
        with pytest.raises(NotImplementedError, match="sow_weights"):
            module.apply(initialised(module), normal(B, T, FEATURES), sow_weights=True)

    def test_inputs(self):
        module, x, y = MultiHeadCosineAttention(HEADS), normal(B, T, FEATURES), normal(B, 4, 16)
        apply = functools.partial(module.apply, initialised(module))
        np.testing.assert_array_equal(apply(x, y, y), apply(x, y))
        np.testing.assert_array_equal(apply(x, inputs_kv=y), apply(x, y))
        assert jnp.abs(apply(x, y, 2 * y) - apply(x, y)).max() > 0.1
        with pytest.raises(ValueError, match="inputs_kv"):
            apply(x, y, inputs_kv=y)
        with pytest.raises(ValueError, match="inputs_k"):
            apply(x, inputs_v=y)

    def test_heads_that_do_not_divide_raise(self):
        with pytest.raises(ValueError, match="num_kv_heads=3"):
            initialised(MultiHeadCosineAttention(HEADS, num_kv_heads=3))


class TestAttention:
    @pytest.mark.parametrize("options", ATTENTION_OPTIONS.values(), ids=ATTENTION_OPTIONS)
    def test_is_the_nnx_module(self, options):
        module, x = MultiHeadCosineAttention(HEADS, **options), normal(B, T, FEATURES)
        variables = initialised(module)
        twin = NnxModule(HEADS, FEATURES, rngs=nnx.Rngs(0), **options)
        state = nnx.state(twin, nnx.Param)
        nnx.replace_by_pure_dict(state, variables["params"])
        nnx.update(twin, state)
        assert_close(jax.jit(module.apply)(variables, x), nnx.jit(twin)(x))

    def test_mask_with_leading_dims(self):
        module, x = MultiHeadCosineAttention(HEADS), normal(2, 3, T, FEATURES)
        variables = initialised(module, 2, 3, T, FEATURES)
        mask = nn.make_causal_mask(x[..., 0])
        assert mask.dtype == jnp.float32
        causal = MultiHeadCosineAttention(HEADS, is_causal=True)
        assert_close(module.apply(variables, x, mask=mask), causal.apply(variables, x))

    def test_gradient_reaches_the_learned_scale(self):
        module, x = MultiHeadCosineAttention(HEADS, learned_scale=True), normal(B, T, FEATURES)
        variables = initialised(module)
        gradient = jax.grad(lambda v: (module.apply(v, x) ** 2).sum())(variables)
        scale = gradient["params"]["inverse_temperature"]
        assert scale.shape == (HEADS,)
        assert (jnp.abs(scale) > 1e-4).all()

    def test_dropout(self):
        x, module = normal(B, T, FEATURES), MultiHeadCosineAttention(HEADS, dropout_rate=0.5)
        variables = initialised(MultiHeadCosineAttention(HEADS))
        expected = MultiHeadCosineAttention(HEADS).apply(variables, x)
        np.testing.assert_array_equal(module.apply(variables, x, deterministic=True), expected)
        with pytest.raises(NotImplementedError, match="dropout_rate=0.5"):
            module.apply(variables, x, deterministic=False, dropout_rng=jax.random.key(0))
        with pytest.raises(ValueError, match="deterministic"):
            module.apply(variables, x)


class TestDecode:
    @pytest.mark.parametrize(
        "options",
        [*DECODE_OPTIONS.values(), {"rotary": rotary}],
        ids=[*DECODE_OPTIONS, "rotary"],
    )
    def test_prompt_then_steps_are_the_causal_forward(self, options):
        x, batch = normal(B, T, FEATURES), (B, T, FEATURES)
        module = MultiHeadCosineAttention(HEADS, decode=True, **options)
        variables = initialised(module, *batch)
        step = jax.jit(functools.partial(module.apply, mutable=["cache"]))
        outs = []
        for piece in (x[:, :7], x[:, 7:8], x[:, 8:]):
            out, cache = step(variables, piece)
            outs.append(out)
            variables = {**variables, **cache}
        whole = MultiHeadCosineAttention(HEADS, **{**options, "is_causal": True})
        expected = whole.apply({"params": variables["params"]}, x)
        assert_close(jnp.concatenate(outs, axis=1), expected, ulps=32)
        assert variables["cache"]["cache_index"] == T

        out, _ = step(variables, x[:, :1])
        assert jnp.isnan(out).all()

    def test_cache_is_that_of_flax(self):
        def shapes(cls):
            return jax.tree.map(jnp.shape, initialised(cls(HEADS, decode=True))["cache"])

        assert shapes(MultiHeadCosineAttention) == shapes(Flax)

    def test_overflow_raises(self):
        module, x = MultiHeadCosineAttention(HEADS, decode=True), normal(B, T, FEATURES)
        variables = initialised(module)
        _, cache = module.apply(variables, x, mutable=["cache"])
        with pytest.raises(ValueError, match="holds 9 positions: cannot add 1 to 9"):
            module.apply({**variables, **cache}, x[:, :1], mutable=["cache"])
