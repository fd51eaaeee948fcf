"""The bundled model as a plain function of its weights, and its GGUF file.

Weights are a dictionary under GGUF's tensor names, so that one `forward` serves training, the finished
model and what comes back out of the file. The rotary embedding turns neighbouring pairs of a head's
components, which is the layout of GGUF's `llama` architecture: nothing needs to be permuted on export.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType
from tokenizers import Tokenizer
from torch import Tensor

END = "<|endoftext|>"  # stands before every document: beginning and end of text are the same token


@dataclass(frozen=True)
class Config:
    """15.5 MB in Q8_0: deep and narrow, since depth helps code more than width does at this size."""

    vocabulary: int = 8192
    width: int = 384
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    feed_forward: int = 896
    context: int = 1024
    rope_base: float = 10000.0
    epsilon: float = 1e-5

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def initial_weights(config: Config, device: str) -> dict[str, Tensor]:
    """Normal with deviation 0.02 for the embedding, 1 / sqrt(inputs) for matrices, and ones for norms.

    The matrices that write to the residual stream start at zero, so that every block starts as identity.
    """
    width, kv_width = config.width, config.kv_heads * config.head_width
    weights = {"token_embd.weight": 0.02 * torch.randn(config.vocabulary, width)}
    for layer in range(config.layers):
        block = f"blk.{layer}."
        shapes = {
            "attn_q": (width, width),
            "attn_k": (kv_width, width),
            "attn_v": (kv_width, width),
            "ffn_gate": (config.feed_forward, width),
            "ffn_up": (config.feed_forward, width),
        }
        for name, shape in shapes.items():
            weights[f"{block}{name}.weight"] = torch.randn(shape) * shape[1] ** -0.5
        weights[block + "attn_output.weight"] = torch.zeros(width, width)
        weights[block + "ffn_down.weight"] = torch.zeros(width, config.feed_forward)
        weights[block + "attn_norm.weight"] = torch.ones(width)
        weights[block + "ffn_norm.weight"] = torch.ones(width)
    weights["output_norm.weight"] = torch.ones(width)
    return {name: weight.to(device).requires_grad_() for name, weight in weights.items()}


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary position embedding of `x` [batch, heads, time, head_width], on pairs (2i, 2i + 1)."""
    time, width = x.shape[-2:]
    frequency = base ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angle = torch.arange(time, device=x.device, dtype=torch.float32)[:, None] * frequency
    cosine, sine = angle.cos(), angle.sin()
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1)
    return turned.flatten(-2).to(x.dtype)


def forward(weights: dict[str, Tensor], tokens: Tensor, config: Config) -> Tensor:
    """Logits [batch, time, vocabulary] for token ids [batch, time]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (config.width,), weights[name + ".weight"], config.epsilon)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[name + ".weight"])

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, config.head_width)).transpose(1, 2)

    x = F.embedding(tokens, weights["token_embd.weight"])
    for layer in range(config.layers):
        block = f"blk.{layer}."
        h = norm(x, block + "attn_norm")
        query = rotate(heads(linear(h, block + "attn_q")), config.rope_base)
        key = rotate(heads(linear(h, block + "attn_k")), config.rope_base)
        value = heads(linear(h, block + "attn_v"))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + linear(attended.transpose(1, 2).flatten(-2), block + "attn_output")
        h = norm(x, block + "ffn_norm")
        x = x + linear(F.silu(linear(h, block + "ffn_gate")) * linear(h, block + "ffn_up"), block + "ffn_down")
    return linear(norm(x, "output_norm"), "token_embd")


@torch.no_grad()
def generate(
    weights: dict[str, Tensor], config: Config, prompt: list[int], count: int, temperature: float = 0.0, seed: int = 0
) -> list[int]:
    """Up to `count` token ids that follow `prompt`; greedy at temperature 0; stops after the end token (id 0)."""
    device = weights["token_embd.weight"].device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([prompt], device=device)
    while tokens.shape[1] < min(len(prompt) + count, config.context):
        logits = forward(weights, tokens, config)[:, -1].float()
        if temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat((tokens, chosen), 1)
        if chosen.item() == 0:
            break
    return tokens[0, len(prompt) :].tolist()


def write_gguf(path: Path, weights: dict[str, Tensor], config: Config, tokenizer: Tokenizer) -> None:
    """Write matrices in Q8_0 and norms in F32, with the metadata that llama.cpp expects of a `llama` model."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Nitinol demo")
    writer.add_description("A small language model of Python source code, bundled with Nitinol")
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.add_size_label(f"{sum(weight.numel() for weight in weights.values()) / 1e6:.0f}M")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocabulary)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.feed_forward)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.epsilon)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [gguf.TokenType.CONTROL if token == END else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    for name, weight in weights.items():
        values = weight.detach().float().cpu().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The file's tensors, dequantised to float32."""
    reader = gguf.GGUFReader(path)
    arrays = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return {name: torch.from_numpy(np.array(array, np.float32)).to(device) for name, array in arrays.items()}
