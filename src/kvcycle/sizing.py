"""The KV cache's size from the model's config alone: the expectation that no measurement had a part in.

Formula (sglang-jax 0.1.0rc0, ``MHATokenToKVPool._create_buffers``; the same arithmetic reproduces the reference run's
2,415,992,832 bytes): layers x (tokens + one page of padding per data-parallel rank) x KV heads after replication
x 2 (K and V) x head_dim x bytes per element.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "bf16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}

#: Models whose every layer keeps one plain multi-head KV buffer, so that the formula above is the whole truth.
PLAIN_KV_MODELS = frozenset({"qwen2", "qwen3", "qwen3_moe", "llama", "qwen2_moe", "mistral"})


@dataclass(frozen=True)
class KVPrediction:
    """Predicted KV bytes, summed and on each of the ``tp_size`` devices (all equal); who says so, and how."""

    total_bytes: int
    bytes_per_device: int
    formula: str
    by: str = "config arithmetic"


def head_dim_of(config: Mapping[str, Any]) -> int:
    """The width of one head: ``head_dim`` if the config has it, else hidden size / attention heads."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def kv_heads_on_devices(kv_heads: int, attention_tp: int) -> int:
    """KV heads summed over the devices of one data-parallel rank: fewer heads than devices are replicated."""
    return max(kv_heads, attention_tp)


def predict_kv(config: Mapping[str, Any], engine: Mapping[str, Any]) -> KVPrediction | None:
    """Predict the KV cache's bytes for a Hugging Face config and an engine's arguments.

    Args:
        config: the model's config.json.
        engine: ``tp_size``, ``dp_size``, ``page_size``, ``max_total_tokens`` (per data-parallel rank),
            ``kv_cache_dtype`` and ``dtype`` are read; sglang-jax's defaults hold for what is missing.

    Returns:
        The prediction, or None where config arithmetic does not decide it: another pool kind than plain multi-head,
        or a capacity that the engine takes from free memory (no ``max_total_tokens``).
    """
    if config.get("model_type") not in PLAIN_KV_MODELS or engine.get("max_total_tokens") is None:
        return None
    tp, dp, page = (int(engine.get(key) or 1) for key in ("tp_size", "dp_size", "page_size"))
    kv_dtype = engine.get("kv_cache_dtype") or "auto"
    dtype = engine.get("dtype") or "auto"
    model_dtype = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    resolved = kv_dtype if kv_dtype != "auto" else (dtype if dtype != "auto" else model_dtype)
    item = ITEM_BYTES.get(str(resolved))
    if item is None:
        return None
    layers = int(config["num_hidden_layers"])
    heads = kv_heads_on_devices(int(config.get("num_key_value_heads") or config["num_attention_heads"]), tp // dp)
    # The native and the fa backend both store heads padded to the TPU's 128 lanes.
    width = -(-head_dim_of(config) // 128) * 128
    tokens = int(engine["max_total_tokens"]) // page * page * dp
    total = layers * (tokens + page * dp) * heads * 2 * width * item
    formula = (
        f"{layers} layers x ({tokens} tokens + {page * dp} of padding) x {heads} KV heads x 2 (K and V) "
        f"x {width} x {item} B = {total:,} B"
    )
    return KVPrediction(total_bytes=total, bytes_per_device=total // tp, formula=formula)


def estimate_params_bytes(config: Mapping[str, Any], engine: Mapping[str, Any]) -> int:
    """Bytes of a dense decoder's weights summed over the devices: an estimate, for asking whether memory suffices.

    Embedding (twice if untied), attention and MLP matrices, with KV heads replicated as the engine does it; norms and
    biases are left out (0.03 % on Qwen2.5-3B). The exact figure is the TPU compiler's, or the running engine's.
    """
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    head_dim = head_dim_of(config)
    heads = int(config["num_attention_heads"])
    tp, dp = (int(engine.get(key) or 1) for key in ("tp_size", "dp_size"))
    kv_heads = kv_heads_on_devices(int(config.get("num_key_value_heads") or heads), tp // dp)
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    mlp = 3 * hidden * int(config["intermediate_size"])
    embeddings = int(config["vocab_size"]) * hidden * (1 if config.get("tie_word_embeddings") else 2)
    dtype = engine.get("dtype") or "auto"
    item = ITEM_BYTES.get(str(config.get("torch_dtype", "bfloat16") if dtype == "auto" else dtype), 2)
    return (layers * (attention + mlp) + embeddings) * item * dp
