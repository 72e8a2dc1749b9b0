"""Train a byte-level language model with cosine attention, on any file.

    python examples/train_lm.py --preset demo --out runs/demo
    python examples/train_lm.py --data enwik8.zip --out runs/enwik8 --seq-len 1024 --layers 8

The second command with --resume goes on from its last checkpoint, exactly as if never stopped.

Writes to --out: options.json, metrics.jsonl (one JSON object a line), loss.png, checkpoints/.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lm_data
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from lm_model import GPT, ModelConfig, bits_per_byte, generate
from matplotlib.figure import Figure
from tqdm import tqdm

PRESETS: dict[str, dict[str, Any]] = {
    # About two minutes on two CPU cores.
    "demo": {
        "layers": 3,
        "width": 128,
        "heads": 4,
        "seq_len": 128,
        "batch_size": 16,
        "steps": 800,
        "lr": 3e-3,
        "eval_every": 100,
        "sample_every": 400,
        "checkpoint_every": 400,
        "max_minutes": 2.5,
    },
    # For one large GPU.
    "long": {
        "layers": 8,
        "width": 512,
        "heads": 8,
        "seq_len": 8192,
        "batch_size": 8,
        "dtype": "bfloat16",
        "remat": True,
        "steps": 10_000,
        "eval_windows": 32,
    },
}
# How a run is carried out, not what it computes: these may change on --resume.
FREE_OPTIONS = {"out", "resume", "preset", "max_minutes", "remat", "data"}


class TrainState(NamedTuple):
    """Everything that a checkpoint has to hold; the data follow from the step."""

    step: jax.Array  # int32 []
    params: nnx.State
    opt_state: Any


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--preset", choices=PRESETS, help="defaults for the options below")
    chosen, rest = chooser.parse_known_args(argv)
    parser = argparse.ArgumentParser(
        description=__doc__,
        parents=[chooser],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = functools.partial(_add_option, parser)
    add("--out", type=Path, help="directory for all results; default: a new one in runs/")
    add("--data", type=Path, default=None, help="file, also .gz, .zip; default: Python's library")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--seed", type=int, default=0, help="of parameters, batches and samples")
    add("--attention", choices=["cosine", "softmax"], default="cosine", help="kind of attention")
    add("--norm", choices=["pre", "post"], default="pre", help="LayerNorm before or after a layer")
    add("--scale", type=float, default=8.0, help="inverse temperature of cosine attention")
    add("--learned-scale", action="store_true", help="learn the scale, one for each head")
    add("--l2norm-groups", type=int, default=1, help="slices of a head that are normalised")
    add("--layers", type=int, default=6, help="number of blocks")
    add("--width", type=int, default=384, help="features of a position")
    add("--heads", type=int, default=6, help="attention heads")
    add("--seq-len", type=int, default=512, help="bytes of context")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    add("--remat", action="store_true", help="recompute blocks in the backward pass")
    add("--batch-size", type=int, help="windows a step; default: as many as make 16384 bytes")
    add("--steps", type=int, default=5000, help="length of training and of its schedule")
    add("--max-minutes", type=float, default=None, help="stop earlier, with a checkpoint")
    add("--lr", type=float, default=1e-3, help="largest learning rate")
    add("--warmup", type=int, help="steps up to it, a cosine to a tenth follows; default: steps/20")
    add("--eval-every", type=int, default=250, help="steps")
    add("--eval-windows", type=int, default=256, help="windows of validation data")
    add("--sample-every", type=int, default=1000, help="steps")
    add("--sample-length", type=int, default=256, help="bytes")
    add("--checkpoint-every", type=int, default=1000, help="steps")
    parser.set_defaults(**vars(chosen), **PRESETS.get(chosen.preset, {}))
    options = parser.parse_args(rest)
    if options.batch_size is None:
        options.batch_size = max(2**14 // max(options.seq_len, 1), 1)
    if options.warmup is None:
        options.warmup = options.steps // 20
    problem = _problem(options)
    if problem:
        parser.error(problem)
    if options.out is None:
        options.out = _unused_directory(Path("runs"), options.preset or "lm")
    return options


def _unused_directory(parent: Path, name: str) -> Path:
    candidates = (parent / f"{name}-{i}" for i in itertools.count(1))
    return next(path for path in candidates if not path.exists())


def _add_option(parser: argparse.ArgumentParser, name: str, *, help: str, **details: Any) -> None:
    show_default = details.get("default") is not None
    parser.add_argument(name, help=f"{help} (%(default)s)" if show_default else help, **details)


def _problem(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, if anything."""
    for name, value in vars(options).items():
        least = 0 if name in ("seed", "warmup") else 1
        if type(value) is int and value < least:
            return f"--{name.replace('_', '-')} must be at least {least}, got {value}"
    if options.width % (2 * options.heads):
        return f"--width {options.width} must be an even multiple of --heads {options.heads}"
    if (options.width // options.heads) % options.l2norm_groups:
        return (
            f"--l2norm-groups {options.l2norm_groups} must divide the head dim "
            f"{options.width // options.heads}"
        )
    if options.resume and options.out is None:
        return "--resume needs --out, the directory of the run to go on with"
    if options.warmup >= options.steps:
        return f"--warmup {options.warmup} must be less than --steps {options.steps}"
    if options.data is not None and not options.data.is_file():
        return f"--data {options.data} is not a file"
    return None


def make_optimiser(options: argparse.Namespace) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.lr, options.warmup, options.steps, end_value=options.lr / 10
    )
    decayed = functools.partial(jax.tree.map, lambda p: p.ndim > 1)  # no biases, norms, scales
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=decayed),
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(
    graphdef: nnx.GraphDef[GPT],
    optimiser: optax.GradientTransformation,
    state: TrainState,
    windows: jax.Array,
) -> tuple[TrainState, jax.Array]:
    """One update from windows [B, T + 1]; also the loss before it, in bits per byte."""

    def loss(params: nnx.State) -> jax.Array:
        return bits_per_byte(nnx.merge(graphdef, params), windows)

    value, gradients = jax.value_and_grad(loss)(state.params)
    updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), value


@functools.partial(jax.jit, static_argnums=0)
def eval_step(graphdef: nnx.GraphDef[GPT], params: nnx.State, windows: jax.Array) -> jax.Array:
    return bits_per_byte(nnx.merge(graphdef, params), windows)


class Log:
    """Metrics by step, in memory and as JSON lines."""

    def __init__(self, path: Path, up_to: int):
        """Keeps the lines of a former run as far as its checkpoint, at step `up_to`."""
        lines = path.read_text().splitlines() if up_to and path.exists() else []
        self.records = [r for r in map(json.loads, lines) if r["step"] <= up_to]
        self.path = path
        path.write_text("".join(json.dumps(record) + "\n" for record in self.records))

    def add(self, **record: Any) -> None:
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def plot(self, path: Path) -> None:
        axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
        for name in ("train", "validation"):
            points = [(r["step"], r[name]) for r in self.records if name in r]
            axes.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3)
        axes.set(xlabel="step", ylabel="bits per byte")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)


class Trainer:
    """One run: its data, its model, its files."""

    log_every = 10

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.out: Path = options.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        window = options.seq_len + 1
        data = lm_data.load(options.data)
        self.train_data, validation = lm_data.split(data, window)
        self.eval_windows = lm_data.even_windows(validation, options.eval_windows, window)
        self.prompt = validation[None, : min(64, options.seq_len)]

        fields = [field.name for field in dataclasses.fields(ModelConfig)]
        config = ModelConfig(**{name: getattr(options, name) for name in fields})
        self.graphdef, params = nnx.split(GPT(config, nnx.Rngs(options.seed)))
        self.optimiser = make_optimiser(options)
        self.state = TrainState(jnp.array(0), params, self.optimiser.init(params))

        self.checkpoints = ocp.CheckpointManager(
            self.out / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )
        self._start(hashlib.sha256(data.data).hexdigest())
        self.step = int(self.state.step)
        self.log = Log(self.out / "metrics.jsonl", up_to=self.step)
        self.losses: list[jax.Array] = []  # of the steps since `reported`
        self.reported = time.monotonic()

    def _start(self, data_digest: str) -> None:
        """From the last checkpoint, or from nothing in a directory without one."""
        path, latest = self.out / "options.json", self.checkpoints.latest_step()
        fixed = {k: v for k, v in vars(self.options).items() if k not in FREE_OPTIONS}
        fixed["data_sha256"] = data_digest
        if not self.options.resume:
            if latest is not None:
                raise SystemExit(f"{self.out} holds a run: --resume it, or choose another --out")
            path.write_text(json.dumps(fixed, indent=2) + "\n")
            return
        if latest is None:
            raise SystemExit(f"nothing to resume: no checkpoint in {self.out}")
        before = json.loads(path.read_text())
        changed = {k: (before.get(k), v) for k, v in fixed.items() if before.get(k) != v}
        if changed:
            raise SystemExit(f"--resume needs the options of the run; (then, now): {changed}")
        self.state = self.checkpoints.restore(latest, args=ocp.args.StandardRestore(self.state))

    def train(self) -> None:
        """Steps to the end of the schedule or of the time, then a checkpoint."""
        options = self.options
        pauses = [
            (options.eval_every, self.evaluate),
            (options.sample_every, lambda: tqdm.write(f"--- step {self.step}\n{self.sample()}\n")),
            (options.checkpoint_every, self.save),
        ]
        minutes = math.inf if options.max_minutes is None else options.max_minutes
        deadline = time.monotonic() + 60 * minutes
        self.reported = time.monotonic()
        with tqdm(total=options.steps, initial=self.step, unit="step", mininterval=1) as progress:
            while self.step < options.steps:
                self._update()
                progress.update()
                if time.monotonic() > deadline:
                    break
                due = [action for every, action in pauses if self.step % every == 0]
                if due or self.step % self.log_every == 0:
                    self._report(progress)
                for action in due if self.step < options.steps else ():
                    action()
                    self.reported = time.monotonic()
            self._report(progress)
        self.save()

    def _update(self) -> None:
        options = self.options
        windows = lm_data.random_windows(
            self.train_data,
            options.batch_size,
            options.seq_len + 1,
            seed=options.seed,
            step=self.step,
        )
        self.state, loss = train_step(
            self.graphdef, self.optimiser, self.state, jnp.asarray(windows)
        )
        self.losses.append(loss)
        self.step += 1

    def _report(self, progress: tqdm) -> None:
        """Log the loss and the speed since the last report; waits for the device."""
        if not self.losses:
            return
        train = float(np.mean(jax.device_get(self.losses)))
        tokens = len(self.losses) * self.options.batch_size * self.options.seq_len
        speed = tokens / (time.monotonic() - self.reported)
        self.log.add(step=self.step, train=train, tokens_per_second=round(speed))
        progress.set_postfix(loss=f"{train:.3f} bits", tokens_per_s=f"{speed:.0f}", refresh=False)
        self.losses, self.reported = [], time.monotonic()

    def evaluate(self) -> float:
        """Bits per byte of the validation windows."""
        batches = np.array_split(
            self.eval_windows, max(len(self.eval_windows) // self.options.batch_size, 1)
        )
        losses = [
            float(eval_step(self.graphdef, self.state.params, jnp.asarray(b))) for b in batches
        ]
        validation = float(np.average(losses, weights=[len(b) for b in batches]))
        self.log.add(step=self.step, validation=validation)
        return validation

    def sample(self) -> str:
        """The beginning of the validation data, continued."""
        tokens = generate(
            self.graphdef,
            self.state.params,
            jnp.asarray(self.prompt),
            jax.random.fold_in(jax.random.key(self.options.seed), self.step),
            length=self.options.sample_length,
            temperature=0.8,
        )
        text = np.concatenate([self.prompt, tokens], axis=1).tobytes()
        return text.decode("utf-8", "replace")

    def save(self) -> None:
        if self.checkpoints.latest_step() != self.step:
            self.checkpoints.save(self.step, args=ocp.args.StandardSave(self.state))
            self.checkpoints.wait_until_finished()


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    trainer = Trainer(options)
    count = sum(p.size for p in jax.tree.leaves(trainer.state.params))
    print(f"{options.attention} attention, {count / 1e6:.2f} M parameters, {jax.devices()[0]}")
    trainer.train()
    validation = trainer.evaluate()
    plot = trainer.out / "loss.png"
    trainer.log.plot(plot)
    print(f"sample:\n{trainer.sample()}\n")
    print(f"validation: {validation:.2f} bits per byte")
    print(f"plot: {plot}")
    print(f"checkpoint: {trainer.out / 'checkpoints' / str(trainer.step)}")
    trainer.checkpoints.close()


if __name__ == "__main__":
    main()
