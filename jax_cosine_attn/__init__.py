"""Cosine-similarity attention for JAX: softmax attention over l2-normed queries and keys."""

from jax_cosine_attn._api import cosine_attention as cosine_attention
from jax_cosine_attn._api import why_not as why_not
from jax_cosine_attn._ffi import has_cuda_kernels as has_cuda_kernels
from jax_cosine_attn._ffi import show_config as show_config
from jax_cosine_attn._l2norm import l2norm as l2norm
from jax_cosine_attn._l2norm import l2norm_tensors as l2norm_tensors
from jax_cosine_attn.compat import flash_cosine_sim_attention as flash_cosine_sim_attention
from jax_cosine_attn.compat import plain_cosine_sim_attention as plain_cosine_sim_attention
from jax_cosine_attn.parallel import merge_partials as merge_partials

__version__ = "0.1.0"
