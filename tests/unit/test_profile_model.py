"""A profile's model and devices: its folder, its geometry without weights, the devices and hosts that it needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcycle.checkpoint import TINY_QWEN2
from kvcycle.errors import ProfileError
from kvcycle.profile_file import load_profile
from kvcycle.sizing import predict_kv
from tests.unit.profiles import refused

pytestmark = pytest.mark.usefixtures("config_cache")


def test_a_folder_with_a_config_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"num_attention_heads": 3}')
    monkeypatch.chdir(tmp_path)
    found = load_profile("tiny", {"model.path": "model", "engine.tp_size": 3})
    found.check_geometry("cpu")
    assert found.model_folder() == model  # absolute: the engine breaks on a relative one
    assert found.model_config_json() == {"num_attention_heads": 3}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (None, "model.path='{folder}' is a folder without a config.json, so it is no checkpoint."),
        ("{", ("The model's {folder}/config.json cannot be read: Expecting property name enclosed in double quotes: "
         "line 1 column 2 (char 1).")),
        ("[]", "The model's {folder}/config.json is no JSON object."),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_model(config: str | None, sentence: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert refused({"model.path": str(tmp_path)}) == sentence.replace("{folder}", str(tmp_path))


# The geometry without the weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "predicted"), [("qwen2.5-3b-v4-8", 2_415_992_832), ("qwen2.5-3b-v4-8-131072", 9_663_750_144)]
)
def test_the_reference_profiles_predict_the_reference_runs_bytes(name: str, predicted: int) -> None:
    reference = load_profile(name)
    config = reference.model_config_json()
    assert config is not None
    for platform in ("cpu", "tpu"):
        reference.check_geometry(platform)
        found = predict_kv(config, reference.engine_args(platform))
        assert found is not None
        assert found.total_bytes == predicted
    assert reference.engine_args("cpu")["load_format"] == "dummy"
    assert "load_format" not in reference.engine_args("tpu")
    assert reference.boot_folder("tpu") is None


def test_generation_is_left_out_only_where_the_profile_says_so() -> None:
    brief = load_profile("tiny", {"on_cpu.generate": False})
    assert (brief.on("cpu").cycle.generate, brief.on("tpu").cycle.generate) == (False, True)
    plain = load_profile("tiny")
    assert plain.on("cpu") == plain.on("tpu") == plain


def test_dummy_weights_boot_from_the_geometry(config_cache: Path) -> None:
    dummy = load_profile("tiny", {"on_cpu.dummy_weights": True})
    folder = dummy.boot_folder("cpu")
    assert folder is not None
    assert folder.parent == config_cache / "checkpoints"
    assert json.loads((folder / "config.json").read_text()) == TINY_QWEN2
    assert (folder / "tokenizer.json").is_file()
    assert not (folder / "model.safetensors").exists()
    assert dummy.boot_folder("tpu") == dummy.model_folder() != folder


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            "shipped:qwen2.5-3c",
            "model.config='shipped:qwen2.5-3c': no such config is shipped (did you mean 'qwen2.5-3b'?); there are: ",
        ),
        ("nowhere", "model.config='nowhere' is no folder with a config.json."),
    ],
)
def test_a_geometry_that_is_not_there(config: str, sentence: str) -> None:
    assert refused({"model.config": config}).startswith(sentence)


def test_dummy_weights_need_a_geometry() -> None:
    hub = load_profile("tiny", {"model.path": "org/name", "on_cpu.dummy_weights": True})
    with pytest.raises(ProfileError) as caught:
        hub.boot_folder("cpu")
    assert str(caught.value) == (
        "on_cpu.dummy_weights needs a geometry: set model.config to a folder with a config.json."
    )


def test_a_geometry_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    overrides = {"model.path": "org/name", "model.config": str(tmp_path), "engine.tp_size": 2}
    assert refused(overrides) == "engine.tp_size=2 does not divide the model's 3 attention heads; use one of 1, 3."


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")  # as a folder without permission is to anyone but root
    monkeypatch.setenv("KVCYCLE_CACHE", str(blocked))
    assert refused({}) == (
        f"The checkpoint 'builtin:tiny-qwen2' cannot be written to {blocked}: [Errno 20] Not a directory: "
        f"'{blocked}/checkpoints'. Set KVCYCLE_CACHE to a folder that can be written."
    )


def test_the_virtual_devices_follow_the_engine() -> None:
    profile = load_profile("tiny", {"on_cpu.engine.tp_size": 2})
    with pytest.raises(
        ProfileError, match=r"^on_cpu\.engine\.tp_size cannot be set: there are as many virtual devices"
    ):
        profile.check_geometry("cpu")


def test_several_hosts_share_the_devices_and_some_commands_know_only_one() -> None:
    two = load_profile("tiny", {"engine.nnodes": 2, "engine.dist_init_addr": "10.0.0.2:10011"})
    two.check_geometry("cpu")
    assert (two.devices_needed, two.devices_here) == (4, 2)
    with pytest.raises(ProfileError) as refused:
        two.check_one_host("A soak")
    assert str(refused.value) == (
        "A soak runs on one host, and engine.nnodes is 2; the suite runs on several (pytest -m tpu)."
    )
    load_profile("tiny").check_one_host("A soak")


@pytest.mark.parametrize("address", [None, "", "10.0.0.2", ":10011", "10.0.0.2:port", "10.0.0.2:0", "10.0.0.2:65530"])
def test_hosts_need_a_place_to_meet(address: str | None) -> None:
    profile = load_profile("tiny")
    engine = profile.engine.model_copy(update={"nnodes": 2, "dist_init_addr": address})
    with pytest.raises(ProfileError, match=r"is no address at which 2 hosts could meet: give host 0's"):
        profile.model_copy(update={"engine": engine}).check_geometry("cpu")
