"""The plan by the real TPU compiler. It needs libtpu and no TPU; every plan is a process of its own, of some 8 s."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvcycle import reference
from kvcycle.checkpoint import TINY_QWEN2
from kvcycle.cli import app
from kvcycle.errors import PlatformError
from kvcycle.params import ParamSet
from kvcycle.plan import Plan, ask, plan
from kvcycle.plan.protocol import Reply
from kvcycle.plan.topologies import find_topology
from kvcycle.profile import Profile
from kvcycle.profile_file import load_profile
from kvcycle.record import Record
from kvcycle.record_parts import PHASES
from tests.simulated.compiler import PLANS, needs_libtpu

RUNNER = CliRunner()

#: Small batches and a short context: the steps then compile in seconds.
SMALL: dict[str, Any] = {
    "engine.max_running_requests": 2,
    "engine.max_prefill_tokens": 64,
    "engine.chunked_prefill_size": 64,
}

ConfigWriter = Callable[..., Path]


@pytest.fixture(scope="module")
def write_config(tmp_path_factory: pytest.TempPathFactory) -> ConfigWriter:
    """Write a folder that holds nothing but a config.json: the tiny Qwen2's with changes."""

    def write(**changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps(TINY_QWEN2 | {"max_position_embeddings": 512} | changes))
        return folder

    return write


@pytest.fixture(scope="module")
def small(write_config: ConfigWriter) -> Profile:
    """The tiny model with pages of 16 tokens."""
    return load_profile("tiny", SMALL | {"model.path": str(write_config()), "engine.page_size": 16})


@pytest.fixture(scope="module")
def asked(small: Profile) -> Reply:
    """Everything that can be asked about the small profile on a v4-8."""
    return ask(small, "v4-8", forward=True, max_tokens=True)


@pytest.fixture(scope="module")
def planned(asked: Reply) -> Plan:
    """The plan among it."""
    assert asked.plan is not None
    return asked.plan


@pytest.mark.skipif(PLANS, reason="kvcycle plans with this sglang-jax")
def test_another_way_of_allocating_is_refused_by_name() -> None:
    result = RUNNER.invoke(app, ["plan", "-p", "tiny", "-t", "v4-8"])
    assert result.exit_code != 0
    assert " ".join(result.output.split()) == (
        "This version of kvcycle cannot plan with sglang-jax 0.0.3rc0: sgl_jax.srt.mem_cache.memory_pool has no "
        "_get_kv_zero_allocator. It is known to plan with sglang-jax 0.1.0rc0."
    )


def loaded_params_bytes(config: dict[str, Any], tp: int) -> int:
    """What the weights take, summed over ``tp`` devices: matrices are split, vectors are held by every device.

    Written down from sglang-jax's models, without its code; KV heads are replicated up to tp.
    """
    hidden, inner, layers = (int(config[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    dim = int(config.get("head_dim") or hidden // config["num_attention_heads"])
    q, kv = int(config["num_attention_heads"]) * dim, max(int(config["num_key_value_heads"]), tp) * dim
    split = layers * (2 * hidden * q + 2 * hidden * kv + 3 * hidden * inner)
    split += int(config["vocab_size"]) * hidden * (1 if config["tie_word_embeddings"] else 2)
    vectors = [hidden] * (1 + 2 * layers)  # the norms
    if config["model_type"] == "qwen2":
        vectors += [q, kv, kv] * layers  # the biases
    if config["model_type"] == "qwen3":
        vectors += [dim, dim] * layers  # the norms of queries and keys
    return 2 * split + tp * sum(max(2 * width, 512) for width in vectors)  # nothing is smaller than 512 B on a TPU


@needs_libtpu
def test_the_phases_are_exact_by_owner_and_device(planned: Plan) -> None:
    weights = loaded_params_bytes(TINY_QWEN2, 4)
    kv = 4 * (16384 + 16) * 4 * 2 * 128 * 2  # layers, tokens and a page, heads, K and V, width, bytes
    record = planned.record
    assert record.evidence == "compiled-for-tpu"
    assert (record.params.bytes_on_devices, record.params.arrays) == (weights, 51)
    assert (record.kv.bytes, record.kv.buffers, record.kv.claimed_bytes) == (kv, 4, kv)
    assert record.kv.predicted_bytes == kv
    sums = {phase.name: phase.ledger_bytes_sum for phase in record.cycles[0].phases}
    assert tuple(sums) == PHASES
    assert sums == {
        "engine_ready": weights + kv,
        "generate_result": weights + kv,
        "flush_cache_before_kv_drop": weights + kv,
        "kv_cache_dropped": weights,
        "sglang_param_dict2_ready": 2 * weights,
        "kv_cache_rebuilt": 2 * weights + kv,
        "generate_result_after_kv_rebuild": 2 * weights + kv,
        "after_drop_param_dict2": weights + kv,
    }
    rebuilt = record.cycles[0].phase("kv_cache_rebuilt")
    assert rebuilt is not None
    assert [use.id for use in rebuilt.devices] == [0, 1, 2, 3]
    for use in rebuilt.devices:
        assert use.by_owner == {"weights": weights // 4, "kv": kv // 4, "params2": weights // 4}
        assert use.ledger_bytes == sum(use.by_owner.values())


@needs_libtpu
def test_the_plan_fits_with_headroom_to_the_byte(planned: Plan) -> None:
    assert planned.fits
    assert planned.capacity_bytes == find_topology("v4-8").capacity_bytes
    for phase in planned.phases:
        assert phase.fits
        assert phase.headroom_bytes == planned.capacity_bytes - phase.bytes_per_device - phase.program_bytes
        assert phase.program_bytes < 2**20
    steps_left = [step.headroom_with_params2_bytes for step in planned.forward]
    assert planned.headroom_bytes == min(
        [phase.headroom_bytes for phase in planned.phases] + [left or 0 for left in steps_left]
    )
    assert planned.peak_rss_bytes < 2 * 2**30


@needs_libtpu
def test_the_record_is_read_again_and_names_its_devices(planned: Plan, tmp_path: Path) -> None:
    planned.record.save(tmp_path / "record.json")
    record = Record.load(tmp_path / "record.json")
    assert record == planned.record
    assert {device.kind for device in record.devices} == {"TPU v4"}
    assert {device.limit_bytes for device in record.devices} == {planned.capacity_bytes}
    assert record.stack.libtpu is not None


@needs_libtpu
def test_the_models_steps_are_compiled_and_take_the_kv_cache_as_their_own(planned: Plan) -> None:
    assert [(step.step, step.batch, step.tokens) for step in planned.forward] == [("decode", 2, 2), ("prefill", 2, 64)]
    assert planned.largest_prefill_tokens == 64
    for step in planned.forward:
        assert step.fits
        assert step.fits_with_params2
        assert step.kv_donated
        assert step.alias_bytes == planned.record.kv.bytes // 4
        held = planned.phases[0].bytes_per_device
        assert step.argument_bytes is not None
        assert 0 < step.argument_bytes - held < 2**20  # the batch
        assert step.headroom_bytes is not None
        assert step.headroom_bytes < planned.phases[0].headroom_bytes


@needs_libtpu
def test_the_weights_are_as_large_as_a_live_engine_loads_them(planned: Plan, live_engine: Any) -> None:
    loaded = ParamSet.of(live_engine)
    assert planned.record.params.bytes_by_device == loaded.bytes_by_device
    assert planned.record.params.arrays == len(loaded.leaves)


@needs_libtpu
def test_the_largest_number_of_tokens_fits_and_one_page_more_does_not(asked: Reply, small: Profile) -> None:
    limits = asked.max_tokens
    assert limits is not None
    together, alone = limits.with_params2, limits.without_params2
    for limit in (together, alone):
        assert limit.tokens % 16 == 0
        assert limit.refused_tokens == limit.tokens + 16
        assert limit.headroom_bytes is not None
        # A page takes 4 layers x 16 tokens x 512 B on a device.
        assert limit.headroom_bytes + limit.missing_bytes == pytest.approx(4 * 16 * 512, abs=4096)
        assert "Ran out of memory" in limit.refusal
    assert (alone.tokens - together.tokens) * 4 * 512 == pytest.approx(
        loaded_params_bytes(TINY_QWEN2, 4) // 4, rel=0.02
    )
    assert limits.compiles < 30
    # Asked for independently: at one page more, the phases without a second set still fit.
    over = plan(with_tokens(small, together.refused_tokens), "v4-8")
    misfits = [phase.name for phase in over.phases if not phase.fits]
    assert misfits == ["kv_cache_rebuilt", "generate_result_after_kv_rebuild"]
    assert over.first_misfit is not None
    assert over.first_misfit.headroom_bytes == -together.missing_bytes


@needs_libtpu
def test_what_does_not_fit_is_named_with_phase_and_bytes_and_exit_code_1(small: Profile, tmp_path: Path) -> None:
    answer = tmp_path / "plan.json"
    arguments = ["plan", "-p", "tiny", "-t", "v5litepod-4", "--fail-if-it-does-not-fit", "--json", str(answer)]
    result = RUNNER.invoke(app, [*arguments, "--set", "engine.max_total_tokens=16000000"])
    assert result.exit_code == 1
    found = Plan.model_validate_json(json.dumps(json.loads(answer.read_text())["plans"][0]))
    held = loaded_params_bytes(TINY_QWEN2, 4) // 4 + 4 * 16_000_001 * 512
    assert [phase.fits for phase in found.phases] == [False, False, False, True, True, False, False, False]
    first = found.first_misfit
    assert first is not None
    assert (first.name, first.bytes_per_device) == ("engine_ready", held)
    # The compiler does not say what a program so far over takes itself, but that is some ten KiB.
    missing = held - 16_126 * 2**20
    assert missing < -first.headroom_bytes < missing + 100 * 2**10
    assert "Ran out of memory" in (first.refusal or "")
    words = " ".join(result.stdout.split())
    assert (
        f"DOES NOT FIT [compiled-for-tpu] on v5e-4: engine_ready (weights + KV) is {-first.headroom_bytes / 2**30:.2f}"
        in words
    )
    assert f"({-first.headroom_bytes:,} B) over on each device" in words
    assert "the engine would itself lower max_total_tokens from 16,000,000 to about 7" in words


@needs_libtpu
def test_an_attention_backend_that_a_topology_lacks_is_a_sentence_with_the_key_to_change() -> None:
    result = RUNNER.invoke(app, ["plan", "-p", "tiny", "-t", "v4-8", "--set", "engine.attention_backend=fa"])
    assert result.exit_code == 2
    assert "on v4-8 with engine.attention_backend='fa': Unsupported tpu_version=4" in result.stderr
    assert "Set engine.attention_backend='native'" in result.stderr
    assert "Traceback" not in result.output


@needs_libtpu
@pytest.mark.parametrize(
    ("changes", "topology"),
    [
        (
            {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "attention_bias": False},
            "v6e-4",
        ),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}, "v5p-8"),
    ],
    ids=["qwen3", "llama"],
)
def test_other_models_need_their_config_alone(
    write_config: ConfigWriter, changes: dict[str, Any], topology: str
) -> None:
    found = plan(load_profile("tiny", SMALL | {"model.path": str(write_config(**changes))}), topology)
    assert found.fits
    assert found.record.params.bytes_on_devices == loaded_params_bytes(TINY_QWEN2 | changes, 4)
    assert found.record.kv.bytes == found.record.kv.predicted_bytes == 134_225_920


@needs_libtpu
def test_a_slice_of_several_hosts_has_its_devices_by_host_and_kv_heads_on_each(write_config: ConfigWriter) -> None:
    heads = {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": False}
    config = heads | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    profile = load_profile("tiny", SMALL | {"model.path": str(write_config(**config)), "engine.tp_size": 16})
    found = plan(profile, "v5litepod-16")
    record = found.record
    assert found.fits
    # A host is 2x2 chips of 4x4, and the devices are numbered row by row.
    assert [device.host for device in record.devices] == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    # Two KV heads on sixteen devices: each device has a copy of one, so the cache is eight times as large.
    kv = 4 * (16384 + 1) * 16 * 2 * 128 * 2
    assert record.kv.bytes == record.kv.predicted_bytes == record.kv.claimed_bytes == kv
    assert set(record.kv.bytes_by_device.values()) == {kv // 16}
    assert record.params.bytes_on_devices == loaded_params_bytes(TINY_QWEN2 | config, 16)


def test_without_libtpu_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The planning process then finds no libtpu, whether it is installed here or not.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'libtpu' else find(name, package)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        PlatformError, match=r"libtpu is not installed\. It needs no TPU: pip install 'kvcycle\[plan\]'"
    ):
        plan(load_profile("tiny"), "v4-8")
    result = RUNNER.invoke(app, ["plan", "-p", "tiny", "-t", "v4-8"])
    assert result.exit_code == 2
    assert "pip install 'kvcycle[plan]'" in result.stderr


@needs_libtpu
def test_the_reference_model_has_the_references_bytes() -> None:
    found = plan(load_profile("qwen2.5-3b-v4-8"), "v4-8")
    noted = reference.load().runs[0]
    assert found.fits
    assert found.record.kv.bytes == noted.kv_bytes == 2_415_992_832
    assert found.record.kv.buffers == noted.kv_buffers == 36
    assert found.record.params.bytes_on_devices == noted.params_bytes == 6_248_972_288
    sums = {phase.name: phase.ledger_bytes_sum for phase in found.record.cycles[0].phases}
    assert sums["kv_cache_rebuilt"] == 14_913_937_408
    assert sums["kv_cache_dropped"] - sums["flush_cache_before_kv_drop"] == -2_415_992_832
    changes = noted.changes()
    assert {name: sums[name] - sums[before] for before, name in pairwise(PHASES) if name in changes} == changes
    assert found.peak_rss_bytes < 2 * 2**30


def with_tokens(profile: Profile, tokens: int) -> Profile:
    """The profile with another number of tokens."""
    engine = profile.engine.model_copy(update={"max_total_tokens": tokens})
    return profile.model_copy(update={"engine": engine})
