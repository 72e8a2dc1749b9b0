"""The accuracy that every implementation is held to, and the inputs it is measured on.

The error against the float64 oracle is at most twice that of the plain formula in the same dtype
(float32 sums, HIGHEST precision), plus 4 ulp of the largest value; so too for the root mean square.

The plain formula's error is now and then small by luck, most often where few elements decide it,
and then no other rounding stays below twice as much. What misses its limit is therefore judged
again over 16 calls that differ in nothing but the numbers that tensors and cotangents hold, the one
that missed among them: by the mean of their errors against the mean of their limits. Luck averages
out of both, and a defect out of neither.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_cosine_attn
from jax_cosine_attn import cosine_attention
from jax_cosine_attn._api import arguments, attend
from jax_cosine_attn._validate import validate

CALLS = 16


def few_on_a_cpu(cases: Iterable[tuple[Any, ...]], every: int) -> list[Any]:
    """Parameters (implementation, *case): all cases for the kernels, of blockwise JAX every so
    many; its others, and the reference that they are compared with, in the full grid."""
    found = []
    for i, case in enumerate(cases):
        found += [
            pytest.param("xla", *case, marks=() if i % every == 0 else pytest.mark.full),
            pytest.param("reference", *case, marks=pytest.mark.full),
            pytest.param("cuda", *case, marks=pytest.mark.gpu),
        ]
    return found


Inputs = dict[str, np.ndarray]
# (error, error of the plain formula, exact value) of each result.
Errors = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]

# Options that are arrays or may be: passed to the compiled call as data.
ARRAYS = (
    "bias", "mask", "query_seq_lengths", "key_value_seq_lengths", "segment_ids", "relative_bias",
)  # fmt: skip
DIFFERENTIABLE = ("scale", "bias", "relative_bias")


def make_inputs(dtype, *, b=2, t=63, s=127, n=2, k=None, h=16, seed=0, magnitude=1.0):
    """{query, key, value, dout, dlse}: normal deviates of `dtype`, the first three times magnitude.

    Half of each key is a query's direction, so that the weights are far from uniform.
    """
    rng = np.random.default_rng(seed)
    k = k or n
    query = rng.standard_normal((b, t, n, h))
    key = rng.standard_normal((b, s, k, h))
    if t and s:
        key += query[:, rng.integers(0, t, s)][:, :, :: n // k]
    value = rng.standard_normal((b, s, k, h))
    rounded = {
        name: np.array(jnp.asarray(x * magnitude, dtype))
        for name, x in (("query", query), ("key", key), ("value", value))
    }
    dout = np.asarray(jnp.asarray(0.25 * rng.standard_normal((b, t, n, h)), dtype))
    lse_dtype = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    return rounded | {"dout": dout, "dlse": rng.standard_normal((b, t, n)).astype(lse_dtype)}


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(differentiable arrays, other arrays) of a call's options; what is left in neither is static.

    A Python number as scale stays static.
    """
    differentiable = {
        name: options[name]
        for name in DIFFERENTIABLE
        if options.get(name) is not None and not isinstance(options[name], (int, float))
    }
    rest = {
        name: options[name]
        for name in ARRAYS
        if options.get(name) is not None and name not in differentiable
    }
    return differentiable, rest


@functools.partial(jax.jit, static_argnames=("implementation", "static", "form", "shared"))
def measured(
    implementation, tensors, differentiable, arrays, dout, dlse, static, form="batch", shared=()
):
    """(out, lse, (dq, dk, dv), gradients of the differentiable options), as `form` says: of one
    call, of one in the layout [B, heads, rows, H], or of each entry alone under vmap, where tensors
    whose entries are all equal, those with an index in `shared`, and options without a batch axis
    are not mapped.
    """
    options = dict(static) | {"implementation": implementation, "return_residual": True}

    def call(tensors, differentiable, arrays):
        return cosine_attention(*tensors, **differentiable, **arrays, **options)

    def heads_first(tensors, differentiable, arrays):
        transposed = (x.swapaxes(1, 2) for x in tensors)
        given = arguments(*transposed, **differentiable, **arrays, **options)
        out, lse = attend(*validate(layout="BNTH", **given))
        return out.swapaxes(1, 2), lse.swapaxes(1, 2)

    def results(tensors, differentiable, arrays, dout, dlse):
        f = heads_first if form == "heads first" else call
        (out, lse), vjp = jax.vjp(lambda *x: f(*x, arrays), tensors, differentiable)
        return out, lse, *vjp((dout, dlse))

    if form != "vmap":
        return results(tensors, differentiable, arrays, dout, dlse)

    def axis(name, x):
        if name in ("scale", "relative_bias") or (name in ("bias", "mask") and x.ndim < 4):
            return None
        return 0 if len(x) == len(dout) else None

    axes = [
        {name: axis(name, jax.tree.leaves(x)[0]) for name, x in given.items()}
        for given in (differentiable, arrays)
    ]
    # A call for one entry has no batch axis.
    given = [
        {
            name: x[0] if of[name] is None and name in ("bias", "mask") and x.ndim == 4 else x
            for name, x in given.items()
        }
        for given, of in zip((differentiable, arrays), axes, strict=True)
    ]
    of_tensors = tuple(None if i in shared else 0 for i in range(3))
    tensors = tuple(x[0] if i in shared else x for i, x in enumerate(tensors))
    entries = jax.vmap(results, (of_tensors, *axes, 0, 0))
    *others, gradients = entries(tensors, *given, dout, dlse)
    summed = {
        name: x if axes[0][name] == 0 else x.astype(dlse.dtype).sum(0).astype(x.dtype)
        for name, x in gradients.items()
    }
    return *others, {name: x.reshape(differentiable[name].shape) for name, x in summed.items()}


@functools.partial(jax.jit, static_argnames=("groups", "l2norm_qk"))
def plain(tensors, differentiable, allowed, entry, dout, dlse, groups, l2norm_qk):
    """The plain formula in the inputs' dtype: rounded where a tensor of that dtype would be stored
    (unit rows, weights, output), summed in float32. `entry` indexes relative_bias, [B, T, S].
    """
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    dtype = tensors[0].dtype
    sums = jnp.promote_types(dtype, jnp.float32)

    def stored(x):
        return x.astype(dtype).astype(sums)

    def unit(x):
        y = x.astype(sums).reshape(*x.shape[:-1], groups, -1)
        largest = jax.lax.stop_gradient(jnp.abs(y).max(-1, keepdims=True))
        y = y / jnp.where(largest > 0, largest, 1)
        square = (y * y).sum(-1, keepdims=True)
        tiny = jnp.sqrt(square) * largest < 1e-6
        zero = jax.lax.stop_gradient(y * largest / 1e-6)
        return jnp.where(tiny, zero, y / jnp.sqrt(jnp.where(tiny, 1, square))).reshape(x.shape)

    def attend(tensors, differentiable):
        q, k, v = tensors
        if l2norm_qk:
            q, k = unit(q), unit(k)
        repeats = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
        cosine = product("btnh,bsnh->bnts", stored(q), stored(k))
        logits = jnp.reshape(differentiable["scale"], (-1, 1, 1)).astype(sums) * cosine
        if "bias" in differentiable:
            logits += differentiable["bias"].astype(sums)
        if "relative_bias" in differentiable:
            logits += jax.vmap(lambda i: differentiable["relative_bias"].astype(sums)[:, i])(entry)
        logits = jnp.where(allowed, logits, -jnp.inf)
        live = allowed.any(-1, keepdims=True)
        top = jax.lax.stop_gradient(jnp.where(live, logits.max(-1, keepdims=True), 0))
        weights = jnp.exp(logits - top)
        total = jnp.where(live, weights.sum(-1, keepdims=True), 1)
        out = product("bnts,bsnh->btnh", stored(weights / total), v.astype(sums))
        lse = jnp.where(live, top + jnp.log(total), -jnp.inf)[..., 0]
        return out.astype(dtype), lse.swapaxes(1, 2)

    (out, lse), vjp = jax.vjp(attend, tensors, differentiable)
    return out, lse, *vjp((dout, dlse))


def named(out, lse, tensor_grads, option_grads) -> dict[str, np.ndarray]:
    dq, dk, dv = tensor_grads
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    results |= {f"d{name}": x for name, x in option_grads.items()}
    return {name: np.asarray(x) for name, x in results.items()}


def leave_nan_in_freed_memory() -> None:
    """The results that a GPU's allocator hands out next are full of NaN, so that an element which a
    kernel does not write shows. XLA's own code, all there is on a CPU, writes every element.

    All bits set are NaN in every float format. Largest first and all held at once, the arrays fill
    whatever holes the allocator has, so that the next ones are cut from them.
    """
    held = [jnp.full(1 << i, 255, jnp.uint8) for i in range(25, 7, -1) for _ in range(4)]
    jax.block_until_ready(held)


def check(
    implementation: str,
    inputs: Inputs | Callable[..., Inputs],
    form: str = "batch",
    shared: tuple[int, ...] = (),
    **options: Any,
) -> None:
    """Holds one call, output, lse and all gradients, to the yardstick.

    Also exact: dead rows give out 0, lse -inf and no gradient though their dout and dlse are NaN;
    dead keys get no gradient though their rows are NaN; nothing is NaN. Where the kernels say that
    they cannot do the call, implementation "cuda" must raise exactly that.

    Args:
      implementation: of `cosine_attention`.
      inputs: as from `make_inputs`, or what takes a `seed` and returns them: only then is what
        misses its limit judged over several calls.
      form, shared: as in `measured`.
      options: the other arguments of `cosine_attention`; arrays are NumPy's.
    """
    options = {"scale": 8.0, "precision": "highest"} | options
    first = inputs(seed=0) if callable(inputs) else inputs
    if implementation == "cuda":
        tensors = tuple(first[name] for name in ("query", "key", "value"))
        reason = jax_cosine_attn.why_not("cuda", *tensors, **options)
        if reason is not None:
            with pytest.raises(NotImplementedError, match=re.escape(reason)):
                cosine_attention(*tensors, **options, implementation="cuda")
            return

    def errors_of(seed: int) -> Errors:
        given = inputs(seed=seed) if callable(inputs) else inputs
        return errors(implementation, given, form, shared, options)

    hold(errors_of, first["query"].dtype, CALLS if callable(inputs) else 1)


def hold(errors_of: Callable[[int], Errors], dtype: Any, calls: int = CALLS) -> None:
    """Holds the call of seed 0 to the limits, and what misses one the mean of all `calls` seeds."""
    found = [errors_of(0)]
    if beyond_limit(found, dtype):
        found += [errors_of(seed) for seed in range(1, calls)]
        misses = beyond_limit(found, dtype)
        assert not misses, "\n".join(misses)


def errors(
    implementation: str,
    inputs: Inputs,
    form: str,
    shared: tuple[int, ...],
    options: dict[str, Any],
) -> Errors:
    """(error, error of the plain formula, exact value) of each result, where it is alive; what must
    be exact is checked. Arguments as in `check`."""
    tensors = tuple(inputs[name] for name in ("query", "key", "value"))
    not_mathematics = ("precision", "deterministic")
    of_oracle = {name: x for name, x in options.items() if name not in not_mathematics}
    exact = oracle.attention(*tensors, **of_oracle, dout=inputs["dout"], dlse=inputs["dlse"])
    dead_rows = np.isneginf(exact.lse)

    differentiable, arrays = split(options)
    static = tuple((x, y) for x, y in options.items() if x not in differentiable | arrays)
    poisoned = list(tensors)
    for i in (1, 2):
        dead = exact.dead_keys.all(axis=0) if i in shared else exact.dead_keys
        poisoned[i] = np.where(dead[..., None], np.nan, tensors[i]).astype(tensors[i].dtype)
    dout = np.where(dead_rows[..., None], np.nan, inputs["dout"]).astype(inputs["dout"].dtype)
    dlse = np.where(dead_rows, np.nan, inputs["dlse"]).astype(inputs["dlse"].dtype)
    if implementation == "cuda":
        leave_nan_in_freed_memory()
    ours = named(
        *measured(
            implementation, tuple(poisoned), differentiable, arrays, dout, dlse, static,
            form=form, shared=shared,
        )
    )  # fmt: skip

    scale, bound = np.asarray(options["scale"], ours["lse"].dtype), options.get("scale_bound")
    with_scale = differentiable | {"scale": scale if bound is None else scale.clip(-bound, bound)}
    cleaned_dout = np.where(dead_rows[..., None], 0, inputs["dout"]).astype(inputs["dout"].dtype)
    cleaned_dlse = np.where(dead_rows, 0, inputs["dlse"]).astype(inputs["dlse"].dtype)
    yard = named(
        *plain(
            tensors, with_scale, exact.allowed, relative_entries(inputs, options),
            cleaned_dout, cleaned_dlse,
            groups=options.get("l2norm_groups", 1), l2norm_qk=options.get("l2norm_qk", True),
        )
    )  # fmt: skip
    yard["dscale"] = np.where(scale == with_scale["scale"], yard["dscale"], 0)

    assert not ours["out"][dead_rows].any(), "out of dead rows"
    assert np.array_equal(np.isneginf(ours["lse"]), dead_rows), "lse of dead rows"
    assert not ours["dq"][dead_rows].any(), "dq of dead rows"
    assert not ours["dk"][exact.dead_keys].any(), "dk of dead keys"
    assert not ours["dv"][exact.dead_keys].any(), "dv of dead keys"
    found = {}
    for name, x in ours.items():
        wanted = getattr(exact, name)
        assert x.shape == wanted.shape, f"{name}: {x.shape}, not {wanted.shape}"
        live = ~dead_rows if name == "lse" else np.full(wanted.shape, True)
        error, of_plain = (
            np.abs(y[live].astype(np.float64) - wanted[live]) for y in (x, yard[name])
        )
        assert np.isfinite(error).all(), f"{name}: not finite"
        assert np.isfinite(of_plain).all(), f"{name}: no yardstick, the plain formula overflows"
        found[name] = error, of_plain, wanted[live]
    return found


def relative_entries(inputs: dict[str, np.ndarray], options: dict[str, Any]) -> np.ndarray:
    """Entry of relative_bias that each pair reads, int [B, T, S]; clipped for pairs not allowed."""
    (b, t), s = inputs["query"].shape[:2], inputs["key"].shape[1]
    t_b, s_b = (
        np.full(b, size) if options.get(name) is None else np.clip(options[name], 0, size)
        for name, size in (("query_seq_lengths", t), ("key_value_seq_lengths", s))
    )
    entry = np.arange(t)[:, None] - np.arange(s) + (s_b - t_b)[:, None, None] + t - 1
    return np.clip(entry, 0, max(t + s - 2, 0))


def beyond_limit(calls: list[Errors], dtype: Any) -> list[str]:
    """What misses the limit on the maximum or on the root mean square, in the mean over `calls`,
    results of `errors`."""
    ulp = float(jnp.finfo(dtype).eps)
    misses = []
    for name in calls[0]:
        for kind, norm in (("maximum", np.max), ("rms", lambda y: np.sqrt(np.mean(y * y)))):
            norms = []
            for error, of_plain, exact in (call[name] for call in calls):
                # lse is a logarithm: its error is the relative one of the sum, however near 1
                # that is.
                values = np.maximum(np.abs(exact), 1) if name == "lse" else np.abs(exact)
                norms.append([norm(x) if x.size else 0.0 for x in (error, of_plain, values)])
            error, of_plain, value = np.mean(norms, axis=0)
            limit = 2 * of_plain + 4 * ulp * value
            if not error <= limit:
                misses.append(
                    f"{name}: {kind} error {error:.3g}, at most {limit:.3g} (plain formula "
                    f"{of_plain:.3g}, values {value:.3g}; calls: {len(calls)})"
                )
    return misses
