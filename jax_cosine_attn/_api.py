"""`cosine_attention`: documentation, defaults, choice of implementation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_cosine_attn._config import Operands, shapes
from jax_cosine_attn._ffi import why_not_cuda
from jax_cosine_attn._reference import reference_attention
from jax_cosine_attn._validate import Static, validate
from jax_cosine_attn._vjp import attention


def cosine_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | jax.Array = 8.0,
    scale_bound: float | None = None,
    l2norm_qk: bool = True,
    l2norm_groups: int = 1,
    is_causal: bool = False,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    relative_bias: jax.Array | None = None,
    precision: Any = None,
    deterministic: bool = False,
    implementation: str | Sequence[str] | None = None,
    return_residual: bool = False,
) -> Any:
    """Softmax attention over cosine similarity.

    Rows of query and key are divided by their norms, so that a logit is `scale` times the cosine of
    an angle:

        q^ = q / max(||q||, 1e-6)        k^ = k / max(||k||, 1e-6)
        logits = scale * q^ k^T + bias + relative_bias
        out = softmax over the allowed keys (logits) value

    Letters: B batch, T query length, S key length, N query heads, K key heads, H head dim (1 to
    256). N is a multiple of K; query head n reads key head n // (N // K). All options combine. A
    query that may attend no key yields 0 (lse -inf) and no gradient; a key that no query may attend
    contributes nothing, whatever its row holds; a zero row of query or key has a gradient of zero.

    query, key, value, bias, mask, is_causal, local_window_size, the lengths, implementation and
    return_residual mean what they mean in `jax.nn.dot_product_attention`, except that causality is
    aligned at the bottom right and a query without keys yields 0.

    Args:
      query: [B, T, N, H], or [T, N, H]: then key and value are [S, K, H], bias and mask broadcast
        to [N, T, S], lengths are scalars, segment_ids are [T] and lse is [T, N]. float16, bfloat16,
        float32 or float64.
      key: [B, S, K, H], of query's dtype.
      value: [B, S, K, H], of query's dtype.
      bias: float16, bfloat16, float32 or float64, broadcastable to [B, N, T, S]; added to the
        logits. Its gradient has its own shape and dtype. -inf means masked.
      mask: bool, broadcastable to [B, N, T, S]; True = may attend.
      scale: the inverse temperature. A Python or NumPy scalar is static; a float32 array, [N] or
        [], is a learned one and differentiable (float64 for float64 inputs).
      scale_bound: an array scale is clamped to [-scale_bound, scale_bound]; its gradient is 1
        inside and at the bound, 0 beyond. The bound keeps the logits in the range in which no
        running maximum is needed. A static scale beyond it is an error.
      l2norm_qk: False if the rows of query and key are normalised already, as with a rotary
        embedding between the norm and the attention.
      l2norm_groups: each row is normalised in this many equal contiguous slices; it divides H, and
        |scale| * l2norm_groups bounds the logits.
      is_causal: query i may attend keys j <= i + (S_b - T_b), where T_b and S_b are the lengths of
        batch entry b.
      local_window_size: w or (left, right): query i may attend keys i + (S_b - T_b) - left to
        i + (S_b - T_b) + right, both included. None on a side leaves it open.
      query_seq_lengths: int32 [B], T_b, clamped to [0, T]; queries from T_b on attend nothing.
      key_value_seq_lengths: int32 [B], S_b, clamped to [0, S]; keys from S_b on are not attended.
      segment_ids: int32 [B, T] for self-attention, or the pair ([B, T], [B, S]): a query attends
        the keys of its own segment.
      relative_bias: float, [N, T + S - 1] or [1, T + S - 1]: entry (i - j) + (S_b - T_b) + (T - 1)
        is added to the logit of query i and key j. Differentiable, in O(T + S) memory.
      precision: of float32 products, as jax.lax.Precision or its name; None follows
        `jax_default_matmul_precision`.
      deterministic: gradients that are bitwise equal from run to run; also set by
        --xla_gpu_deterministic_ops and --xla_gpu_exclude_nondeterministic_ops in XLA_FLAGS.
      implementation: "cuda", the kernels of this library; "xla", blockwise JAX in O(T + S) memory,
        on any backend; "reference", the plain formula in O(T S) memory, differentiable in every
        mode. A sequence of them takes the first that supports the call on the platform that it is
        lowered for; None is ("cuda", "xla").
      return_residual: also return lse.

    Returns:
      out, shaped and typed like query; with return_residual the pair (out, lse), where lse is the
      natural logarithm of each query's sum of exponentials, [B, T, N] float32 (float64 for float64
      inputs), -inf where a query attends nothing. Both are differentiable.

    Raises:
      ValueError: a shape, a value or a name is wrong.
      TypeError: a dtype or a Python type is wrong.
      NotImplementedError: implementation="cuda" for a call that the kernels cannot do, or lowered
        for a platform other than CUDA.
    """
    raw, static = validate(
        layout="BTNH",
        query=query,
        key=key,
        value=value,
        bias=bias,
        mask=mask,
        scale=scale,
        scale_bound=scale_bound,
        l2norm_qk=l2norm_qk,
        l2norm_groups=l2norm_groups,
        is_causal=is_causal,
        local_window_size=local_window_size,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        segment_ids=segment_ids,
        relative_bias=relative_bias,
        precision=precision,
        deterministic=deterministic,
        implementation=implementation,
        return_residual=return_residual,
    )
    return attend(raw, static)


def why_not(implementation: str | Sequence[str] | None, *args: Any, **kwargs: Any) -> str | None:
    """Why an implementation would refuse a call of `cosine_attention`, or None if it would not.

    Answers from shapes, dtypes and the build: arrays may be `jax.ShapeDtypeStruct`, and no GPU is
    needed.

    Args:
      implementation: as in `cosine_attention`; of a sequence, all would have to refuse.
      *args: further positional arguments of `cosine_attention`.
      **kwargs: further keyword arguments of `cosine_attention`.

    Returns:
      The reason as text, or None.

    Raises:
      ValueError, TypeError: as `cosine_attention` does.
    """
    given = arguments(*args, implementation=implementation, **kwargs)
    raw, static = validate(layout="BTNH", **given)
    return _cuda_refusal(raw, static) if static.candidates == ("cuda",) else None


def arguments(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Every argument of a call of `cosine_attention` by its name, defaults included."""
    bound = inspect.signature(cosine_attention).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def attend(raw: Operands, static: Static) -> Any:
    """What `cosine_attention` returns, for validated arguments."""
    if static.candidates[0] == "cuda" and static.candidates != ("cuda", "xla"):
        problem = _cuda_refusal(raw, static)
        if problem is not None:
            static = static._replace(candidates=static.candidates[1:])
        if not static.candidates:
            raise NotImplementedError(problem)
    return _cosine_attention(raw, static)


def _cuda_refusal(raw: Operands, static: Static) -> str | None:
    return why_not_cuda(jax.eval_shape(lambda x: operands_of(x, static), raw), static.config)


@functools.partial(jax.jit, static_argnames="static")
def _cosine_attention(raw: Operands, static: Static) -> Any:
    ops = operands_of(raw, static)
    by_primitive = functools.partial(attention, config=static.config)
    by_formula = functools.partial(reference_attention, config=static.config)
    if static.candidates == ("reference",):
        out, lse = by_formula(ops)
    elif static.candidates == ("cuda", "reference"):
        out, lse = jax.lax.platform_dependent(ops, cuda=by_primitive, default=by_formula)
    else:
        out, lse = by_primitive(ops)
    if static.config.layout == "BTNH":
        lse = lse.swapaxes(1, 2)
    if raw.q.ndim == 3:
        out, lse = out[0], lse[0]
    return (out, lse) if static.return_residual else out


def operands_of(raw: Operands, static: Static) -> Operands:
    """The operands of the primitives: every one with a batch dim, 1 where the batch shares it."""
    config = static.config
    ops = raw
    if raw.q.ndim == 3:
        ops = jax.tree.map(lambda x: x[None], raw)
    t, n, s, _, _ = shapes(ops, config)
    return ops._replace(
        scale=_scale(raw, static, n),
        bias=_rank_4(raw.bias),
        relative_bias=None if raw.relative_bias is None else raw.relative_bias[None],
        mask=_rank_4(raw.mask),
        q_lengths=None if ops.q_lengths is None else jnp.clip(ops.q_lengths, 0, t),
        kv_lengths=None if ops.kv_lengths is None else jnp.clip(ops.kv_lengths, 0, s),
    )


def _rank_4(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else jnp.expand_dims(x, tuple(range(4 - x.ndim)))


def _scale(raw: Operands, static: Static, n: int) -> jax.Array:
    dtype = jnp.float64 if raw.q.dtype == jnp.float64 else jnp.float32
    if static.scale is not None:
        # One element, which XLA folds into a literal: filling more takes a kernel of its own.
        return jnp.full((1, 1), static.scale, dtype)
    scale, bound = raw.scale.astype(dtype), static.scale_bound
    if bound is not None:
        # Not jnp.clip, which halves the gradient at the bound.
        scale = jnp.where(scale > bound, bound, jnp.where(scale < -bound, -bound, scale))
    return jnp.broadcast_to(scale, (1, n))
