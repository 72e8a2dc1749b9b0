"""What a call compiles to for CUDA, from any machine: no GPU and no compiled kernels needed."""

import math
import re
import types

import jax
import jax.numpy as jnp
import pytest

from jax_cosine_attn import _ffi, cosine_attention, flash_cosine_sim_attention, why_not

B, T, S, N, K, H = 2, 5, 7, 4, 2, 8


@pytest.fixture
def kernels(monkeypatch):
    """A build with kernels; lowering only names their targets."""
    monkeypatch.setattr(_ffi, "build_problem", lambda: None)


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(_ffi, "build_problem", lambda: "built without CUDA kernels")


def arrays(dtype=jnp.bfloat16):
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


def lowered(f, *args, platform="cuda"):
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def calls(text, target):
    """The custom calls of `target`, one line each."""
    return re.findall(rf"stablehlo\.custom_call @{target}\(.*", text)


def attributes(call):
    return dict(re.findall(r"(\w+) = ([^,}]+)", re.search(r"config = \{(.*?)\}", call)[1]))


def signature(call):
    """Types of the operands and of the results."""
    operands, results = call.rsplit(" : ", 1)[1].split(" -> ")
    return re.findall(r"tensor<(\S+?)>", operands), re.findall(r"tensor<(\S+?)>", results)


def grad(f, argnums):
    return jax.grad(lambda *args: f(*args).astype(jnp.float32).sum(), argnums)


def test_forward(kernels):
    text = lowered(lambda q, k, v: cosine_attention(q, k, v, is_causal=True), *arrays())
    (call,) = calls(text, "jax_cosine_attn_fwd")
    operands, results = signature(call)
    assert operands[:4] == ["2x5x4x8xbf16", "2x7x2x8xbf16", "2x7x2x8xbf16", "1x1xf32"]
    assert results[:2] == ["2x5x4x8xbf16", "2x4x5xf32"]
    found = attributes(call)
    assert (found["left"], found["right"]) == (f"{1 << 30} : i32", "0 : i32")
    assert found["heads_first"] == "false"
    assert found["l2norm_qk"] == "true"
    assert found["groups"] == "1 : i32"
    assert found["three_passes"] == "false"


def test_attributes_follow_the_arguments(kernels):
    text = lowered(
        lambda q, k, v: cosine_attention(
            q, k, v, l2norm_qk=False, l2norm_groups=2, scale=5.0, precision="highest"
        ),
        *arrays(jnp.float32),
    )
    (call,) = calls(text, "jax_cosine_attn_fwd")
    found = attributes(call)
    assert found["l2norm_qk"] == "false"
    assert found["groups"] == "2 : i32"
    assert found["three_passes"] == "true"


def test_backward(kernels):
    f = grad(lambda q, k, v: cosine_attention(q, k, v), (0, 1, 2))
    text = lowered(f, *arrays())
    assert len(calls(text, "jax_cosine_attn_fwd")) == 1
    (call,) = calls(text, "jax_cosine_attn_bwd")
    operands, results = signature(call)
    assert operands[:3] == ["2x5x4x8xbf16", "2x7x2x8xbf16", "2x7x2x8xbf16"]
    assert results[:3] == ["2x5x4x8xbf16", "2x7x2x8xbf16", "2x7x2x8xbf16"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=str)
def test_scratch_of_the_backward(kernels, dtype):
    """4 bytes for an element of dq, and 48 for a row of q, k or v: q^ and k^ stand in dq and dk."""
    shape = (B, 256, N, 64)
    f = grad(lambda q, k, v: cosine_attention(q, k, v, is_causal=True), (0, 1, 2))
    (call,) = calls(lowered(f, *[jax.ShapeDtypeStruct(shape, dtype)] * 3), "jax_cosine_attn_bwd")
    sizes = {"f32": 4, "f16": 2, "bf16": 2, "i32": 4, "ui32": 4, "ui8": 1}

    def size(tensor):
        *dims, element = tensor.split("x")
        return math.prod(map(int, dims)) * sizes[element]

    scratch = sum(map(size, signature(call)[1][3:]))
    assert scratch <= 4 * math.prod(shape) + 48 * math.prod(shape[:3])


def test_padding_masks_and_lengths(kernels):
    def f(q, k, v, mask, lengths):
        return cosine_attention(
            q, k, v, mask=mask, query_seq_lengths=lengths, key_value_seq_lengths=lengths
        )

    mask = jax.ShapeDtypeStruct((B, 1, 1, S), bool)
    text = lowered(f, *arrays(), mask, jax.ShapeDtypeStruct((B,), jnp.int32))
    (call,) = calls(text, "jax_cosine_attn_fwd")
    operands, _ = signature(call)
    assert operands[4:] == ["0xi32", "0xi32", "2x1x1x7xi1", "2xi32", "2xi32", "0xi32", "0xi32"]


def test_biases_masks_segments_and_windows_are_passed_as_given(kernels):
    """Broadcast axes stay of size 1, and gradients have the operand's shape."""
    operands = {
        "bias": jax.ShapeDtypeStruct((N, 1, S), jnp.float16),
        "relative_bias": jax.ShapeDtypeStruct((1, T + S - 1), jnp.float32),
        "mask": jax.ShapeDtypeStruct((1, 1, T, 1), bool),
        "segment_ids": tuple(jax.ShapeDtypeStruct((B, x), jnp.int32) for x in (T, S)),
    }

    def loss(differentiable, q, k, v, rest):
        out = cosine_attention(q, k, v, **differentiable, **rest, local_window_size=(3, None))
        return out.astype(jnp.float32).sum()

    differentiable = {name: operands.pop(name) for name in ("bias", "relative_bias")}
    text = lowered(jax.grad(loss), differentiable, *arrays(), operands)
    passed = ["1x4x1x7xf16", "1x1x11xf32", "1x1x5x1xi1", "0xi32", "0xi32", "2x5xi32", "2x7xi32"]
    for target in ("jax_cosine_attn_fwd", "jax_cosine_attn_bwd"):
        (call,) = calls(text, target)
        found = attributes(call)
        assert signature(call)[0][4:11] == passed
        assert (found["left"], found["right"]) == ("3 : i32", f"{1 << 30} : i32")
        assert found["unbounded"] == "true"
    assert signature(call)[1][3:6] == ["0xf32", "1x4x1x7xf32", "1x1x11xf32"]


def test_vmap_merges_into_one_call_and_repeats_nothing(kernels):
    """q mapped: batch 2 * 3; keys shared by the instances keep their own batch."""

    def f(q, k, v):
        return jax.vmap(cosine_attention, (0, None, None))(q, k, v)

    q, k, v = arrays()
    text = lowered(f, jax.ShapeDtypeStruct((3, *q.shape), q.dtype), k, v)
    (call,) = calls(text, "jax_cosine_attn_fwd")
    operands, results = signature(call)
    assert operands[:3] == ["6x5x4x8xbf16", "2x7x2x8xbf16", "2x7x2x8xbf16"]
    assert results[:2] == ["6x5x4x8xbf16", "6x4x5xf32"]
    assert "[1, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1]" in call
    made = re.findall(r"stablehlo\.(?:broadcast|gather|concatenate).*-> tensor<(.*)x7x2x8x", text)
    assert set(made) <= {"2", "2x1"}


def test_vmap_of_grad(kernels):
    q, k, v = (jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in arrays())
    text = lowered(jax.vmap(grad(cosine_attention, (0, 1, 2))), q, k, v)
    (call,) = calls(text, "jax_cosine_attn_bwd")
    _, results = signature(call)
    assert results[:3] == ["6x5x4x8xbf16", "6x7x2x8xbf16", "6x7x2x8xbf16"]


def test_learned_scale_is_an_operand_with_a_gradient(kernels):
    def f(q, k, v, scale):
        return cosine_attention(q, k, v, scale=scale, scale_bound=11.0)

    scale = jax.ShapeDtypeStruct((N,), jnp.float32)
    (call,) = calls(lowered(grad(f, (0, 3)), *arrays(), scale), "jax_cosine_attn_bwd")
    operands, results = signature(call)
    assert operands[3] == "1x4xf32"
    assert results[3] == "1x4xf32"
    (call,) = calls(lowered(grad(f, 0), *arrays(), scale), "jax_cosine_attn_bwd")
    assert signature(call)[1][3] == "0xf32"


def test_original_layout_is_passed_through_without_transposes(kernels):
    q, k, v = (
        jax.ShapeDtypeStruct((x.shape[0], x.shape[2], x.shape[1], H), x.dtype) for x in arrays()
    )
    text = lowered(grad(flash_cosine_sim_attention, (0, 1, 2)), q, k, v)
    for target in ("jax_cosine_attn_fwd", "jax_cosine_attn_bwd"):
        (call,) = calls(text, target)
        assert attributes(call)["heads_first"] == "true"
        assert signature(call)[0][:3] == ["2x4x5x8xbf16", "2x2x7x8xbf16", "2x2x7x8xbf16"]
    assert "transpose" not in text


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize(("perturbed", "dbias"), [(0, False), ((0, 3), True)])
def test_constant_bias_computes_no_dbias(platform, perturbed, dbias):

    def f(q, k, v, bias):
        return cosine_attention(q, k, v, bias)

    bias = jax.ShapeDtypeStruct((1, N, T, S), jnp.float16)  # the one array of this dtype
    jaxpr = str(jax.make_jaxpr(grad(f, perturbed))(*arrays(jnp.float32), bias))
    assert ("wanted=('bias',)" in jaxpr) is dbias
    text = lowered(grad(f, perturbed), *arrays(jnp.float32), bias, platform=platform)
    assert ("(tensor<1x4x5x7xf32>) -> tensor<1x4x5x7xf16>" in text) is dbias


# Choice of implementation.


@pytest.mark.parametrize("implementation", [None, ("cuda", "xla"), ("xla", "cuda"), "xla"])
def test_blockwise_where_there_are_no_kernels(no_kernels, implementation):
    f = grad(lambda q, k, v: cosine_attention(q, k, v, implementation=implementation), (0, 1, 2))
    text = lowered(f, *arrays())
    assert "jax_cosine_attn" not in text
    assert "stablehlo.while" in text or "stablehlo.dot_general" in text


def test_cuda_without_kernels_is_an_error(no_kernels):
    with pytest.raises(NotImplementedError, match="built without CUDA kernels"):
        lowered(lambda q, k, v: cosine_attention(q, k, v, implementation="cuda"), *arrays())


def test_cuda_for_another_platform_is_an_error_when_lowered(kernels):
    traced = jax.jit(lambda q, k, v: cosine_attention(q, k, v, implementation="cuda")).trace(
        *arrays()
    )
    assert "jax_cosine_attn_fwd" in traced.lower(lowering_platforms=("cuda",)).as_text()
    with pytest.raises(NotImplementedError, match="can only be lowered for CUDA"):
        traced.lower(lowering_platforms=("cpu",))


def test_one_program_for_several_platforms(kernels):
    traced = jax.jit(grad(cosine_attention, (0, 1, 2))).trace(*arrays())
    text = traced.lower(lowering_platforms=("cpu", "cuda")).as_text()
    assert calls(text, "jax_cosine_attn_fwd")
    assert calls(text, "jax_cosine_attn_bwd")
    assert "stablehlo.dot_general" in text


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_reference_as_the_fallback_of_cuda(kernels, platform):
    f = grad(lambda q, k, v: cosine_attention(q, k, v, implementation=("cuda", "reference")), 0)
    text = lowered(f, *arrays(), platform=platform)
    assert bool(calls(text, "jax_cosine_attn_fwd")) is (platform == "cuda")
    assert bool(calls(text, "jax_cosine_attn_bwd")) is (platform == "cuda")


def test_reference_where_cuda_refuses(kernels):
    def f(q, k, v):
        return cosine_attention(q, k, v, implementation=("cuda", "reference", "xla"))

    with jax.enable_x64(True):
        text = lowered(f, *arrays(jnp.float64))
    assert "jax_cosine_attn" not in text


@pytest.mark.parametrize(
    ("dtype", "options", "unbounded", "shift"),
    [
        (jnp.float16, {"scale": 11.0}, False, 0),
        (jnp.float16, {"scale": 11.5}, True, 0),
        (jnp.bfloat16, {"scale": 8.0, "l2norm_groups": 2}, False, 0),
        (jnp.bfloat16, {"scale": 60.0}, False, 20),
        (jnp.bfloat16, {"scale": 64.0}, True, 0),
        (jnp.float32, {"scale": 60.0}, False, 20),
        (jnp.float32, {"scale": -32.0, "l2norm_groups": 2}, True, 0),
        (jnp.float32, {"scale": jax.ShapeDtypeStruct((N,), jnp.float32)}, True, 0),
        (jnp.float32, {"scale": jnp.ones(N), "scale_bound": 9.0}, False, 0),
    ],
)
def test_bound_decides_about_the_running_maximum(kernels, dtype, options, unbounded, shift):
    arguments = {"scale": 8.0} | options
    scale = arguments.pop("scale")

    def f(q, k, v, *learned):
        given = learned[0] if learned else scale
        return cosine_attention(q, k, v, scale=given, **arguments)

    learned = () if isinstance(scale, float) else (scale,)
    (call,) = calls(lowered(f, *arrays(dtype), *learned), "jax_cosine_attn_fwd")
    found = attributes(call)
    assert found["unbounded"] == str(unbounded).lower()
    assert float(found["shift"].split(" :")[0]) == shift


@pytest.mark.parametrize(
    ("scale", "dtype"), [(16.0, "f16"), (17.0, "bf16"), (100.0, "bf16")], ids=str
)
def test_unit_rows_of_bfloat16_inputs(kernels, scale, dtype):
    """float16 keeps more of them, up to the scale where the backward's bfloat16 must agree."""
    text = lowered(lambda *x: cosine_attention(*x, scale=scale), *arrays(jnp.bfloat16))
    (call,) = calls(text, "jax_cosine_attn_fwd")
    assert all(shape.endswith(f"x{dtype}") for shape in signature(call)[1][3:5])


def splits_of(q, k, **options):
    """Of the decode kernel in the call for these (shape, dtype); 0: the normal forward."""
    arrays = tuple(jax.ShapeDtypeStruct(*x) for x in (q, k, k))
    traced = {"bias": options.pop("bias")} if "bias" in options else {}
    text = lowered(lambda q, k, v, x: cosine_attention(q, k, v, **x, **options), *arrays, traced)
    (call,) = calls(text, "jax_cosine_attn_fwd")
    return int(attributes(call)["splits"].split(" :")[0]), signature(call)[1]


@pytest.mark.parametrize(
    ("b", "t", "s", "n", "k", "h", "splits"),
    [
        (1, 1, 4096, 32, 8, 128, 32),  # two CTAs on each of 128 SMs
        (1, 1, 32_768, 32, 8, 128, 32),
        (1, 1, 131_072, 32, 8, 128, 33),  # and of 132
        (8, 1, 32_768, 32, 8, 128, 4),
        (64, 1, 4096, 32, 8, 128, 1),
        (64, 1, 131_072, 32, 8, 128, 17),  # 33 waves
        (40, 1, 512, 32, 8, 128, 2),  # three waves of CTAs of 256 keys, not two of 512
        (1, 1, 129, 32, 8, 128, 2),  # of 128 and 1
        (1, 1, 128, 32, 8, 128, 1),
        (1, 1, 127, 32, 8, 128, 0),
        (1, 16, 512, 32, 8, 256, 4),  # 64 packed rows
        (1, 17, 512, 8, 8, 128, 0),
        (1, 16, 512, 40, 8, 128, 0),
        (1, 1, 512, 8, 8, 8, 4),
        (1, 1, 512, 8, 8, 100, 0),
    ],
)
def test_few_queries_against_many_keys_are_split(kernels, b, t, s, n, k, h, splits):
    q, keys = ((b, t, n, h), jnp.bfloat16), ((b, s, k, h), jnp.bfloat16)
    found, results = splits_of(q, keys)
    assert found == splits
    q_hat, k_hat, partials = *results[3:5], results[-1]
    if splits:
        assert (q_hat, k_hat) == (f"{b}x{n}x0x{h}xf16", f"{b}x{k}x0x{h}xf16")
    else:
        assert q_hat.startswith(f"{b}x{n}x{t}x") and k_hat.startswith(f"{b}x{k}x{s}x")
    assert partials == (f"{b}x{n}x{t}x{splits}x{h + 4}xf32" if splits > 1 else "0xf32")


def test_entries_that_may_differ_in_length_are_split_further(kernels):
    q, keys = ((8, 1, 32, 128), jnp.bfloat16), ((8, 131_072, 8, 128), jnp.bfloat16)
    assert splits_of(q, keys)[0] == 4
    lengths = jnp.array([131_072, *range(1, 8)], jnp.int32)
    assert splits_of(q, keys, key_value_seq_lengths=lengths)[0] == 50


@pytest.mark.parametrize(
    ("dtype", "options", "is_split"),
    [
        (jnp.float16, {"scale": 11.0}, True),
        (jnp.float16, {"scale": 12.0}, False),
        (jnp.bfloat16, {"is_causal": True, "local_window_size": 100}, True),
        (jnp.bfloat16, {"l2norm_groups": 2}, False),
        (jnp.bfloat16, {"l2norm_groups": 2, "l2norm_qk": False}, True),
        (jnp.bfloat16, {"bias": jax.ShapeDtypeStruct((1, 1, 1, 512), jnp.float32)}, False),
        (jnp.float32, {}, False),
    ],
)
def test_what_decode_takes(kernels, dtype, options, is_split):
    found, _ = splits_of(((1, 1, 8, 64), dtype), ((1, 512, 2, 64), dtype), **options)
    assert found == (4 if is_split else 0)


def test_biases_of_float64_are_rounded_on_their_way(kernels):
    """As numbers of float32 logits; the gradient has the dtype that was given."""
    with jax.enable_x64(True):
        biases = {
            "bias": jax.ShapeDtypeStruct((N, 1, S), jnp.float64),
            "relative_bias": jax.ShapeDtypeStruct((N, T + S - 1), jnp.float64),
        }
        q, k, v = arrays()
        assert why_not("cuda", q, k, v, **biases) is None

        def loss(biases, q, k, v):
            out = cosine_attention(q, k, v, **biases, implementation="cuda")
            return out.astype(jnp.float32).sum()

        text = lowered(jax.grad(loss), biases, q, k, v)
        assert jax.eval_shape(jax.grad(loss), biases, q, k, v) == biases
    for target in ("jax_cosine_attn_fwd", "jax_cosine_attn_bwd"):
        (call,) = calls(text, target)
        assert signature(call)[0][4:6] == ["1x4x1x7xf32", "1x4x11xf32"]


def test_what_the_kernels_do_not_do(kernels):
    """Named by "cuda" and by why_not; the others do it."""
    with jax.enable_x64(True):
        q, k, v = arrays(jnp.float64)
        reason = "the CUDA kernels do not support float64"
        assert why_not("cuda", q, k, v) == reason
        for implementation in ("xla", "reference", None):
            assert why_not(implementation, q, k, v) is None
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(lambda *a: cosine_attention(*a, implementation="cuda"), q, k, v)
        assert "jax_cosine_attn" not in lowered(cosine_attention, q, k, v)


# Deterministic gradients: an attribute of the backward, and scratch for sums in a fixed order.


def backward_of(options, **static):
    """The backward call for gradients of q, k, v and all of options."""
    q, k, v = arrays()

    def loss(tensors, options):
        return cosine_attention(*tensors, **options, **static).astype(jnp.float32).sum()

    (call,) = calls(lowered(jax.grad(loss, (0, 1)), (q, k, v), options), "jax_cosine_attn_bwd")
    return attributes(call), signature(call)[1]


@pytest.mark.parametrize(
    ("precision", "three_passes"),
    [(None, "false"), ("high", "false"), ("tensorfloat32", "false"), ("float32", "true")],
    ids=str,
)
def test_precision_of_float32_products(kernels, precision, three_passes):
    """As jax.lax.Precision says for GPUs: TF32 unless float32 itself is asked for."""
    text = lowered(lambda *x: cosine_attention(*x, precision=precision), *arrays(jnp.float32))
    (call,) = calls(text, "jax_cosine_attn_fwd")
    assert attributes(call)["three_passes"] == three_passes


def test_small_bias_gradients_are_summed_in_float64(kernels):
    """Two float32 each, where many pairs share an entry."""
    for shape, scratch in [
        ((N, T, S), "0xf32"),
        ((N, T, 1), f"{2 * N * T}xf32"),
        ((1, 1), "2xf32"),
    ]:
        _, results = backward_of({"bias": jax.ShapeDtypeStruct(shape, jnp.float32)})
        assert results[-2] == scratch


def test_deterministic_is_passed_on(kernels):
    found, results = backward_of({}, deterministic=True)
    assert (found["deterministic"], found["unbounded"]) == ("true", "true")
    assert results[-3:] == ["0xf32"] * 3
    found, results = backward_of({})
    assert (found["deterministic"], found["unbounded"]) == ("false", "false")
    assert results[-3:] == ["0xf32"] * 3


def test_xla_flags_ask_for_deterministic_kernels(kernels, monkeypatch):
    for flags, deterministic in [
        ("--xla_gpu_deterministic_ops=true", True),
        ("--xla_gpu_deterministic_ops", True),
        ("--xla_gpu_exclude_nondeterministic_ops=1", True),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", False),
        ("--xla_gpu_deterministic_ops=false", False),
        ("--xla_cpu_multi_thread_eigen=false", False),
    ]:
        monkeypatch.setenv("XLA_FLAGS", flags)
        found, _ = backward_of({})
        assert found["deterministic"] == str(deterministic).lower(), flags


@pytest.mark.parametrize("deterministic", [False, True])
def test_partial_sums_of_scale_in_both_modes(kernels, deterministic):
    scale = jax.ShapeDtypeStruct((N,), jnp.float32)
    _, results = backward_of({"scale": scale}, scale_bound=11.0, deterministic=deterministic)
    assert results[-3:] == ["2x4x1xf32", "0xf32", "0xf32"]


def test_partial_sums_of_biases(kernels):
    options = {
        "bias": jax.ShapeDtypeStruct((N, 1, S), jnp.float16),
        "relative_bias": jax.ShapeDtypeStruct((1, T + S - 1), jnp.float32),
    }
    _, results = backward_of(options, deterministic=True)
    # Two batch entries add to each block of dbias; relative_bias has one diagonal of blocks.
    assert results[-3:] == ["0xf32", "2x1x4x1x7xf32", "2x4x1x128xf32"]
    _, results = backward_of(options)
    assert results[-3:] == ["0xf32", f"{2 * N * S}xf32", f"{2 * (T + S - 1)}xf32"]


@pytest.mark.parametrize(
    ("shape", "slices"),
    [
        ((4, 16, 4096, 4096), 1),
        ((1, 16, 4096, 4096), 1),
        ((1, 1, 1, 1), 264),
        ((4, 1, 1, 1), 66),
        ((1, 1, 1, 4096), 4),
        ((1, 1, 4096, 1), 4),
        ((4, 16, 1, 1), 4),
    ],
)
def test_small_bias_gradients_are_summed_by_many_ctas(shape, slices):
    assert _ffi._dbias_slices(shape, t=4096, s=4096, n=16, batch=4) == slices


def test_no_more_slices_than_blocks_of_pairs():
    assert _ffi._dbias_slices((1, 1, 1, 1), t=65, s=64, n=3, batch=2) == 12
    assert _ffi._dbias_slices((2, 3, 65, 64), t=65, s=64, n=3, batch=2) == 1


@pytest.mark.parametrize(
    ("capability", "supported"), [("7.5", False), ("8.0", True), ("12.0", True)]
)
def test_old_gpus(kernels, monkeypatch, capability, supported):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(_ffi, "_device_problem", _ffi._device_problem.__wrapped__)
    reason = None if supported else "the CUDA kernels need compute capability 8.0, the GPU has 7.5"
    assert why_not("cuda", *arrays()) == reason


def test_why_not_names_the_build(no_kernels):
    assert why_not("cuda", *arrays()) == "built without CUDA kernels"
    assert why_not(("cuda",), *arrays()) == "built without CUDA kernels"
    assert why_not(("cuda", "xla"), *arrays()) is None


def test_empty_calls_need_no_kernel_launch(kernels):
    q, k, v = arrays()
    k = v = jax.ShapeDtypeStruct((B, 0, K, H), k.dtype)
    text = lowered(lambda *a: cosine_attention(*a, implementation="cuda"), q, k, v)
    assert "custom_call" not in text
