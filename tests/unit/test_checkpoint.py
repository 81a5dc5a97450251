"""The checkpoint that kvcycle writes: loadable, seeded, addressed by its content, whole or not there at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from kvcycle import checkpoint
from kvcycle.checkpoint import BUILTIN, TINY_QWEN2, ensure, ensure_builtin, fingerprint, write

#: Large enough for every kind of tensor, small enough to write often.
SMALL = TINY_QWEN2 | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint, as written on first use."""
    return ensure("small", SMALL, root=tmp_path_factory.mktemp("cache"))


def test_it_is_a_hugging_face_folder(folder: Path) -> None:
    files = {path.name for path in folder.iterdir()}
    assert files >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "vocab.json", "merges.txt",
    }  # fmt: skip
    assert json.loads((folder / "config.json").read_text()) == SMALL
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 256, "eos_token_id": 256}
    assert folder.name == f"small-{fingerprint(SMALL, 0)}"
    assert folder.is_absolute()


def test_its_tokenizer_round_trips_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    for text in ("Hello", "Hello, KV cache! 2,415,992,832 B\n", "naïve café ☃ 漢字"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.encode())
        assert max(ids) < 256
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == SMALL["eos_token_id"]
    assert type(tokenizer).__name__ == "Qwen2TokenizerFast"


def test_its_weights_have_the_configs_shapes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    layer = {
        "input_layernorm.weight": (32,), "post_attention_layernorm.weight": (32,),
        "self_attn.q_proj.weight": (32, 32), "self_attn.q_proj.bias": (32,),
        "self_attn.k_proj.weight": (16, 32), "self_attn.k_proj.bias": (16,),
        "self_attn.v_proj.weight": (16, 32), "self_attn.v_proj.bias": (16,),
        "self_attn.o_proj.weight": (32, 32),
        "mlp.gate_proj.weight": (48, 32), "mlp.up_proj.weight": (48, 32), "mlp.down_proj.weight": (32, 48),
    }  # fmt: skip
    outer = {"model.embed_tokens.weight": (300, 32), "model.norm.weight": (32,), "lm_head.weight": (300, 32)}
    expected = outer | {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    assert not np.array_equal(tensors["model.embed_tokens.weight"], tensors["lm_head.weight"])  # untied
    assert all(np.isfinite(tensor.astype(np.float32)).all() for tensor in tensors.values())


def test_a_head_dim_of_its_own_widens_the_projections(tmp_path: Path) -> None:
    write(tmp_path, SMALL | {"head_dim": 64})
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.weight"].shape == (256, 32)
    assert tensors["model.layers.0.self_attn.k_proj.bias"].shape == (128,)
    assert tensors["model.layers.0.self_attn.o_proj.weight"].shape == (32, 256)


def test_the_seed_decides_the_bytes(folder: Path, tmp_path: Path) -> None:
    same, other = (ensure("small", SMALL, seed=seed, root=tmp_path) for seed in (0, 1))
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, same, other)]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]
    for name in ("config.json", "tokenizer.json", "vocab.json"):
        assert (same / name).read_bytes() == (other / name).read_bytes() == (folder / name).read_bytes()


def test_the_content_address_follows_config_and_seed() -> None:
    address = fingerprint(SMALL, 0)
    assert len(address) == 16
    assert address == fingerprint(dict(reversed(SMALL.items())), 0)
    assert len({address, fingerprint(SMALL, 1), fingerprint(SMALL | {"vocab_size": 301}, 0)}) == 3


def test_the_second_call_writes_nothing(folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert ensure("small", SMALL, root=folder.parents[1]) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_writer_that_dies_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(folder: Path, *_: object) -> None:
        assert (folder / "config.json").is_file()  # half of it is there
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_weights", die)
        with pytest.raises(RuntimeError, match="killed"):
            ensure("small", SMALL, root=tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert (ensure("small", SMALL, root=tmp_path) / "model.safetensors").is_file()


@contextmanager
def writers_that_meet(count: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every writer waits, before its last file, for the others to have come as far."""
    barrier, write_weights = threading.Barrier(count, timeout=30), checkpoint._write_weights

    def meet(folder: Path, config: dict[str, Any], seed: int) -> None:
        barrier.wait()
        write_weights(folder, config, seed)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_weights", meet)
        yield


def test_writers_that_race_end_with_one_good_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writers_that_meet(3, monkeypatch), ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: ensure("small", SMALL, root=tmp_path), range(3)))
    assert len(set(found)) == 1
    assert list((tmp_path / "checkpoints").iterdir()) == [found[0]]
    weights = (found[0] / "model.safetensors").read_bytes()
    assert weights == (folder / "model.safetensors").read_bytes()


def test_without_weights_it_has_all_the_rest(folder: Path, tmp_path: Path) -> None:
    geometry = ensure("geometry", SMALL, root=tmp_path, weights=False)
    assert {path.name for path in geometry.iterdir()} == {path.name for path in folder.iterdir()} - {
        "model.safetensors"
    }
    before = (geometry / "config.json").stat().st_mtime_ns
    assert ensure("geometry", SMALL, root=tmp_path, weights=False) == geometry
    assert (geometry / "config.json").stat().st_mtime_ns == before


def test_a_config_need_not_name_its_ends(tmp_path: Path) -> None:
    bare = {key: value for key, value in SMALL.items() if key != "bos_token_id"}
    write(tmp_path, bare, weights=False)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 256}


def test_a_foreign_folder_in_its_place_is_an_error_and_stays(tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoints" / f"small-{fingerprint(SMALL, 0)}" / "notes.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        ensure("small", SMALL, root=tmp_path)
    assert foreign.read_text() == "mine"
    assert list((tmp_path / "checkpoints").iterdir()) == [foreign.parent]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"KVCYCLE_CACHE": "/explicit", "XDG_CACHE_HOME": "/xdg"}, "/explicit"),
        ({"KVCYCLE_CACHE": "~/explicit"}, "/home/me/explicit"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/kvcycle"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/kvcycle"),
        ({}, "/home/me/.cache/kvcycle"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KVCYCLE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert checkpoint.cache_root() == Path(expected)


def test_an_unknown_builtin_is_a_key_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="nothing"):
        ensure_builtin("nothing", root=tmp_path)


def test_the_tiny_qwen2_fits_what_the_engine_needs() -> None:
    assert TINY_QWEN2["hidden_size"] // TINY_QWEN2["num_attention_heads"] == 128  # the native backend's only width
    assert TINY_QWEN2["num_key_value_heads"] < 4  # replicated at tp=4, as Qwen2.5-3B's are


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_model_is_one_that_can_be_run(name: str) -> None:
    config = BUILTIN[name]
    assert (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]) == 128
    # Tied, it would repeat one token for ever; Gemma2's are always, and it cannot generate on CPU.
    assert config["tie_word_embeddings"] is (name == "tiny-gemma2")


_ATTENTION = {"q_proj": (64, 32), "k_proj": (32, 32), "v_proj": (32, 32), "o_proj": (32, 64)}
_MLP = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
_EXPERT = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}


@pytest.mark.parametrize(
    ("name", "mlp", "norms", "head"),
    [
        ("tiny-llama", {f"mlp.{k}": v for k, v in _MLP.items()}, {}, True),
        (
            "tiny-qwen3",
            {f"mlp.{k}": v for k, v in _MLP.items()},
            {"self_attn.q_norm": (16,), "self_attn.k_norm": (16,)},
            True,
        ),
        (
            "tiny-qwen3-moe",
            {"mlp.gate": (4, 32)} | {f"mlp.experts.{i}.{k}": v for i in range(4) for k, v in _EXPERT.items()},
            {"self_attn.q_norm": (16,), "self_attn.k_norm": (16,)},
            True,
        ),
        (
            "tiny-gemma2",
            {f"mlp.{k}": v for k, v in _MLP.items()},
            {"pre_feedforward_layernorm": (32,), "post_feedforward_layernorm": (32,)},
            False,
        ),
    ],
)
def test_each_model_has_the_tensors_of_its_kind(
    name: str, mlp: dict[str, tuple[int, ...]], norms: dict[str, tuple[int, ...]], head: bool, tmp_path: Path
) -> None:
    small = {
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
    }  # fmt: skip
    write(tmp_path, BUILTIN[name] | small)
    tensors = {key: tensor.shape for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    layer = {f"self_attn.{k}": v for k, v in _ATTENTION.items()} | mlp | norms
    layer |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (32,))
    outer = {"model.embed_tokens.weight": (300, 32), "model.norm.weight": (32,)}
    outer |= {"lm_head.weight": (300, 32)} if head else {}
    assert tensors == outer | {f"model.layers.0.{key}.weight": shape for key, shape in layer.items()}
