"""Writes the tiny checkpoints: real Hugging Face folders (config, tokenizer, seeded weights), no download.

The weights are random but seeded, with an untied head and a scale at which greedy decoding wanders through many token
ids. Dummy weights, or tied embeddings, repeat one id for ever, and a same-output check on those proves nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

BUILTIN_PREFIX = "builtin:"

#: Raised by one whenever the bytes this module writes for the same config change, so that no cache serves old ones.
_FORMAT = 1

_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

#: Qwen2 with four layers. head_dim is 128 (512 / 4 heads) since sglang-jax's native attention pads the pool to 128
#: and fails on any other width; two KV heads make tp=4 replicate them, as Qwen2.5-3B does on a v4-8.
TINY_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    # Outside the vocabulary's used part, so that greedy decoding never stops early.
    "bos_token_id": 256,
    "eos_token_id": 256,
}

_QWEN2_ONLY = ("use_sliding_window",)
_SHARED = {key: value for key, value in TINY_QWEN2.items() if key not in _QWEN2_ONLY}

#: Norms on every query and key, no biases; more heads than hidden / head_dim, as Qwen3 has them, and enough for tp=8.
TINY_QWEN3: dict[str, Any] = _SHARED | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "attention_bias": False,
}

#: Qwen3 with four experts in every layer, two of them for each token.
TINY_QWEN3_MOE: dict[str, Any] = TINY_QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

#: As many KV heads as attention heads: nothing is grouped, and nothing replicated up to tp=8.
TINY_LLAMA: dict[str, Any] = _SHARED | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
}

#: Sliding-window and full attention in turn, which gives the engine a pool for each. The head is the embedding, since
#: sglang-jax knows no other for this model; on CPU it cannot generate anyway.
TINY_GEMMA2: dict[str, Any] = _SHARED | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "head_dim": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 10000.0,
    "attention_bias": False,
    "query_pre_attn_scalar": 128,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}

BUILTIN: dict[str, dict[str, Any]] = {
    "tiny-qwen2": TINY_QWEN2,
    "tiny-qwen3": TINY_QWEN3,
    "tiny-qwen3-moe": TINY_QWEN3_MOE,
    "tiny-llama": TINY_LLAMA,
    "tiny-gemma2": TINY_GEMMA2,
}

_LATENT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "num_attention_heads": 8,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "rope_theta": 10000.0,
}

#: Models whose weights are not written, since on CPU they cannot generate: they boot with dummy weights.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "tiny-deepseek-v3": _SHARED
    | _LATENT
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "attention_bias": False,
        "rope_scaling": None,
    },
    # Three layers of linear attention, which keep states, and one of latents.
    "tiny-kimi-linear": _SHARED
    | _LATENT
    | {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "head_dim": 128,
        "q_lora_rank": None,
        "num_experts": 8,
        "num_shared_experts": 1,
        "num_experts_per_token": 2,
        "num_expert_group": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "use_grouped_topk": True,
        "mla_use_nope": True,
        "linear_attn_config": {
            "kda_layers": [1, 2, 3],
            "full_attn_layers": [4],
            "num_heads": 8,
            "head_dim": 64,
            "short_conv_kernel_size": 4,
        },
    },
    # A draft of one layer for the tiny Llama.
    "tiny-llama-eagle3": TINY_LLAMA
    | {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": 512},
}


def cache_root() -> Path:
    """The folder for generated checkpoints: ``$KVCYCLE_CACHE``, else ``kvcycle`` in the user's cache folder."""
    if explicit := os.environ.get("KVCYCLE_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvcycle"


def fingerprint(config: dict[str, Any], seed: int) -> str:
    """The content address of the checkpoint that ``config`` and ``seed`` give: 16 hex digits of a sha256."""
    text = json.dumps({"format": _FORMAT, "config": config, "seed": seed}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def ensure_builtin(name: str, *, seed: int = 0, root: Path | None = None) -> Path:
    """Return the folder of the built-in checkpoint ``name``, writing it on first use.

    Raises:
        KeyError: there is no built-in checkpoint of that name.
        OSError: the cache folder cannot be written.
    """
    return ensure(name, BUILTIN[name], seed=seed, root=root)


def ensure(name: str, config: dict[str, Any], *, seed: int = 0, root: Path | None = None, weights: bool = True) -> Path:
    """Return the folder of a checkpoint with this config, writing it atomically if it is not there yet.

    Without ``weights`` it has config and tokenizer only, for an engine that boots with ``load_format="dummy"``.

    The folder's name carries the content address, so a changed config never meets an old folder, and a writer that
    dies leaves no half-written checkpoint under the final name.
    """
    home = (root or cache_root()) / "checkpoints"
    target = home / f"{name}-{fingerprint(config, seed)}"
    last = "model.safetensors" if weights else "tokenizer.json"
    if (target / last).is_file():
        return target.resolve()
    home.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=home))
    try:
        write(staging, config, seed=seed, weights=weights)
        staging.chmod(0o755)  # mkdtemp's is for its owner alone
        try:
            staging.rename(target)
        except OSError:
            # Another process finished first: its folder has the same content by construction.
            if not (target / last).is_file():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target.resolve()


def write(folder: Path, config: dict[str, Any], *, seed: int = 0, weights: bool = True) -> None:
    """Write config.json, the tokenizer files and (with ``weights``) model.safetensors into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    (folder / "generation_config.json").write_text(json.dumps(ends) + "\n")
    _write_tokenizer(folder)
    if weights:
        _write_weights(folder, config, seed)


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges: 256 byte tokens and the chat specials, as a ``Qwen2TokenizerFast``.

    A plain ``PreTrainedTokenizerFast`` does not survive the engine's own loading, so the Qwen2 class is used.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast

    vocab = {char: index for index, char in enumerate(sorted(ByteLevel.alphabet()))}
    vocab.update({token: len(vocab) + offset for offset, token in enumerate(_SPECIAL_TOKENS)})
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2TokenizerFast(vocab_file=str(folder / "vocab.json"), merges_file=str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)


def _write_weights(folder: Path, config: dict[str, Any], seed: int) -> None:
    from ml_dtypes import bfloat16
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)

    def normal(*shape: int, std: float) -> np.ndarray[Any, Any]:
        return (rng.standard_normal(shape, dtype=np.float32) * std).astype(bfloat16)

    hidden = config["hidden_size"]
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden, std=1.0),
        "model.norm.weight": np.ones(hidden, dtype=bfloat16),
    }
    if not config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = normal(config["vocab_size"], hidden, std=hidden**-0.5)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        # Fan-in scaling keeps every layer's output near unit size, so that attention to the past (what the KV cache
        # holds) decides the next token and a wrong cache shows in the output.
        for part, (rows, columns) in _matrices(config).items():
            tensors[f"{prefix}{part}.weight"] = normal(rows, columns, std=columns**-0.5)
        for part, width in _biases(config).items():
            tensors[f"{prefix}{part}.bias"] = normal(width, std=0.02)
        for part, width in _norms(config).items():
            tensors[f"{prefix}{part}.weight"] = np.ones(width, dtype=bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _attention_widths(config: dict[str, Any]) -> tuple[int, int, int]:
    """Widths of all queries, of all keys, and of one head."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim, head_dim


def _matrices(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """A layer's matrices as (rows, columns), in the order in which they are drawn."""
    hidden = config["hidden_size"]
    q_width, kv_width, _ = _attention_widths(config)

    def mlp(prefix: str, width: int) -> dict[str, tuple[int, int]]:
        return {
            f"{prefix}.gate_proj": (width, hidden),
            f"{prefix}.up_proj": (width, hidden),
            f"{prefix}.down_proj": (hidden, width),
        }

    attention = {
        "self_attn.q_proj": (q_width, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, q_width),
    }
    experts = config.get("num_experts")
    if not experts:
        return attention | mlp("mlp", config["intermediate_size"])
    matrices = attention | {"mlp.gate": (experts, hidden)}
    for expert in range(experts):
        matrices |= mlp(f"mlp.experts.{expert}", config["moe_intermediate_size"])
    return matrices


def _biases(config: dict[str, Any]) -> dict[str, int]:
    if config["model_type"] != "qwen2":
        return {}
    q_width, kv_width, _ = _attention_widths(config)
    return {"self_attn.q_proj": q_width, "self_attn.k_proj": kv_width, "self_attn.v_proj": kv_width}


def _norms(config: dict[str, Any]) -> dict[str, int]:
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), config["hidden_size"])
    if config["model_type"] == "gemma2":
        norms |= dict.fromkeys(("pre_feedforward_layernorm", "post_feedforward_layernorm"), config["hidden_size"])
    if config["model_type"].startswith("qwen3"):
        norms |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), _attention_widths(config)[2])
    return norms
