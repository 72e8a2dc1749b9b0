"""Train the language model of train_lm.py over a mesh of devices: data, tensor, context parallel.

    python examples/train_sharded.py --mesh 2 2 2 --seq-len 1024
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/train_sharded.py --mesh 2 2 2

On several hosts each runs it with the address of the first, the number of hosts and its own place:

    python examples/train_sharded.py --mesh 2 2 2 --hosts 10.0.0.1:1234 2 0
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lm_data
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from lm_model import GPT, ModelConfig, SoftmaxAttention, rotary

from jax_cosine_attn import l2norm_tensors
from jax_cosine_attn.parallel import ring_cosine_attention, zigzag_indices

# How tensor parallelism cuts parameters, by the module that holds them: heads, and the inner
# features of the perceptron. One all-reduce after each pair of products is left.
SPECS = {
    "query": {"kernel": P(None, "model"), "bias": P("model")},
    "key": {"kernel": P(None, "model"), "bias": P("model")},
    "value": {"kernel": P(None, "model"), "bias": P("model")},
    "out": {"kernel": P("model")},
    "mlp_in": {"kernel": P(None, "model"), "bias": P("model")},
    "mlp_out": {"kernel": P("model")},
}


class RingAttention(SoftmaxAttention):
    """Causal cosine attention of sequences in zigzag order, sharded over the mesh."""

    def __init__(self, config: ModelConfig, mesh: Mesh, rngs: nnx.Rngs):
        super().__init__(config.heads, config.width, dtype=config.dtype, rngs=rngs)
        self.scale, self.mesh = config.scale, mesh

    def __call__(self, x: jax.Array, *, decode: bool) -> jax.Array:  # [B, T, width]
        if decode:
            raise NotImplementedError("decoding is train_lm.py's")
        positions = jnp.asarray(zigzag_indices(x.shape[1], self.mesh.shape["context"]))
        turn = jax.vmap(jax.vmap(rotary, (-2, None), -2), (0, None))  # over heads, over the batch
        query, key = (turn(x, positions) for x in l2norm_tensors(self.query(x), self.key(x)))
        out = ring_cosine_attention(
            query,
            key,
            self.value(x),
            axis_name="context",
            mesh=self.mesh,
            batch_axis="data",
            head_axis="model",
            scale=self.scale,
            l2norm_qk=False,
            is_causal=True,
        )
        return self.out(out)


def make_model(config: ModelConfig, mesh: Mesh, seed: int) -> GPT:
    rngs = nnx.Rngs(seed)
    model = GPT(config, rngs)
    for block in model.blocks:
        block.attention = RingAttention(config, mesh, rngs)
    return model


def sharding_of(mesh: Mesh, path: tuple[Any, ...]) -> NamedSharding:
    """Of a parameter, or of an optimiser's moment of it, from its place in the tree."""
    names = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
    specs = [
        SPECS[module].get(parameter, P())
        for module, parameter in zip(names, names[1:], strict=False)
        if module in SPECS
    ]
    return NamedSharding(mesh, specs[-1] if specs else P())


def train(options: argparse.Namespace) -> list[float]:
    """The losses of all steps, in bits per byte."""
    mesh = jax.make_mesh(
        tuple(options.mesh), ("data", "model", "context"), axis_types=(AxisType.Auto,) * 3
    )
    config = ModelConfig(
        layers=options.layers,
        width=options.width,
        heads=options.heads,
        norm="pre",
        attention="cosine",
        scale=8.0,
        learned_scale=False,
        l2norm_groups=1,
        dtype=options.dtype,
        remat=True,
    )
    optimiser = optax.adamw(options.lr)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make_model(config, mesh, options.seed)))

    def init() -> tuple[nnx.State, Any]:
        params = nnx.state(make_model(config, mesh, options.seed))
        return params, optimiser.init(params)

    @jax.jit
    def step(state: Any, tokens: jax.Array, targets: jax.Array) -> tuple[Any, jax.Array]:
        def loss(params: nnx.State) -> jax.Array:
            log_p = jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens))
            return -jnp.take_along_axis(log_p, targets[..., None], axis=-1).mean() / math.log(2)

        params, opt_state = state
        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimiser.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    def shard(x: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, P("data", "context"))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    shardings = jax.tree.map_with_path(
        lambda path, _: sharding_of(mesh, path), jax.eval_shape(init)
    )
    state = jax.jit(init, out_shardings=shardings)()
    data, _ = lm_data.split(lm_data.load(options.data), options.seq_len + 1)
    # Tokens and what follows them go to their devices in the same order: nothing else moves.
    order = zigzag_indices(options.seq_len, mesh.shape["context"])
    losses = []
    for i in range(options.steps):
        windows = lm_data.random_windows(
            data, options.batch_size, options.seq_len + 1, seed=options.seed, step=i
        ).astype(np.int32)
        state, loss = step(state, shard(windows[:, :-1][:, order]), shard(windows[:, 1:][:, order]))
        losses.append(float(loss))
        if jax.process_index() == 0:
            print(f"step {i + 1}: {losses[-1]:.6f} bits per byte", flush=True)
    return losses


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mesh", type=int, nargs=3, default=(1, 1, 1), metavar=("DATA", "MODEL", "CONTEXT"))
    add("--hosts", nargs=3, metavar=("ADDRESS", "COUNT", "PLACE"), help="several hosts: see above")
    add("--data", type=Path, help="file, also .gz, .zip; default: Python's library")
    add("--layers", type=int, default=2)
    add("--width", type=int, default=128)
    add("--heads", type=int, default=4)
    add("--seq-len", type=int, default=256)
    add("--batch-size", type=int, default=8)
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--steps", type=int, default=100)
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.hosts is not None:
        address, count, place = options.hosts
        jax.distributed.initialize(address, int(count), int(place))
    needed = math.prod(options.mesh)
    if needed != len(jax.devices()):
        parser.error(f"--mesh {options.mesh} takes {needed} devices; there are {jax.devices()}")
    return train(options)


if __name__ == "__main__":
    main()
