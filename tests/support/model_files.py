"""Small models for tests: random transformers models as GGUF files, and random files of every format."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nitinol.formats.blocks import FORMATS
from nitinol.formats.gguf_writer import TensorSource, write_gguf
from nitinol.formats.quantization import dequantize

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import make_random_model as random_model

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
               "post_feedforward_layernorm": "post_ffw_norm"}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
       "lm_head.weight": "output.weight"}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}
LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0}


def transformers_model(arch: str, seed: int, *, tied: bool = False, rope: dict[str, Any] | None = None,
                       **sizes: Any) -> Any:
    """A random model of transformers, float32: 2 layers, width 64, 4 heads that share 2, 300 tokens. "mistral" is a
    llama with a window. `rope`: of a gemma3, that of the layers without a window."""
    import torch
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 128} | sizes
    if arch in ("qwen3", "gemma3"):
        sizes.setdefault("head_dim", 32)  # not width / heads
    parameters = {"rope_type": "default", "rope_theta": 10000.0} | (rope or {})
    kinds = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3"}
    make_config = getattr(transformers, f"{kinds[arch]}{'Text' if arch == 'gemma3' else ''}Config")
    if arch == "gemma3":
        sizes = {"num_hidden_layers": 7, "sliding_window": 10, "query_pre_attn_scalar": sizes["head_dim"]} | sizes
        parameters = {"full_attention": parameters | {"rope_theta": 1000000.0},
                      "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    config = make_config(tie_word_embeddings=tied, rope_parameters=parameters, **sizes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kinds[arch]}ForCausalLM")(config).eval()
    with torch.no_grad():  # far from the initial values, under which an omitted norm or bias would not show
        for name, value in model.named_parameters():
            if "norm" in name:
                value.copy_((arch != "gemma3") + 0.3 * torch.randn_like(value))
            else:
                value.copy_(torch.randn_like(value) * (0.3 if value.ndim == 1 else 1.5 * value.shape[-1] ** -0.5))
    return model


def write_transformers_model(path: Path, model: Any, arch: str) -> None:
    """Its weights as F32 under llama.cpp's names; for `llama`, rows of queries and keys in the order of pairs; for
    `gemma3`, norms with 1 added."""
    arch = "llama" if arch == "mistral" else arch
    names = NAMES | (GEMMA_NAMES if arch == "gemma3" else {})
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    window = getattr(config, "sliding_window", None) if arch in ("llama", "gemma3") else None
    if arch == "gemma3":
        rope = rope["full_attention"]

    def converted() -> Iterator[TensorSource]:
        for name, value in model.state_dict().items():
            array = value.detach().numpy() + (1.0 if arch == "gemma3" and "norm" in name else 0.0)
            if name in TOP:
                if name != "lm_head.weight" or not config.tie_word_embeddings:
                    yield TensorSource(TOP[name], array.shape, "F32", array)
                continue
            _, _, layer, *middle, kind = name.split(".")
            short = names[".".join(middle)]
            if arch == "llama" and short in heads:
                array = np.ascontiguousarray(array.reshape(heads[short], 2, head_dim // 2, *array.shape[1:])
                                             .swapaxes(1, 2)).reshape(array.shape)
            yield TensorSource(f"blk.{layer}.{short}.{kind}", array.shape, "F32", array)
        if rope["rope_type"] == "llama3":
            plain = rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
            divisors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
            yield TensorSource("rope_freqs.weight", divisors.shape, "F32", divisors)

    metadata = {
        "general.architecture": arch,
        "general.name": f"random {arch}",
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
        f"{arch}.rope.dimension_count": head_dim,
        **tokenizer_metadata(config.vocab_size),
    }
    if rope["rope_type"] == "linear":
        metadata |= {f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": float(rope["factor"])}
    if window:
        metadata[f"{arch}.attention.sliding_window"] = window
    write_gguf(path, metadata, list(converted()))


def tokenizer_metadata(vocab: int, arch: str = "llama") -> dict[str, Any]:
    """A byte-level tokenizer: 256 bytes, a few merges, then special tokens."""
    return random_model.tokenizer(random_model.PRESETS["tiny"]._replace(arch=arch, vocab=vocab))


def random_file(path: Path, format: str = "Q8_0", arch: str = "llama", seed: int = 0, chat: bool = False,
                change: dict[str, Any] | None = None, **sizes: Any) -> Path:
    """A random model: 2 layers, width 256 (K formats need that), 512 tokens; `change` replaces metadata, where
    None removes a key."""
    shape = random_model.PRESETS["tiny"]._replace(arch=arch, vocab=512, context=256, **sizes)
    metadata = random_model.metadata(shape, format, f"random {format}")
    if chat:
        metadata["tokenizer.chat_template"] = CHAT_TEMPLATE
    metadata = {key: value for key, value in (metadata | (change or {})).items() if value is not None}
    write_gguf(path, metadata, random_model.tensors(shape, format, seed))
    return path


# A Gemma 3 of two layers, one of which sees fewer tokens than a short test has.
SMALL_WINDOW = {"gemma3.attention.sliding_window": 6, "gemma3.attention.sliding_window_pattern": 2}


def mixed_file(path: Path, first: int, seed: int) -> Path:
    """A random model whose matrices have all formats in turn, beginning with number `first`, as real files mix them."""
    shape = random_model.PRESETS["tiny"]._replace(vocab=512, context=256, ffn=768, tied=False)
    formats = [name for name in FORMATS if name != "F32"]
    choices = {format: {t.name: t for t in random_model.tensors(shape, format, seed)} for format in formats}
    chosen, turn = [], first
    for name, tensor in choices["F16"].items():
        if tensor.format == "F32":
            chosen.append(tensor)
        else:
            wanted = formats[turn % len(formats)]
            turn += not name.endswith("ffn_gate.weight")  # gate and up alike: one kernel computes both
            if wanted != choices[wanted][name].format:  # the output, which narrow formats have as Q6_K
                wanted = "Q6_K"
            chosen.append(choices[wanted][name])
    write_gguf(path, random_model.metadata(shape, "F16", "mixed"), chosen)
    return path


CHAT_TEMPLATE = ("{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
                 "{% if add_generation_prompt %}<assistant>{% endif %}")


def dequantized_copy(source: Path, target: Path) -> Path:
    """The same model with every weight as F32."""
    from nitinol.formats.gguf import open_gguf

    with open_gguf(source) as file:
        write_gguf(target, file.metadata, [
            TensorSource(t.name, t.shape, "F32", dequantize(t.data, t.format, t.shape)) for t in file.tensors.values()])
    return target
