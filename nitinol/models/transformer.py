"""The decoder-only transformer that all architectures here share (Vaswani et al., 2017; Touvron et al., 2023).

They differ in their attention: a function `attend(x, block, rope, position, keys, values, config)` in a file of its
own. Weights are GGUF's tensors under llama.cpp's names, see weights.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from nitinol.models.config import Config
from nitinol.ops.linear import linear, swiglu
from nitinol.ops.norm import rms_norm
from nitinol.ops.quantized import embedding

Attend = Callable[..., Any]


def forward(attend: Attend, weights: SimpleNamespace, config: Config, tokens: Any, position: Any,
            cache: Sequence[tuple[Any, Any]]) -> Any:
    """The normed output of the last block for each token, float32 [T, hidden].

    tokens: int32 [T]; position: int32 [1], that of the first token; cache: keys and values of each block, which the
    tokens read from and are added to.
    """
    x = embedding(weights.token_embd, tokens, "float32")
    for block, (keys, values) in zip(weights.blocks, cache):
        h = rms_norm(x, block.attn_norm, config.epsilon)
        h = attend(h, block, weights.rope, position, keys, values, config)
        x = linear(h, block.attn_output, residual=x)
        h = rms_norm(x, block.ffn_norm, config.epsilon)
        h = swiglu(h, block.ffn_gate, block.ffn_up)
        x = linear(h, block.ffn_down, residual=x)
    return rms_norm(x, weights.output_norm, config.epsilon)


def logits(weights: SimpleNamespace, x: Any) -> Any:
    """Scores of all tokens of the vocabulary, float32 [T, vocabulary], from `forward`'s result."""
    return linear(x, weights.output)
