"""The shapes that the benchmark runs, in one place."""

from typing import NamedTuple


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
        return forward * (0.5 if is_causal else 1.0) * {"fwd": 1.0, "bwd": 2.5}[direction]


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
    """A time to beat: the best peer's is at least `at_least` times ours; None: no peer is asked."""

    direction: str
    mode: str
    shape: Shape
    dtype: str
    is_causal: bool = False
    mask_prob: float = 0.0
    at_least: float | None = None


def _by_length(
    direction: str, head_dim: int, at_least: dict[int, float], mode: str = "all-in"
) -> tuple[Target, ...]:
    """16,384 tokens and N * H = 2048, full and causal."""
    return tuple(
        Target(
            direction, mode, Shape(16_384 // t, t, 2048 // head_dim, 2048 // head_dim, head_dim),
            "bfloat16", is_causal, at_least=ratio,
        )
        for t, ratio in at_least.items()
        for is_causal in (False, True)
    )  # fmt: skip


def _of_the_original(direction: str, at_least: dict[int, float]) -> tuple[Target, ...]:
    """Full, causal, and with a quarter of the keys masked."""
    return tuple(
        Target(
            direction, "all-in", Shape(4, t, 8, 8, 64), "float16", is_causal, mask_prob, ratio
        )
        for t, ratio in at_least.items()
        for is_causal, mask_prob in ((False, 0.0), (True, 0.0), (False, 0.25))
    )  # fmt: skip


_SHORT, _LONG = (128, 256, 512, 1024), (2048, 4096, 8192)
_H256 = Shape(2, 4096, 16, 16, 256)

TARGETS = {
    "hopper-forward": (
        *_by_length("fwd", 64, {512: 1.5, 1024: 1.4, 2048: 1.28, 4096: 1.28, 16_384: 1.28}),
        *_by_length("fwd", 128, {512: 1.4, 1024: 1.25, 2048: 1.1, 4096: 1.1, 16_384: 1.07}),
        *_by_length("fwd", 64, dict.fromkeys((512, 1024, 4096, 16_384), 1.2), "kernel"),
        *_by_length("fwd", 128, {512: 1.0, 1024: 1.0, 4096: 1.0, 16_384: 1.06}, "kernel"),
        Target("fwd", "all-in", _H256, "bfloat16", at_least=1.05),
        *_of_the_original("fwd", dict.fromkeys(_SHORT, 1.1) | dict.fromkeys(_LONG, 1.2)),
        Target("fwd", "all-in", Shape(4, 4096, 32, 8, 128), "bfloat16", True, at_least=1.1),
        *(
            Target("fwd", "all-in", Shape(1, t, 8, 8, 128), "bfloat16")
            for t in (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
        ),
    ),
    "hopper-backward": (
        *_by_length("bwd", 64, {512: 1.6, 1024: 1.4, 2048: 1.15, 4096: 1.15, 16_384: 1.05}),
        *_by_length("bwd", 128, {512: 1.6, 1024: 1.4, 2048: 1.15, 4096: 1.15, 16_384: 1.05}),
        *_by_length("bwd", 64, {16_384: 1.1}, "kernel"),
        *_by_length("bwd", 128, {16_384: 1.0}, "kernel"),
        Target("bwd", "all-in", _H256, "bfloat16", at_least=1.3),
        *_of_the_original("bwd", dict.fromkeys(_SHORT + _LONG, 1.1)),
    ),
}
