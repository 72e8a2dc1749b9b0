"""jax_cosine_attn.flax.nnx.MultiHeadCosineAttention beside flax.nnx.MultiHeadAttention."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_cases import (
    ATTENTION_OPTIONS,
    DECODE_OPTIONS,
    FEATURES,
    HEAD_DIM,
    HEADS,
    B,
    T,
    assert_close,
    formula,
    normal,
    rotary,
)
from jax.sharding import PartitionSpec as P

from jax_cosine_attn.flax.nnx import MultiHeadCosineAttention

pytestmark = pytest.mark.usefixtures("exact_products")

SUBLAYERS = ("query", "key", "value", "out", "query_ln", "key_ln")


def make(cls=MultiHeadCosineAttention, **options):
    return cls(HEADS, FEATURES, **{"rngs": nnx.Rngs(0), **options})


def project(module, x, context=None):
    """What goes into the attention of a module without LayerNorm."""
    context = x if context is None else context
    query, key = module.query(x), module.key(context)
    if module.normalize_qk:
        query, key = module.query_ln(query), module.key_ln(key)
    return query, key, module.value(context)


# Every constructor argument of Flax's module, at a value other than its default.
DIFFERENT = {
    "num_heads": 2,
    "in_features": 12,
    "qkv_features": 8,
    "out_features": 5,
    "num_kv_heads": 2,
    "in_kv_features": 7,
    "dtype": jnp.bfloat16,
    "param_dtype": jnp.bfloat16,
    "broadcast_dropout": False,
    "dropout_rate": 0.5,
    "deterministic": True,
    "precision": jax.lax.Precision.HIGHEST,
    "kernel_init": nnx.initializers.ones_init(),
    "out_kernel_init": nnx.initializers.ones_init(),
    "bias_init": nnx.initializers.ones_init(),
    "out_bias_init": nnx.initializers.ones_init(),
    "use_bias": False,
    "decode": True,
    "normalize_qk": True,
    "qkv_promote_dtype": functools.partial(nnx.nn.dtypes.promote_dtype),
    "out_promote_dtype": functools.partial(nnx.nn.dtypes.promote_dtype),
    "ln_promote_dtype": functools.partial(nnx.nn.dtypes.promote_dtype),
    "qkv_dot_general": functools.partial(jax.lax.dot_general),
    "out_dot_general": functools.partial(jax.lax.dot_general),
    "qkv_dot_general_cls": lambda: jax.lax.dot_general,
    "out_dot_general_cls": lambda: jax.lax.dot_general,
    "rngs": nnx.Rngs(1),
    "keep_rngs": False,
    "kernel_metadata": {"note": 1},
    "out_kernel_metadata": {"note": 1},
    "bias_metadata": {"note": 1},
    "out_bias_metadata": {"note": 1},
    "query_ln_scale_metadata": {"note": 1},
    "key_ln_scale_metadata": {"note": 1},
}
# The one argument that raises.
REJECTED = {"attention_fn": nnx.dot_product_attention}


def described(module):
    """Everything Flax's constructor decided: attributes, those of the layers, parameters."""
    description = {}
    for name in (None, *SUBLAYERS):
        layer = module if name is None else getattr(module, name)
        for attribute, value in vars(layer).items() if layer is not None else ():
            if attribute == "attention_fn" or isinstance(value, nnx.Module):
                continue
            if isinstance(value, nnx.Variable):
                metadata = {k: v for k, v in value.get_metadata().items() if "hook" not in k}
                value = (np.asarray(value[...]).tolist(), str(value.dtype), metadata)
            elif attribute.startswith("_"):
                continue
            elif isinstance(value, functools.partial):
                value = id(value)
            elif isinstance(value, nnx.RngStream):
                value = value.tag
            description[name, attribute] = value
    return description


class TestSignature:
    def test_every_constructor_argument_is_known(self):
        theirs = set(inspect.signature(nnx.MultiHeadAttention.__init__).parameters)
        assert theirs == {"self", *DIFFERENT, *REJECTED}

    @pytest.mark.parametrize("name", DIFFERENT)
    def test_constructor_argument_has_its_effect(self, name):
        def build(cls):
            options = {"num_heads": HEADS, "in_features": FEATURES, "normalize_qk": True}
            options |= {"rngs": nnx.Rngs(0), name: DIFFERENT[name]}
            if isinstance(options["rngs"], nnx.Rngs):
                options["rngs"] = nnx.Rngs(1 if name == "rngs" else 0)
            if name == "keep_rngs":
                options["dropout_rate"] = 0.5
            return described(cls(**options))

        ours, theirs = build(MultiHeadCosineAttention), build(nnx.MultiHeadAttention)
        assert {key: ours[key] for key in theirs} == theirs

    def test_constructor_defaults_are_flax_s(self):
        theirs = inspect.signature(nnx.MultiHeadAttention.__init__).parameters
        ours = inspect.signature(MultiHeadCosineAttention.__init__).parameters
        for name in theirs.keys() - {"attention_fn", "bias_init"}:  # bias_init: a new closure
            assert ours[name].default == theirs[name].default, name
            assert ours[name].kind == theirs[name].kind, name

    def test_another_attention_fn_raises(self):
        with pytest.raises(NotImplementedError, match="attention_fn"):
            make(attention_fn=nnx.dot_product_attention)

    def test_every_call_argument_is_known(self):
        theirs = inspect.signature(nnx.MultiHeadAttention.__call__).parameters
        ours = inspect.signature(MultiHeadCosineAttention.__call__).parameters
        assert theirs.keys() <= ours.keys()
        for name, parameter in theirs.items():
            assert ours[name].kind == parameter.kind, name

    def test_sow_weights_raises(self):
        with pytest.raises(NotImplementedError, match="sow_weights"):
            make()(normal(B, T, FEATURES), sow_weights=True)

    def test_shardings_reach_the_projections(self):
        with jax.set_mesh(jax.make_mesh((min(2, jax.device_count()),), ("data",))):
            module = make()
            x = jax.device_put(normal(B, T, FEATURES), P("data"))
            out = module(x, out_sharding=P("data"), qkv_sharding=P("data"))
            assert out.sharding.spec == P("data", None, None)
        assert_close(out, make()(normal(B, T, FEATURES)))


class TestParameters:
    @pytest.mark.parametrize(
        "options",
        [{}, {"normalize_qk": True}, {"num_kv_heads": 2}, {"use_bias": False}, {"out_features": 3}],
        ids=str,
    )
    def test_a_checkpoint_of_flax_s_module_fits(self, options):
        theirs, ours = make(nnx.MultiHeadAttention, **options), make(**options)
        state = nnx.state(make(nnx.MultiHeadAttention, **{**options, "rngs": nnx.Rngs(7)}))
        assert jax.tree.map(jnp.shape, nnx.state(ours)) == jax.tree.map(jnp.shape, state)
        nnx.update(ours, state)
        nnx.update(theirs, state)
        np.testing.assert_array_equal(ours.key.kernel[...], theirs.key.kernel[...])

    def test_learned_scale_is_the_only_addition(self):
        ours = nnx.to_pure_dict(nnx.state(make(learned_scale=True, scale=5.0)))
        scale = ours.pop("inverse_temperature")
        assert ours.keys() == nnx.to_pure_dict(nnx.state(make())).keys()
        assert scale.dtype == jnp.float32
        np.testing.assert_array_equal(scale, [5.0] * HEADS)


class TestAttention:
    @pytest.mark.parametrize("options", ATTENTION_OPTIONS.values(), ids=ATTENTION_OPTIONS)
    def test_is_the_formula(self, options):
        module, x = make(**options), normal(B, T, FEATURES)
        expected = formula(*project(module, x), **options).out
        assert_close(module(x), module.out(jnp.asarray(expected, jnp.float32)))

    @pytest.mark.parametrize("dtype", [jnp.bool_, jnp.float32], ids=["bool", "float"])
    @pytest.mark.parametrize("shape", [(B, 1, 1, T), (T, T), (B, HEADS, T, T)], ids=str)
    def test_mask(self, shape, dtype):
        module, x = make(), normal(B, T, FEATURES)
        mask = jax.random.bernoulli(jax.random.key(1), 0.6, shape)
        expected = formula(*project(module, x), mask=mask).out
        assert_close(
            module(x, mask=mask.astype(dtype)), module.out(jnp.asarray(expected, jnp.float32))
        )

    def test_cross_attention(self):
        module = make(in_kv_features=6, is_causal=True)
        x, context = normal(B, 4, FEATURES), normal(B, T, 6, seed=1)
        expected = formula(*project(module, x, context), is_causal=True).out
        assert_close(module(x, context), module.out(jnp.asarray(expected, jnp.float32)))

    def test_values_from_other_inputs(self):
        module, x = make(), normal(B, T, FEATURES)
        np.testing.assert_array_equal(module(x, x, x), module(x))
        assert jnp.abs(module(x, x, 2 * x) - module(x)).max() > 0.1
        with pytest.raises(ValueError, match="inputs_k"):
            module(x, inputs_v=x)

    @pytest.mark.parametrize("batch", [(), (2, 3), (2, 1, 3)], ids=str)
    @pytest.mark.parametrize("per_batch", [False, True], ids=["one-mask", "mask-each"])
    def test_leading_dims(self, batch, per_batch):
        module, x = make(is_causal=True), normal(*batch, T, FEATURES)
        lead = batch if per_batch else (1,) * len(batch)
        mask = jax.random.bernoulli(jax.random.key(1), 0.6, (*lead, 1, T, T))
        flat_mask = mask.reshape(-1, 1, T, T)
        expected = module(x.reshape(-1, T, FEATURES), mask=flat_mask).reshape(x.shape)
        assert_close(module(x, mask=mask), expected)

    def test_call_s_is_causal_overrides_the_module_s(self):
        x = normal(B, T, FEATURES)
        assert_close(make(is_causal=True)(x, is_causal=False), make()(x))
        assert_close(make()(x, is_causal=True), make(is_causal=True)(x))

    def test_wrong_features_raise(self):
        with pytest.raises(ValueError, match="in_features=16"):
            make()(normal(B, T, 5))

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["f16", "bf16"])
    def test_half_precision(self, dtype):
        module, x = make(dtype=dtype, is_causal=True, learned_scale=True), normal(B, T, FEATURES)
        out = module(x)
        assert out.dtype == dtype
        expected = formula(*project(module, x), is_causal=True).out
        assert_close(out, module.out(jnp.asarray(expected, dtype)), ulps=4)

    @pytest.mark.parametrize("param_dtype", [jnp.float16, jnp.float32], ids=["f16", "f32"])
    def test_inferred_dtype_is_flax_s(self, param_dtype):
        x = normal(B, T, FEATURES, dtype=jnp.float16)
        theirs = make(nnx.MultiHeadAttention, param_dtype=param_dtype, decode=False)
        assert make(param_dtype=param_dtype)(x).dtype == param_dtype == theirs(x).dtype


class TestDropout:
    def test_active_dropout_raises(self):
        x = normal(B, T, FEATURES)
        with pytest.raises(NotImplementedError, match="dropout_rate=0.5"):
            make(dropout_rate=0.5, deterministic=False)(x)
        with pytest.raises(NotImplementedError, match="dropout_rate=0.5"):
            make(dropout_rate=0.5, deterministic=True)(x, deterministic=False, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="deterministic"):
            make(dropout_rate=0.5)(x)

    def test_inactive_dropout_changes_nothing(self):
        x, expected = normal(B, T, FEATURES), make()(normal(B, T, FEATURES))
        for module, call in [
            (make(dropout_rate=0.5, deterministic=True), {}),
            (make(dropout_rate=0.5), {"deterministic": True}),
            (make(), {"deterministic": False, "rngs": nnx.Rngs(0)}),
        ]:
            np.testing.assert_array_equal(module(x, **call), expected)


class TestLearnedScale:
    def test_gradient(self):
        module, x = make(learned_scale=True), normal(B, T, FEATURES)
        module.inverse_temperature[...] = jnp.array([2.0, 8.0, -3.0, 59.0])
        weights = normal(B, T, FEATURES, seed=1)

        @nnx.jit
        def gradient(module, x):
            return nnx.grad(lambda module: (module(x) * weights).sum())(module)

        actual = gradient(module, x).inverse_temperature[...]
        dout = jnp.einsum("btf,nhf->btnh", weights, module.out.kernel[...])
        expected = formula(*project(module, x), scale=module.inverse_temperature[...], dout=dout)
        assert_close(actual, expected.dscale, ulps=64)

    @pytest.mark.parametrize(
        ("dtype", "groups", "bound"), [("float16", 2, 5.5), ("float32", 1, 60), ("bfloat16", 2, 30)]
    )
    def test_is_clamped(self, dtype, groups, bound):
        module = make(learned_scale=True, scale=2.0, l2norm_groups=groups, dtype=dtype)
        x = normal(B, T, FEATURES)
        module.inverse_temperature[...] = jnp.full(HEADS, bound)
        expected = module(x)
        module.inverse_temperature[...] = jnp.full(HEADS, 2.0 * bound)
        np.testing.assert_array_equal(module(x), expected)
        module.inverse_temperature[...] = jnp.full(HEADS, bound / 2)
        assert (module(x) != expected).any()

    def test_a_start_beyond_the_bound_raises(self):
        with pytest.raises(ValueError, match=r"\[-5.5, 5.5\] for float16 .* scale=8"):
            make(learned_scale=True, l2norm_groups=2, dtype="float16")(normal(B, T, FEATURES))


def in_chunks(module, x, chunks, **call):
    """The output of positions that pass through the decode cache chunk by chunk."""
    pieces = jnp.split(x, np.cumsum(chunks)[:-1], axis=-2)
    return jnp.concatenate([module(piece, decode=True, **call) for piece in pieces], axis=-2)


class TestDecode:
    @pytest.mark.parametrize("options", DECODE_OPTIONS.values(), ids=DECODE_OPTIONS)
    def test_prompt_then_steps_are_the_causal_forward(self, options):
        module, x = make(**options), normal(B, T, FEATURES)
        module.init_cache(x.shape)
        assert_close(in_chunks(module, x, (7, 1, 1)), module(x, is_causal=True))
        assert module.cache_index[...] == T

    def test_rotary_goes_before_the_cache(self):
        module, x = make(rotary=rotary, num_kv_heads=2), normal(2, 1, T, FEATURES)
        module.init_cache(x.shape)
        assert_close(in_chunks(module, x, (4, 4, 1)), module(x, is_causal=True), ulps=32)

    def test_mask_is_combined(self):
        module, x = make(), normal(B, T, FEATURES)
        padding = jnp.arange(T) >= jnp.array([0, 3])[:, None]  # left padding
        mask = padding[:, None, None, :]
        module.init_cache(x.shape)
        expected = module(x, mask=mask, is_causal=True)
        assert_close(in_chunks(module, x, (7, 1, 1), mask=mask), expected)

    def test_longer_cache_than_used(self):
        module, x = make(), normal(B, T, FEATURES)
        module.init_cache((B, 3 * T, FEATURES))
        module.cached_value[...] = jnp.full_like(module.cached_value[...], jnp.nan)
        assert_close(in_chunks(module, x, (T,)), module(x, is_causal=True))

    def test_jitted_half_precision(self):
        module, x = make(dtype=jnp.bfloat16), normal(B, T, FEATURES, dtype=jnp.bfloat16)
        module.init_cache(x.shape)
        assert module.cached_key.dtype == jnp.bfloat16
        step = nnx.jit(lambda module, x: module(x, decode=True))
        outs = [step(module, x[:, :7])] + [step(module, x[:, i : i + 1]) for i in (7, 8)]
        assert_close(jnp.concatenate(outs, axis=1), module(x, is_causal=True), ulps=4)

    def test_cache_dtype_other_than_the_module_s(self):
        module, x = make(dtype=jnp.bfloat16), normal(B, T, FEATURES, dtype=jnp.bfloat16)
        module.init_cache(x.shape, jnp.float32)
        out = in_chunks(module, x, (5, 4))
        assert out.dtype == jnp.bfloat16
        assert_close(out, module(x, is_causal=True), ulps=4)

    def test_holds_normalised_keys(self):
        module, x = make(num_kv_heads=2), normal(B, T, FEATURES)
        module.init_cache(x.shape)
        module(x[:, :5], decode=True)
        norms = jnp.linalg.norm(module.cached_key[...], axis=-1)
        assert_close(norms[:, :5], np.ones((B, 5, 2)))
        assert not norms[:, 5:].any()

    def test_needs_no_mask_over_the_cache(self):
        module, x = make(rotary=rotary), normal(B, 1, FEATURES)
        module.init_cache((B, 1000, FEATURES))
        graphdef, state = nnx.split(module)

        def operands(**call):
            def step(state, x):
                return nnx.merge(graphdef, state)(x, decode=True, **call)

            return set(re.findall(r"fields=\((.*?)\)", str(jax.make_jaxpr(step)(state, x))))

        (names,) = operands()
        assert "'kv_lengths'" in names
        assert "'mask'" not in names
        assert all("'mask'" in names for names in operands(mask=jnp.ones((1, 1, 1, 1000), bool)))

    def test_overflow(self):
        module, x = make(), normal(B, T, FEATURES)
        module.init_cache(x.shape)
        step = nnx.jit(lambda module, x: module(x, decode=True))
        assert jnp.isfinite(step(module, x)).all()
        with pytest.raises(ValueError, match="holds 9 positions: cannot add 1 to 9"):
            module(x[:, :1], decode=True)
        assert jnp.isnan(step(module, x[:, :1])).all()
        with pytest.raises(ValueError, match="holds 9 positions: cannot add 18"):
            step(module, jnp.concatenate([x, x], axis=1))

    def test_wrong_use_raises(self):
        module, x = make(decode=True), normal(B, T, FEATURES)
        with pytest.raises(ValueError, match="init_cache"):
            module(x)
        module.init_cache(x.shape)
        with pytest.raises(ValueError, match="made for keys"):
            module(x[:1])
        with pytest.raises(ValueError, match="one key per query"):
            module(x, x[:, :4])


class TestRotary:
    def test_positions_count_from_the_sequence(self):
        module, x = make(rotary=rotary), normal(B, T, FEATURES)
        assert_close(module(x, input_positions=jnp.arange(T)), module(x))
        each = jnp.stack([jnp.arange(T), jnp.arange(T) * 3])
        expected = [module(x[i : i + 1], input_positions=each[i]) for i in range(B)]
        assert_close(module(x, input_positions=each), jnp.concatenate(expected))
        assert jnp.abs(module(x, input_positions=each)[1] - module(x)[1]).max() > 1e-3

    def test_is_the_formula_between_norm_and_attention(self):
        module, x = make(rotary=rotary), normal(B, T, FEATURES)
        query, key, value = project(module, x)
        turn = jax.vmap(jax.vmap(rotary, (-2, None), -2), (0, None))
        turned = (
            turn(y / jnp.linalg.norm(y, axis=-1, keepdims=True), jnp.arange(T))
            for y in (query, key)
        )
        expected = formula(*turned, value, l2norm_qk=False).out
        assert_close(module(x), module.out(jnp.asarray(expected, jnp.float32)), ulps=32)

    def test_fewer_queries_stand_at_the_end(self):
        module, x = make(rotary=rotary, is_causal=True), normal(B, T, FEATURES)
        assert_close(module(x[:, -3:], x), module(x)[:, -3:])
        with pytest.raises(ValueError, match="as many queries as keys"):
            module(x[:, -3:], x, input_positions=jnp.arange(3))

    def test_positions_without_rotary_raise(self):
        with pytest.raises(ValueError, match="rotary is None"):
            make()(normal(B, T, FEATURES), input_positions=jnp.arange(T))


def test_gradient_of_all_parameters():
    module, x = make(is_causal=True), normal(B, T, FEATURES)
    weights = normal(B, T, FEATURES, seed=1)
    gradient = nnx.grad(lambda module: (module(x) * weights).sum())(module)
    dout = jnp.einsum("btf,nhf->btnh", weights, module.out.kernel[...])
    expected = formula(*project(module, x), is_causal=True, dout=dout)
    for name, dy in [("query", expected.dq), ("key", expected.dk), ("value", expected.dv)]:
        kernel = np.einsum("btf,btnh->fnh", np.asarray(x, np.float64), dy)
        assert_close(gradient[name].kernel[...], kernel, ulps=64)
    assert gradient["query"].kernel.shape == (FEATURES, HEADS, HEAD_DIM)
