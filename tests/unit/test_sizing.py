"""The KV cache's predicted size: the reference run's numbers, and where arithmetic does not decide."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcycle.checkpoint import TINY_QWEN2
from kvcycle.profile_file import load_profile
from kvcycle.sizing import PLAIN_KV_MODELS, estimate_params_bytes, head_dim_of, kv_heads_on_devices, predict_kv

#: Qwen2.5-3B, the reference run's model: two KV heads, replicated to four devices.
QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "hidden_size": 2048,
    "torch_dtype": "bfloat16",
}
REFERENCE: dict[str, Any] = {"tp_size": 4, "page_size": 1, "max_total_tokens": 32768, "dtype": "bfloat16"}


def predicted(config: dict[str, Any], engine: dict[str, Any]) -> tuple[int, int]:
    found = predict_kv(config, engine)
    assert found is not None
    return found.total_bytes, found.bytes_per_device


@pytest.mark.parametrize(
    ("engine", "total"),
    [
        ({}, 2_415_992_832),  # measured [reference]
        ({"max_total_tokens": 131072}, 9_663_750_144),  # measured [reference]
        ({"page_size": 16}, 36 * (32768 + 16) * 4 * 2 * 128 * 2),
        ({"page_size": 128}, 36 * (32768 + 128) * 4 * 2 * 128 * 2),
        # Tokens that do not fill a page are cut off.
        ({"page_size": 128, "max_total_tokens": 32768 + 127}, 36 * (32768 + 128) * 4 * 2 * 128 * 2),
        # A data-parallel rank has its own tokens and padding, on half of the devices: no head is replicated.
        ({"dp_size": 2}, 36 * 2 * (32768 + 1) * 2 * 2 * 128 * 2),
        ({"dp_size": 2, "page_size": 16}, 36 * 2 * (32768 + 16) * 2 * 2 * 128 * 2),
        ({"dp_size": 4}, 36 * 4 * (32768 + 1) * 2 * 2 * 128 * 2),
        ({"tp_size": 1}, 36 * (32768 + 1) * 2 * 2 * 128 * 2),
        ({"dtype": "float32"}, 36 * (32768 + 1) * 4 * 2 * 128 * 4),
        ({"kv_cache_dtype": "bf16", "dtype": "float32"}, 2_415_992_832),
        ({"kv_cache_dtype": "auto"}, 2_415_992_832),
        ({"kv_cache_dtype": "float8_e4m3fn"}, 2_415_992_832 // 2),
        ({"kv_cache_dtype": "float8_e5m2"}, 2_415_992_832 // 2),
        ({"kv_cache_dtype": "int8"}, 2_415_992_832 // 2),
        ({"dtype": "auto"}, 2_415_992_832),
        ({"dtype": None, "page_size": None, "dp_size": None}, 2_415_992_832),
    ],
    ids=str,
)
def test_the_reference_model(engine: dict[str, Any], total: int) -> None:
    engine = REFERENCE | engine
    assert predicted(QWEN, engine) == (total, total // engine["tp_size"])


def test_the_formula_shows_its_numbers() -> None:
    found = predict_kv(QWEN, REFERENCE)
    assert found is not None
    assert found.formula == (
        "36 layers x (32768 tokens + 1 of padding) x 4 KV heads x 2 (K and V) x 128 x 2 B = 2,415,992,832 B"
    )


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"num_key_value_heads": 8}, 2),  # more heads than devices: none is replicated
        ({"num_key_value_heads": 4}, 1),
        ({"num_key_value_heads": 1}, 1),
        ({"num_key_value_heads": None}, 4),  # no grouping: as many as attention heads
        ({"head_dim": 256}, 2),
        ({"head_dim": 64}, 1),  # padded to the TPU's 128 lanes
        ({"hidden_size": 1024}, 1),  # 1024 / 16 = 64, padded as well
        ({"head_dim": 129}, 2),
        ({"num_hidden_layers": 72}, 2),
    ],
    ids=str,
)
def test_heads_and_widths(config: dict[str, Any], factor: int) -> None:
    assert predicted(QWEN | config, REFERENCE) == (factor * 2_415_992_832, factor * 603_998_208)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize(("dtype", "factor"), [("float32", 2), ("float16", 1)])
def test_the_models_own_dtype_decides_where_the_engine_says_auto(key: str, dtype: str, factor: int) -> None:
    config = {name: value for name, value in QWEN.items() if name != "torch_dtype"} | {key: dtype}
    assert predicted(config, REFERENCE | {"dtype": "auto"})[0] == factor * 2_415_992_832


@pytest.mark.parametrize(
    ("config", "engine"),
    [
        ({"model_type": "gemma2"}, {}),
        ({"model_type": "deepseek_v3"}, {}),
        ({"model_type": None}, {}),
        ({}, {"max_total_tokens": None}),
        ({}, {"dtype": "int4"}),
    ],
    ids=str,
)
def test_what_arithmetic_does_not_decide_is_not_predicted(config: dict[str, Any], engine: dict[str, Any]) -> None:
    assert predict_kv(QWEN | config, REFERENCE | engine) is None


def test_no_max_total_tokens_at_all_is_not_predicted() -> None:
    assert predict_kv(QWEN, {"tp_size": 4}) is None


@given(
    layers=st.integers(1, 128),
    heads=st.sampled_from([1, 2, 4, 8]),
    tp=st.sampled_from([1, 2, 4, 8, 16]),
    dp=st.sampled_from([1, 2, 4]),
    page=st.sampled_from([1, 16, 64, 128]),
    tokens=st.integers(128, 10**6),
    model_type=st.sampled_from(sorted(PLAIN_KV_MODELS)),
)
def test_a_prediction_is_linear_in_layers_and_whole_on_each_device(
    layers: int, heads: int, tp: int, dp: int, page: int, tokens: int, model_type: str
) -> None:
    dp = min(dp, tp)
    config = QWEN | {"num_key_value_heads": heads, "model_type": model_type}
    engine = {"tp_size": tp, "dp_size": dp, "page_size": page, "max_total_tokens": tokens}
    one, _ = predicted(config | {"num_hidden_layers": 1}, engine)
    total, per_device = predicted(config | {"num_hidden_layers": layers}, engine)
    assert total == layers * one
    assert per_device * tp == total
    # Never less than the tokens' own keys and values, and replication never more than one head a device.
    whole_pages = tokens // page * page
    assert one >= whole_pages * dp * heads * 2 * 128 * 2
    assert one <= (whole_pages + page) * dp * max(heads, tp // dp) * 2 * 128 * 2


@pytest.mark.parametrize(("config", "width"), [({"head_dim": 64}, 64), ({"head_dim": None}, 128), ({}, 128)])
def test_the_width_of_a_head(config: dict[str, int | None], width: int) -> None:
    assert head_dim_of(QWEN | config) == width


@pytest.mark.parametrize(("heads", "devices", "held"), [(2, 4, 4), (4, 4, 4), (8, 4, 8), (2, 1, 2)])
def test_fewer_heads_than_devices_are_replicated(heads: int, devices: int, held: int) -> None:
    assert kv_heads_on_devices(heads, devices) == held


def test_the_weights_are_estimated_to_a_thousandth() -> None:
    reference = load_profile("qwen2.5-3b-v4-8")
    config = reference.model_config_json()
    assert config is not None
    engine = reference.engine_args("tpu")
    estimate = estimate_params_bytes(config, engine)
    assert estimate == pytest.approx(6_248_972_288, rel=1e-3)  # measured [reference]
    assert estimate_params_bytes(TINY_QWEN2, {"tp_size": 4}) == pytest.approx(22_106_112, rel=1e-2)  # by the ledger
    assert estimate_params_bytes(config, engine | {"dtype": "float32"}) == 2 * estimate
    untied = estimate_params_bytes(config | {"tie_word_embeddings": False}, engine)
    assert untied == estimate + config["vocab_size"] * config["hidden_size"] * 2
    assert estimate_params_bytes(config | {"torch_dtype": "float32"}, engine | {"dtype": "auto"}) == 2 * estimate
    # Each of two ranks has all weights on half of the devices, where no KV head is replicated.
    two_ranks = estimate_params_bytes(config, engine | {"dp_size": 2})
    replicated = config["num_hidden_layers"] * config["hidden_size"] * 128 * 2 * 2 * 2
    assert two_ranks == 2 * (estimate - replicated)
