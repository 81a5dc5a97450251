"""Profiles: what can be wrong with one is said in a sentence before anything boots."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcycle.errors import ProfileError
from kvcycle.profile import ModelSpec, Profile
from kvcycle.profile_file import load_profile, parse_overrides, profile_names, server_args_fields
from tests.unit.profiles import refused

BUILTINS = "builtin:tiny-qwen2, builtin:tiny-qwen3, builtin:tiny-qwen3-moe, builtin:tiny-llama, builtin:tiny-gemma2."

pytestmark = pytest.mark.usefixtures("config_cache")


@pytest.fixture
def other_fields() -> Iterator[None]:
    """server_args_fields() as a process that has not called it."""
    server_args_fields.cache_clear()
    yield
    server_args_fields.cache_clear()


# Overrides -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("engine.page_size=16", "engine.page_size", 16),
        ("engine.page_size = 16", "engine.page_size", 16),
        ("tolerances.rss_fraction=0.1", "tolerances.rss_fraction", 0.1),
        ("cycle.generate=false", "cycle.generate", False),
        ("model.path=builtin:tiny-qwen2", "model.path", "builtin:tiny-qwen2"),
        ("model.path=/models/a=b", "model.path", "/models/a=b"),
        ('cycle.prompt="16"', "cycle.prompt", "16"),
        ("cycle.prompt=Hello there", "cycle.prompt", "Hello there"),
        ("cycle.prompt=", "cycle.prompt", ""),
        ("engine.lora_paths=['a', 'b']", "engine.lora_paths", ["a", "b"]),
        ("cycle.generate=False", "cycle.generate", "False"),  # TOML's is lower case; pydantic reads the text
    ],
)
def test_an_override_is_read_as_toml_or_else_as_text(assignment: str, key: str, value: object) -> None:
    assert parse_overrides([assignment]) == {key: value}


def test_the_last_override_of_a_key_holds() -> None:
    assert parse_overrides(["a.b=1", "c=2", "a.b=3"]) == {"a.b": 3, "c": 2}
    assert parse_overrides([]) == {}


@pytest.mark.parametrize("assignment", ["engine.page_size", "=16", " =16", ""])
def test_an_override_that_is_no_assignment(assignment: str) -> None:
    with pytest.raises(ProfileError) as caught:
        parse_overrides([assignment])
    assert str(caught.value) == f"{assignment!r} is not KEY=VALUE, for example engine.page_size=16."


def test_overrides_reach_their_tables_and_leave_the_rest() -> None:
    plain = load_profile("tiny")
    changed = load_profile("tiny", {"engine.page_size": 16, "cycle.cycles": 5, "timeouts.boot_s": 10})
    assert (changed.engine.page_size, changed.cycle.cycles, changed.timeouts.boot_s) == (16, 5, 10.0)
    assert changed.engine.max_total_tokens == plain.engine.max_total_tokens == 16384
    assert load_profile("tiny") == plain


# Values that will not do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"nonsense": 1}, "Profile 'tiny' has no key 'nonsense'."),
        ({"cycle.cycle": 1}, "Profile 'tiny' has no key 'cycle.cycle' (did you mean 'cycles'?)."),
        ({"tolerence.logprob": 1}, "Profile 'tiny' has no key 'tolerence' (did you mean 'tolerances'?)."),
        ({"on_cpu.engin": {}}, "Profile 'tiny' has no key 'on_cpu.engin' (did you mean 'engine'?)."),
        ({"model": {}}, "Profile 'tiny' lacks the key 'model.path'."),
        ({"name.first": 1}, "name.first cannot be set: name is a value, not a table."),
        (
            {"cycle.cycles": 0},
            "Profile 'tiny': cycle.cycles=0 will not do: Input should be greater than or equal to 1.",
        ),
        (
            {"cycle.cycles": 1001},
            "Profile 'tiny': cycle.cycles=1001 will not do: Input should be less than or equal to 1000.",
        ),
        (
            {"tolerances.logprob": float("inf")},
            "Profile 'tiny': tolerances.logprob=inf will not do: Input should be a finite number.",
        ),
        (
            {"thresholds.latency_factor_of_warm": float("inf")},
            "Profile 'tiny': thresholds.latency_factor_of_warm=inf will not do: Input should be a finite number.",
        ),
        (
            {"cycle.cycles": "two"},
            ("Profile 'tiny': cycle.cycles='two' will not do: Input should be a valid integer, unable to parse "
            "string as an integer."),
        ),
        (
            {"engine": 3},
            "Profile 'tiny': engine=3 will not do: Input should be a valid dictionary or instance of EngineArgs.",
        ),
        (
            {"on_cpu.engine.dp_size": 0},
            "Profile 'tiny': on_cpu.engine.dp_size=0 will not do: Input should be greater than or equal to 1.",
        ),
        (
            {"on_cpu.engine.page_size": "many"},
            ("Profile 'tiny': on_cpu.engine.page_size='many' will not do: Input should be a valid integer, unable to "
            "parse string as an integer."),
        ),
        ({"engine.nonsense": 1}, "engine.nonsense is no argument of the installed sglang-jax."),
        (
            {"engine.page_sise": 1},
            "engine.page_sise is no argument of the installed sglang-jax (did you mean 'page_size'?).",
        ),
        (
            {"on_cpu.engine.tpsize": 1},
            "on_cpu.engine.tpsize is no argument of the installed sglang-jax (did you mean 'tp_size'?).",
        ),
        ({"engine.model_path": "x"}, "engine.model_path cannot be set: set model.path instead."),
        ({"engine.device": "cpu"}, "engine.device cannot be set: the platform decides it (--kv-platform)."),
        (
            {"on_cpu.engine.enable_single_process": False},
            "on_cpu.engine.enable_single_process cannot be set: the cycle needs the engine in its own process.",
        ),
        ({"engine.tp_size": 3}, "engine.tp_size=3 does not divide the model's 4 attention heads; use one of 1, 2, 4."),
        ({"engine.tp_size": 8}, "engine.tp_size=8 does not divide the model's 4 attention heads; use one of 1, 2, 4."),
        (
            {"engine.tp_size": 6, "engine.dp_size": 2},
            "engine.tp_size=6 does not divide the model's 4 attention heads (tp_size/dp_size = 3); use one of 2, 4, 8.",
        ),
        (
            {"engine.dp_size": 3},
            "engine.dp_size=3 does not divide engine.tp_size=4; every rank needs as many devices.",
        ),
        (
            {"engine.page_size": 16385},
            "engine.max_total_tokens=16384 is less than one page (engine.page_size=16385).",
        ),
        (
            {"on_cpu.engine.attention_backend": "fa"},
            "engine.attention_backend='fa' does not run on CPU; set on_cpu.engine.attention_backend='native'.",
        ),
        (
            {"model.path": "builtin:tiny-qwen2.5"},
            ("model.path='builtin:tiny-qwen2.5': there is no built-in checkpoint of that name (did you mean "
            "'tiny-qwen2'?)."),
        ),
        (
            {"model.path": "/nowhere/model"},
            ("model.path='/nowhere/model' does not exist; name a folder with a config.json, a hub id (org/name), or "
            "one of " + BUILTINS),
        ),
        (
            {"model.path": "model"},
            ("model.path='model' does not exist; name a folder with a config.json, a hub id (org/name), or one of "
            + BUILTINS),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_will_not_do_is_said_in_a_sentence(overrides: dict[str, Any], sentence: str) -> None:
    assert refused(overrides) == sentence


@pytest.mark.parametrize("path", ["./org/name", "~/model", "../name", "a/b/c", "/a"])
def test_a_path_that_is_no_hub_id_must_exist(path: str) -> None:
    assert refused({"model.path": path}).startswith(f"model.path={path!r} does not exist; name a folder")


@pytest.mark.parametrize(
    "overrides",
    [
        {"engine.tp_size": 2},
        {"engine.dp_size": 2},
        {"engine.dp_size": 4},
        {"engine.page_size": 16384},
        {"engine.attention_backend": "fa"},  # CPU has its own
        {"engine.max_total_tokens": 1},
        {"model.path": "org/name", "engine.tp_size": 3},  # a hub id's config is not here to compare with
    ],
    ids=str,
)
def test_what_will_do_is_let_through(overrides: dict[str, Any]) -> None:
    changed = load_profile("tiny", overrides)
    changed.check_geometry("cpu")
    assert changed.devices_needed == overrides.get("engine.tp_size", 4)


def test_a_backend_for_accelerators_may_run_on_them() -> None:
    fa = load_profile("tiny", {"engine.attention_backend": "fa"})
    fa.check_geometry("tpu")
    assert fa.engine_args("tpu")["attention_backend"] == "fa"
    assert fa.engine_args("cpu")["attention_backend"] == "native"


def test_what_a_profile_does_not_say_is_strict() -> None:
    # The checks take the same numbers for a record whose profile lacks them (test_checks).
    bare = Profile(name="bare", model=ModelSpec(path="org/name"))
    assert bare.tolerances.model_dump() == {"allocator_bytes": 0, "rss_fraction": 0.02, "logprob": 0.0}
    assert bare.thresholds.model_dump() == {
        "latency_factor_of_warm": 3.0,
        "latency_fraction_of_cold": 0.5,
        "min_distinct_tokens": 6,
    }
    assert bare.cycle.generate
    assert bare.cycle.recompile_control


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("engine.tp_size", 0),
        ("engine.page_size", 0),
        ("engine.max_total_tokens", 0),
        ("cycle.max_new_tokens", 0),
        ("cycle.warm_generates", 0),
        ("cycle.perturb", 0),
        ("cycle.canary_bytes", 4095),
        ("tolerances.allocator_bytes", -1),
        ("tolerances.rss_fraction", 1),
        ("tolerances.logprob", -0.1),
        ("thresholds.latency_factor_of_warm", 1),
        ("thresholds.latency_fraction_of_cold", 1),
        ("thresholds.min_distinct_tokens", 1),
        ("timeouts.boot_s", 0),
        ("timeouts.step_s", 0),
    ],
)
def test_a_value_that_would_prove_nothing_is_refused(key: str, value: float) -> None:
    assert refused({key: value}).startswith(f"Profile 'tiny': {key}={value!r} will not do: Input should be ")


# Engine arguments ----------------------------------------------------------------------------------------------------


def test_engine_arguments_are_the_profiles_with_the_platforms() -> None:
    changed = load_profile("tiny", {"engine.page_size": 16, "on_cpu.engine.page_size": "32"})
    tpu, cpu = changed.engine_args("tpu"), changed.engine_args("cpu")
    assert (tpu["device"], tpu["page_size"]) == ("tpu", 16)
    assert (cpu["device"], cpu["page_size"]) == ("cpu", 32)
    assert cpu["max_prefill_tokens"] == tpu["max_prefill_tokens"] == 1024
    assert "model_path" not in tpu


def test_server_args_are_those_of_the_installed_engine() -> None:
    fields = server_args_fields()
    assert fields >= {"model_path", "tp_size", "dp_size", "page_size", "max_total_tokens", "attention_backend"}
    assert not any(name.startswith("_") for name in fields)


def test_without_sglang_jax_engine_arguments_go_unchecked(other_fields: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert server_args_fields() == frozenset()
    assert load_profile("tiny", {"engine.nonsense": 1}).engine_args("cpu")["nonsense"] == 1
    with pytest.raises(ProfileError, match=r"^engine\.device cannot be set: "):
        load_profile("tiny", {"engine.device": "cpu"})


# Files ---------------------------------------------------------------------------------------------------------------


def test_an_unknown_profile_names_the_nearest_and_all_there_are() -> None:
    known = ", ".join(profile_names())
    for name, hint in (("tinny", " (did you mean 'tiny'?)"), ("zzz", "")):
        with pytest.raises(ProfileError) as caught:
            load_profile(name)
        assert str(caught.value) == f"There is no profile {name!r}{hint}; there are: {known}."


@pytest.mark.parametrize("name", ["nowhere.toml", "folder/nowhere"])
def test_a_profile_file_that_does_not_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProfileError) as caught:
        load_profile(name)
    assert str(caught.value) == f"There is no profile file {name!r}."


def test_a_profile_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[model]\npath = "org/name"\n[engine]\ntp_size = 2\n')
    for given in (path, str(path)):
        mine = load_profile(given, {"engine.page_size": 4})
        assert (mine.name, mine.engine.tp_size, mine.engine.page_size) == ("mine", 2, 4)
        assert mine.model_folder() is None
        assert mine.model_config_json() is None


def test_a_broken_profile_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine\n')
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert str(caught.value) == f"The profile {path} is not valid TOML: Illegal character '\\n' (at line 1, column 13)."
    path.write_bytes(b"\xff")
    with pytest.raises(ProfileError, match=r"^The profile .*mine\.toml cannot be read: 'utf-8' codec"):
        load_profile(path)


def test_an_unknown_key_in_a_profile_file_is_named_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('nam = "mine"\n[model]\npath = "org/name"\n')
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert str(caught.value) == f"Profile {str(path)!r} lacks the key 'name'."


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_that_comes_with_kvcycle_loads_and_is_named_by_its_file(name: str) -> None:
    loaded = load_profile(name)
    assert loaded.name == name
    assert loaded.description
