"""The shapes that the benchmark runs, and what is asked of some of them, in one place."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# Forward; forward that also leaves what the backward needs; backward; forward and backward in one.
# In units of the forward's matrix products.
DIRECTIONS = {"fwd": 1.0, "fwd+res": 1.0, "bwd": 2.5, "both": 3.5}


class Shape(NamedTuple):
    """Self-attention: T = S = seq_len."""

    batch: int  # B
    seq_len: int  # T = S
    num_heads: int  # N
    num_heads_kv: int  # K
    head_dim: int  # H

    def flops(self, direction: str, is_causal: bool) -> float:
        """Matrix-product operations: 4 B N T S H forward, half of it causal, 2.5 times backward."""
        forward = 4.0 * self.batch * self.num_heads * self.seq_len**2 * self.head_dim
        return forward * (0.5 if is_causal else 1.0) * DIRECTIONS[direction]


class Preset(NamedTuple):
    dtype: str
    shapes: tuple[Shape, ...]


def _tokens16k() -> tuple[Shape, ...]:
    tokens, width = 16_384, 2048
    return tuple(
        Shape(tokens // t, t, width // h, width // h, h)
        for h in (64, 128)
        for t in (512, 1024, 4096, 16_384)
    )


PRESETS = {
    # The shapes of the original's benchmark.
    "original": Preset(
        "float16",
        tuple(Shape(4, t, 8, 8, 64) for t in (128, 256, 512, 1024, 2048, 4096, 8192)),
    ),
    # 16,384 tokens and N * H = 2048, the sweep of the FlashAttention papers.
    "tokens16k": Preset("bfloat16", _tokens16k()),
    # What a few CPU cores can do.
    "cpu": Preset("float32", tuple(Shape(1, t, 8, 8, 64) for t in (512, 1024, 2048))),
}


class Target(NamedTuple):
    """A case, the peers that it is timed beside, and what is asked of it."""

    direction: str  # of DIRECTIONS
    mode: str
    shape: Shape
    dtype: str
    is_causal: bool = False
    mask_prob: float = 0.0
    precision: str | None = None  # of float32 products
    peers: tuple[str, ...] = ()
    at_least: float | None = None  # the best peer's time over ours
    at_most_us: float | None = None
    accuracy: bool = False  # error against float64: no more than cuDNN's

    def options(self) -> str:
        words = ("causal" if self.is_causal else "", "mask" if self.mask_prob > 0.0 else "")
        return " ".join(filter(None, (*words, self.precision)))

    def __str__(self) -> str:
        b, t, n, k, h = self.shape
        case = f"{self.direction} {self.mode} {self.dtype} B {b} T {t} N {n} K {k} H {h}"
        return f"{case} {self.options()}".rstrip()

    def columns(self) -> dict[str, Any]:
        """What rows say about their case."""
        return {
            "direction": self.direction,
            "mode": self.mode,
            "dtype": self.dtype,
            **self.shape._asdict(),
            "is_causal": self.is_causal,
            "masked": self.mask_prob > 0.0,
            "precision": self.precision,
        }


def _peers(head_dim: int) -> tuple[str, ...]:
    """Of 16-bit calls. The wheel of flash-attn3-jax has H = 128 alone."""
    return ("cudnn", "tokamax", *(("flash_attn3_jax",) if head_dim == 128 else ()))


def _by_length(
    direction: str,
    head_dim: int,
    at_least: dict[int, float],
    mode: str = "all-in",
    peers: tuple[str, ...] | None = None,
    causal: Mapping[int, float] = {},
) -> tuple[Target, ...]:
    """16,384 tokens and N * H = 2048, full and causal; `causal` where that is asked more."""
    return tuple(
        Target(
            direction, mode, Shape(16_384 // t, t, 2048 // head_dim, 2048 // head_dim, head_dim),
            "bfloat16", is_causal, peers=peers or _peers(head_dim),
            at_least=causal.get(t, ratio) if is_causal else ratio,
        )
        for t, ratio in at_least.items()
        for is_causal in (False, True)
    )  # fmt: skip


def _of_h256(direction: str, at_least: float) -> tuple[Target, ...]:
    return tuple(
        Target(
            direction, "all-in", Shape(2, 4096, 16, 16, 256), "bfloat16", is_causal,
            peers=_peers(256), at_least=at_least,
        )
        for is_causal in (False, True)
    )  # fmt: skip


def _of_the_original(
    direction: str, at_least: dict[int, float], at_most_us: Mapping[int, float] = {}
) -> tuple[Target, ...]:
    """Full, causal, and with a quarter of the keys masked."""
    return tuple(
        Target(
            direction, "all-in", Shape(4, t, 8, 8, 64), "float16", is_causal, mask_prob,
            peers=_peers(64), at_least=ratio, at_most_us=at_most_us.get(t),
        )
        for t, ratio in at_least.items()
        for is_causal, mask_prob in ((False, 0.0), (True, 0.0), (False, 0.25))
    )  # fmt: skip


def _of_float32(precision: str | None, peers: tuple[str, ...], ratio: float) -> tuple[Target, ...]:
    """One pass over TF32 by default, three at "highest"."""
    return tuple(
        Target(
            "bwd", "all-in", Shape(4, t, 8, 8, 64), "float32", is_causal,
            precision=precision, peers=peers, at_least=ratio,
        )
        for t in (1024, 2048, 4096, 8192)
        for is_causal in (False, True)
    )  # fmt: skip


def _forward_and_backward(backward: Iterable[Target]) -> tuple[Target, ...]:
    """What is asked of them depends on what the parts reach."""
    return tuple(target._replace(direction="both", at_least=None) for target in backward)


# How time and memory grow, from GROWTH_FROM queries up.
GROWTH = tuple(
    Target("fwd", "all-in", Shape(1, t, 8, 8, 128), "bfloat16")
    for t in (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
)
GROWTH_FROM = 8192

_SHORT, _LONG = (128, 256, 512, 1024), (2048, 4096, 8192)
_BACKWARD = (
    *_by_length(
        "bwd", 64, {512: 1.6, 1024: 1.4, 2048: 1.15, 4096: 1.15, 16_384: 1.05}, causal={512: 2.0}
    ),
    *_by_length("bwd", 128, {512: 1.6, 1024: 1.4, 2048: 1.15, 4096: 1.15, 16_384: 1.05}),
    *_of_h256("bwd", 1.3),
    *_of_the_original("bwd", dict.fromkeys(_SHORT + _LONG, 1.1)),
)
_EVERY = (512, 1024, 2048, 4096, 16_384)

TARGETS = {
    "hopper-forward": (
        *_by_length("fwd", 64, {512: 1.5, 1024: 1.4, 2048: 1.28, 4096: 1.28, 16_384: 1.28}),
        *_by_length("fwd", 128, {512: 1.4, 1024: 1.25, 2048: 1.1, 4096: 1.1, 16_384: 1.07}),
        *_by_length("fwd", 64, dict.fromkeys(_EVERY, 1.2), "kernel", ("cudnn",)),
        *_by_length(
            "fwd", 128, dict.fromkeys(_EVERY, 1.0) | {16_384: 1.06}, "kernel",
            ("cudnn", "flash_attn3_jax"),
        ),
        *_of_h256("fwd", 1.05),
        *_of_the_original(
            "fwd", dict.fromkeys(_SHORT, 1.1) | dict.fromkeys(_LONG, 1.2), at_most_us={128: 5.0}
        ),
        Target(
            "fwd", "all-in", Shape(4, 4096, 32, 8, 128), "bfloat16", True,
            peers=_peers(128), at_least=1.1,
        ),
        *GROWTH,
        # Beside the same without residuals, above.
        *(
            Target("fwd+res", "all-in", shape, "bfloat16")
            for shape in (
                Shape(4, 4096, 32, 32, 64), Shape(4, 4096, 16, 16, 128), Shape(2, 4096, 16, 16, 256)
            )
        ),
        *(
            Target(
                "fwd", "all-in", Shape(1, 1024, 4, 4, h), dtype, peers=("cudnn",), accuracy=True
            )
            for h in (64, 128, 256)
            for dtype in ("float16", "bfloat16")
        ),
    ),
    "hopper-backward": (
        *_BACKWARD,
        *_forward_and_backward(_BACKWARD),
        *_by_length("bwd", 64, {16_384: 1.1}, "kernel", ("cudnn",)),
        *_by_length("bwd", 128, {16_384: 1.0}, "kernel", ("flash_attn3_jax",)),
        *_of_float32(None, ("xla", "tokamax"), 1.5),
        *_of_float32("highest", ("xla",), 2.0),
    ),
}  # fmt: skip
