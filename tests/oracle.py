"""Cosine-similarity attention in NumPy float64, from the mathematics alone.

One (batch entry, head) at a time, on the live rows and live keys only: dead ones are left out by
indexing, so nothing they hold can take part. No code is shared with the library.
"""

from __future__ import annotations

import dataclasses

import numpy as np

EPS = 1e-6


@dataclasses.dataclass
class Result:
    """Output, log-sum-exp and gradients; a gradient is None where its operand is absent."""

    out: np.ndarray  # [B, T, N, H]
    lse: np.ndarray  # [B, T, N]
    dq: np.ndarray  # [B, T, N, H]
    dk: np.ndarray  # [B, S, K, H]
    dv: np.ndarray  # [B, S, K, H]
    dscale: np.ndarray  # shape of scale
    dbias: np.ndarray | None  # shape of bias
    drelative_bias: np.ndarray | None  # shape of relative_bias
    allowed: np.ndarray  # bool [B, N, T, S]: which query may attend which key
    dead_keys: np.ndarray  # bool [B, S, K]: ruled out whatever the bias is


def f64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def norms(x: np.ndarray, groups: int) -> np.ndarray:
    """Norm of each group's slice, repeated over the slice: [rows, H]."""
    rows, h = x.shape
    squares = (x.reshape(rows, groups, h // groups) ** 2).sum(-1)
    return np.repeat(np.sqrt(squares), h // groups, axis=1)


def normalized(x: np.ndarray, groups: int) -> np.ndarray:
    return x / np.maximum(norms(x, groups), EPS)


def normalized_vjp(x: np.ndarray, groups: int, du: np.ndarray) -> np.ndarray:
    """Gradient of <du, normalized(x)>: the part of du orthogonal to u, over the norm."""
    rows, h = x.shape
    u, norm = normalized(x, groups), norms(x, groups)
    along = (u * du).reshape(rows, groups, h // groups).sum(-1)
    du = du - u * np.repeat(along, h // groups, axis=1)
    return np.where(norm < EPS, 0.0, du / np.maximum(norm, EPS))


def summed_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum over the axes along which an array of `shape` was broadcast to x."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    axes = tuple(i for i, (a, b) in enumerate(zip(shape, x.shape, strict=True)) if a == 1 != b)
    return x.sum(axis=axes, keepdims=True)


def attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=8.0,
    scale_bound=None,
    l2norm_qk=True,
    l2norm_groups=1,
    is_causal=False,
    local_window_size=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    segment_ids=None,
    relative_bias=None,
    dout=None,
    dlse=None,
) -> Result:
    """The contract's attention and its gradients for the cotangents dout and dlse (default 0).

    Arguments mean what they mean in `jax_cosine_attn.cosine_attention`, 4-D inputs only.
    """
    query, key, value = f64(query), f64(key), f64(value)
    (b_, t, n_, h), (_, s, k_, _) = query.shape, key.shape
    dout = np.zeros((b_, t, n_, h)) if dout is None else f64(dout)
    dlse = np.zeros((b_, t, n_)) if dlse is None else f64(dlse)
    t_b = np.clip(np.broadcast_to(t if query_seq_lengths is None else query_seq_lengths, b_), 0, t)
    s_b = np.clip(
        np.broadcast_to(s if key_value_seq_lengths is None else key_value_seq_lengths, b_), 0, s
    )
    raw_scale = f64(scale)
    bound = np.inf if scale_bound is None else scale_bound
    scales = np.broadcast_to(np.clip(raw_scale, -bound, bound), n_)
    full_bias = np.broadcast_to(0.0 if bias is None else f64(bias), (b_, n_, t, s))
    full_mask = np.broadcast_to(True if mask is None else np.asarray(mask), (b_, n_, t, s))
    if relative_bias is not None:
        relative = np.broadcast_to(f64(relative_bias), (n_, max(t + s - 1, 0)))
    if segment_ids is not None:
        pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        q_segments, kv_segments = (np.asarray(x) for x in pair)
    left = right = None
    if local_window_size is not None:
        window = local_window_size
        left, right = (window, window) if isinstance(window, int) else window

    out = np.zeros_like(query)
    lse = np.full((b_, t, n_), -np.inf)
    dq, dk, dv = np.zeros_like(query), np.zeros_like(key), np.zeros_like(value)
    dscales, drelative = np.zeros(n_), np.zeros((n_, max(t + s - 1, 0)))
    dbias = np.zeros((b_, n_, t, s)) if bias is not None else None
    everything_allowed = np.zeros((b_, n_, t, s), bool)
    dead_keys = np.ones((b_, s, k_), bool)

    for b in range(b_):
        position = np.arange(t)[:, None] + (int(s_b[b]) - int(t_b[b]))  # of a query, among the keys
        distance = position - np.arange(s)[None, :]  # i - j, aligned
        visible = (np.arange(t)[:, None] < t_b[b]) & (np.arange(s)[None, :] < s_b[b])
        if is_causal:
            visible = visible & (distance >= 0)
        if left is not None:
            visible = visible & (distance <= left)
        if right is not None:
            visible = visible & (distance >= -right)
        if segment_ids is not None:
            visible = visible & (q_segments[b][:, None] == kv_segments[b][None, :])
        for n in range(n_):
            kv = n // (n_ // k_)
            entry = np.clip(distance + t - 1, 0, max(t + s - 2, 0))
            added = full_bias[b, n] + (relative[n][entry] if relative_bias is not None else 0.0)
            allowed = visible & full_mask[b, n]
            dead_keys[b, :, kv] &= ~allowed.any(0)
            allowed = allowed & (added != -np.inf)
            everything_allowed[b, n] = allowed
            rows, cols = np.flatnonzero(allowed.any(1)), np.flatnonzero(allowed.any(0))
            if not rows.size:
                continue
            block = np.ix_(rows, cols)
            q, k, v = query[b, rows, n], key[b, cols, kv], value[b, cols, kv]
            uq, uk = (normalized(x, l2norm_groups) if l2norm_qk else x for x in (q, k))
            cosine = uq @ uk.T
            logits = np.where(allowed[block], scales[n] * cosine + added[block], -np.inf)
            top = logits.max(1, keepdims=True)
            weights = np.exp(logits - top)
            total = weights.sum(1, keepdims=True)
            p = weights / total
            out[b, rows, n] = p @ v
            lse[b, rows, n] = (top + np.log(total))[:, 0]

            g, glse = dout[b, rows, n], dlse[b, rows, n][:, None]
            dp = g @ v.T
            ds = p * (dp - (p * dp).sum(1, keepdims=True) + glse)
            dv[b, cols, kv] += p.T @ g
            duq, duk = scales[n] * (ds @ uk), scales[n] * (ds.T @ uq)
            if l2norm_qk:
                duq = normalized_vjp(q, l2norm_groups, duq)
                duk = normalized_vjp(k, l2norm_groups, duk)
            dq[b, rows, n] = duq
            dk[b, cols, kv] += duk
            dscales[n] += (ds * cosine).sum()
            if dbias is not None:
                dbias[b, n][block] = ds
            np.add.at(drelative[n], entry[block], ds)

    if raw_scale.ndim == 0:
        dscale = dscales.sum() * (abs(raw_scale) <= bound)
    else:
        dscale = dscales * (np.abs(raw_scale) <= bound)
    return Result(
        out,
        lse,
        dq,
        dk,
        dv,
        np.asarray(dscale),
        summed_to(dbias, np.shape(bias)) if dbias is not None else None,
        summed_to(drelative, np.shape(relative_bias)) if relative_bias is not None else None,
        everything_allowed,
        dead_keys,
    )
