"""The KV cache's size from the model's config alone: the expectation that no measurement had a part in.

The arithmetic is that of the pools of sglang-jax 0.1.0rc0 and 0.0.3rc0, which are equally large: one function each,
written anew from their shapes; that of ``MHATokenToKVPool`` reproduces the reference run's 2,415,992,832 bytes. Every
figure is summed over the devices: what is replicated counts as often as there are copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "bf16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}

#: What a TPU aligns an array's last axis to: heads and latents are stored that wide.
LANES = 128

#: Models whose every layer keeps one plain multi-head KV buffer.
PLAIN_KV_MODELS = frozenset({"qwen2", "qwen3", "qwen3_moe", "llama", "qwen2_moe", "mistral"})


#: Models that keep one latent a token instead of heads, if a backend serves them that knows how.
MLA_MODELS = frozenset({"deepseek_v2", "deepseek_v3"})


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


def lanes(width: int) -> int:
    """A width as it is stored: rounded up to whole lanes."""
    return -(-width // LANES) * LANES


def mha_pool_bytes(
    *, layers: int, tokens: int, page_size: int, dp_size: int, heads: int, head_dim: int, item_bytes: int
) -> int:
    """Bytes of an ``MHATokenToKVPool``: keys and values of all tokens, and a page of padding for each rank.

    Args:
        layers: how many have a buffer.
        tokens: of all data-parallel ranks.
        page_size: tokens a page.
        dp_size: data-parallel ranks.
        heads: KV heads after replication.
        head_dim: width of one, stored in whole lanes.
        item_bytes: bytes of one element.
    """
    return layers * (tokens + page_size * dp_size) * heads * 2 * lanes(head_dim) * item_bytes


def mla_pool_bytes(
    *,
    layers: int,
    tokens: int,
    page_size: int,
    dp_size: int,
    copies: int,
    lora_rank: int,
    rope_dim: int,
    item_bytes: int,
    indexer_layers: int = 0,
    indexer_dim: int = 0,
) -> int:
    """Bytes of an ``MLATokenToKVPool``: one latent and one rotary part a token, each stored in whole lanes.

    A page is stored in rows of 4 bytes, so pages of one bf16 token take two. There is no head to shard: every device
    of a data-parallel rank has a copy.

    Args:
        layers: how many have a buffer.
        tokens: of all data-parallel ranks.
        page_size: tokens a page.
        dp_size: data-parallel ranks.
        copies: devices of one rank, tp_size / dp_size.
        lora_rank: width of the latent.
        rope_dim: width of the rotary part.
        item_bytes: bytes of one element.
        indexer_layers: layers that also keep an indexer's keys.
        indexer_dim: width of those.
    """
    packing = 4 // item_bytes
    rows = -(-page_size // packing) * packing
    pages = (tokens + page_size * dp_size) // page_size
    widths = layers * (lanes(lora_rank) + lanes(rope_dim)) + indexer_layers * lanes(indexer_dim)
    return pages * rows * widths * item_bytes * copies


def recurrent_pool_bytes(
    *,
    layers: int,
    slots: int,
    dp_size: int,
    heads: int,
    head_dim: int,
    conv_kernel: int,
    k_heads: int | None = None,
    k_head_dim: int | None = None,
    state_item_bytes: int = 4,
    conv_item_bytes: int = 2,
) -> int:
    """Bytes of a ``RecurrentStatePool``: a state of head_dim² a head, and the convolution's last inputs, per request.

    Args:
        layers: linear-attention layers.
        slots: states of all data-parallel ranks; each rank has one more, for padding.
        dp_size: data-parallel ranks.
        heads: value heads.
        head_dim: width of a value head.
        conv_kernel: taps of the convolution.
        k_heads: key heads where they differ from the value heads.
        k_head_dim: their width where it differs.
        state_item_bytes: bytes of one element of a state (float32 by default).
        conv_item_bytes: bytes of one element of the convolution's inputs (bfloat16 by default).
    """
    projection = heads * head_dim + 2 * (k_heads or heads) * (k_head_dim or head_dim)
    state = heads * head_dim * head_dim * state_item_bytes
    return layers * (slots + dp_size) * (state + projection * (conv_kernel - 1) * conv_item_bytes)


def relay_buffer_bytes(
    *, requests: int, dp_size: int, copies: int, steps: int = 0, hidden: int = 0, item_bytes: int = 0
) -> int:
    """Bytes of a draft worker's relay buffers: what a request's next step needs of its last, each on every device.

    Args:
        requests: entries of the request pool.
        dp_size: data-parallel ranks.
        copies: devices of one rank, tp_size / dp_size.
        steps: draft steps whose best tokens are kept (``SpecRelayBuffers``; 0 for ``DFlashRelayBuffers``).
        hidden: width of the hidden state that is kept; 0 as above.
        item_bytes: bytes of one element of it.
    """
    # A verified token and a length, as int32, are in both kinds.
    return dp_size * requests * (steps * 4 + hidden * item_bytes + 4 + 4) * copies


def swa_tokens(
    max_total_tokens: int, *, full_layers: int, window_layers: int, ratio: float, alignment: int
) -> tuple[int, int]:
    """Tokens of the full pool and of the sliding-window pool, into which a ``SWAKVPool`` splits a capacity.

    The layers share what ``max_total_tokens`` in every layer would take, such that a window layer has ``ratio`` times
    the tokens of a full one, rounded down to ``alignment`` (a page for each data-parallel rank).
    """
    full = int(max_total_tokens * (full_layers + window_layers) / (ratio * window_layers + full_layers))
    window = int(full * ratio)
    return full - full % alignment, window - window % alignment


def predict_kv(config: Mapping[str, Any], engine: Mapping[str, Any]) -> KVPrediction | None:
    """Predict the KV cache's bytes for a Hugging Face config and an engine's arguments.

    Args:
        config: the model's config.json.
        engine: ``tp_size``, ``dp_size``, ``page_size``, ``max_total_tokens`` (per data-parallel rank),
            ``kv_cache_dtype`` and ``dtype`` are read; sglang-jax's defaults hold for what is missing.

    Returns:
        The prediction, or None where config arithmetic does not decide it: a model whose pools it does not know, a
        capacity that the engine takes from free memory (no ``max_total_tokens``; for recurrent states neither
        ``max_recurrent_state_size`` nor a ``max_running_requests`` without radix cache), a draft model beside it.
    """
    if engine.get("max_total_tokens") is None or engine.get("speculative_algorithm"):
        return None
    tp, dp, page = (int(engine.get(key) or 1) for key in ("tp_size", "dp_size", "page_size"))
    item = _item_bytes(config, engine)
    if item is None:
        return None
    tokens = int(engine["max_total_tokens"]) // page * page * dp
    model = config.get("model_type")
    if model in PLAIN_KV_MODELS or (model == "gemma2" and not _has_window(config, engine)):
        total, formula = _plain(config, tokens, page, dp, tp, item)
    elif model == "gemma2":
        total, formula = _sliding_window(config, engine, tokens, page, dp, tp, item)
    elif model in MLA_MODELS and (engine.get("attention_backend") or "fa") in ("fa", "dsa_sparse"):
        total, formula = _latent(config, engine, tokens, page, dp, tp, item)
    elif model == "kimi_linear" and (slots := _state_slots(engine)) is not None:
        states, of_states = _states(config, slots, dp)
        if (engine.get("attention_backend") or "fa") == "native":  # which unfolds the latents into heads
            head_dim = int(config["qk_nope_head_dim"]) + int(config["qk_rope_head_dim"])
            layers = int(config["num_hidden_layers"]) - len(config["linear_attn_config"]["kda_layers"])
            unfolded = dict(config) | {"head_dim": head_dim, "num_hidden_layers": layers}
            total, formula = _plain(unfolded, tokens, page, dp, tp, item)
        else:
            total, formula = _latent(config, engine, tokens, page, dp, tp, item)
        total, formula = total + states, f"{formula} + {of_states}"
    else:
        return None
    return KVPrediction(total_bytes=total, bytes_per_device=total // tp, formula=f"{formula} = {total:,} B")


def _item_bytes(config: Mapping[str, Any], engine: Mapping[str, Any]) -> int | None:
    kv_dtype = engine.get("kv_cache_dtype") or "auto"
    dtype = engine.get("dtype") or "auto"
    model_dtype = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    return ITEM_BYTES.get(str(kv_dtype if kv_dtype != "auto" else (dtype if dtype != "auto" else model_dtype)))


def _heads(config: Mapping[str, Any], attention_tp: int) -> int:
    return kv_heads_on_devices(int(config.get("num_key_value_heads") or config["num_attention_heads"]), attention_tp)


def _plain(config: Mapping[str, Any], tokens: int, page: int, dp: int, tp: int, item: int) -> tuple[int, str]:
    layers, heads, head_dim = int(config["num_hidden_layers"]), _heads(config, tp // dp), head_dim_of(config)
    total = mha_pool_bytes(
        layers=layers, tokens=tokens, page_size=page, dp_size=dp, heads=heads, head_dim=head_dim, item_bytes=item
    )
    return total, (
        f"{layers} layers x ({tokens} tokens + {page * dp} of padding) x {heads} KV heads x 2 (K and V) "
        f"x {lanes(head_dim)} x {item} B"
    )


def _has_window(config: Mapping[str, Any], engine: Mapping[str, Any]) -> bool:
    return int(config.get("sliding_window") or 0) > 0 and not engine.get("disable_hybrid_swa_memory")


def _sliding_window(
    config: Mapping[str, Any], engine: Mapping[str, Any], tokens: int, page: int, dp: int, tp: int, item: int
) -> tuple[int, str]:
    layers, heads, head_dim = int(config["num_hidden_layers"]), _heads(config, tp // dp), head_dim_of(config)
    # Where the config does not say, transformers lets every second layer see everything, the first one not.
    kinds = config.get("layer_types") or [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    full_layers = sum(kind == "full_attention" for kind in kinds)
    ratio = engine.get("swa_full_tokens_ratio")
    full, window = swa_tokens(
        tokens,
        full_layers=full_layers,
        window_layers=layers - full_layers,
        ratio=0.8 if ratio is None else float(ratio),
        alignment=page * dp,
    )
    total = sum(
        mha_pool_bytes(
            layers=count, tokens=size, page_size=page, dp_size=dp, heads=heads, head_dim=head_dim, item_bytes=item
        )
        for count, size in ((full_layers, full), (layers - full_layers, window))
    )
    return total, (
        f"({full_layers} full layers x ({full} tokens + {page * dp} of padding) + {layers - full_layers} window layers "
        f"x ({window} + {page * dp})) x {heads} KV heads x 2 (K and V) x {lanes(head_dim)} x {item} B"
    )


def _latent(
    config: Mapping[str, Any], engine: Mapping[str, Any], tokens: int, page: int, dp: int, tp: int, item: int
) -> tuple[int, str]:
    # Layers of linear attention keep a state instead.
    layers = int(config["num_hidden_layers"]) - len((config.get("linear_attn_config") or {}).get("kda_layers", ()))
    lora_rank, rope_dim = int(config["kv_lora_rank"]), int(config["qk_rope_head_dim"])
    indexers = indexer_dim = 0
    if engine.get("attention_backend") == "dsa_sparse":
        kinds = config.get("indexer_types") or ["full"] * layers
        indexers, indexer_dim = sum(kind == "full" for kind in kinds), int(config["index_head_dim"])
    total = mla_pool_bytes(
        layers=layers, tokens=tokens, page_size=page, dp_size=dp, copies=tp // dp, lora_rank=lora_rank,
        rope_dim=rope_dim, item_bytes=item, indexer_layers=indexers, indexer_dim=indexer_dim,
    )  # fmt: skip
    packing = 4 // item
    return total, (
        f"{tp // dp} copies of {(tokens + page * dp) // page} pages x {-(-page // packing) * packing} rows x ({layers} "
        f"layers x ({lanes(lora_rank)} + {lanes(rope_dim)}) + {indexers} indexers x {lanes(indexer_dim)}) x {item} B"
    )


def _state_slots(engine: Mapping[str, Any]) -> int | None:
    """States of all requests where the arguments say how many; else the engine takes them from free memory."""
    if (engine.get("attention_backend") or "fa") not in ("fa", "native"):
        return None
    if (slots := engine.get("max_recurrent_state_size")) is not None:
        return int(slots)
    requests = engine.get("max_running_requests")
    return int(requests) if engine.get("disable_radix_cache") and requests is not None else None


def _states(config: Mapping[str, Any], slots: int, dp: int) -> tuple[int, str]:
    linear = config["linear_attn_config"]
    layers, heads, head_dim = len(linear["kda_layers"]), int(linear["num_heads"]), int(linear["head_dim"])
    kernel = int(linear["short_conv_kernel_size"])
    total = recurrent_pool_bytes(
        layers=layers, slots=slots, dp_size=dp, heads=heads, head_dim=head_dim, conv_kernel=kernel
    )
    return total, (
        f"{layers} linear layers x ({slots} states + {dp} of padding) x {heads} heads x {head_dim} x ({head_dim} x 4 B "
        f"of state + 3 x {kernel - 1} x 2 B of convolution)"
    )


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
