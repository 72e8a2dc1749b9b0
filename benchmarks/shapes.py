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
