"""Cosine attention for Flax: drop-ins for its multi-head attention, in nnx and in linen.

- `nnx.MultiHeadCosineAttention`: for `flax.nnx.MultiHeadAttention`
- `linen.MultiHeadCosineAttention`: for `flax.linen.MultiHeadDotProductAttention`
- `attention_fn`: the `attention_fn` of both Flax modules
"""

try:
    import flax as _flax  # noqa: F401
except ImportError as error:
    raise ImportError(
        "jax_cosine_attn.flax needs Flax: pip install 'jax_cosine_attn[flax]'"
    ) from error

from jax_cosine_attn.flax import linen as linen
from jax_cosine_attn.flax import nnx as nnx
from jax_cosine_attn.flax._core import attention_fn as attention_fn
