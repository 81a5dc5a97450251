"""What was run at which level: the pools, the geometries, the engines. One table, read by the tests that run it.

``kvcycle matrix`` prints it, docs/compatibility.md quotes that, and a cell stands in it only because a test is
parametrized with it: tests/simulated/test_matrix.py. What a version of sglang-jax lacks (:mod:`kvcycle.versions`) is no
cell there, and stands in the table as what it lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from kvcycle import checkpoint, versions
from kvcycle.versions import Part

PAGE_SIZES = (1, 16, 128)
TP_SIZES = (1, 2, 4, 8)
DP_SIZES = (1, 2)
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Geometry:
    """What decides a pool's shapes and where its parts lie; ``tp_size`` devices in all, as sglang-jax counts."""

    page_size: int
    tp_size: int
    dp_size: int
    dtype: str

    @property
    def name(self) -> str:
        """For test ids: ``page16-tp4-dp2-bfloat16``."""
        return f"page{self.page_size}-tp{self.tp_size}-dp{self.dp_size}-{self.dtype}"


#: All of them; a data-parallel rank needs a device of its own.
GEOMETRIES = tuple(
    Geometry(*values) for values in product(PAGE_SIZES, TP_SIZES, DP_SIZES, DTYPES) if values[1] % values[2] == 0
)


@dataclass(frozen=True)
class PoolKind:
    """A combination of pools that an engine can have; ``unbooted`` says why no engine of it runs here, if none does.

    A version that lacks something of ``needs`` has no such pool, one that lacks something of ``beside`` has it alone.
    """

    id: str
    classes: str
    buffers: str
    models: str
    predicted: bool = True
    unbooted: str = ""
    needs: tuple[Part, ...] = ()
    beside: tuple[Part, ...] = ()


POOLS = (
    PoolKind("mha", "MHATokenToKVPool", "kv_buffer", "Qwen2, Qwen3, Qwen3-MoE, Llama, …"),
    PoolKind("swa", "SWAKVPool", "two MHATokenToKVPool: window layers, full layers", "Gemma2, MiMo-V2, …"),
    PoolKind("mla", "MLATokenToKVPool", "kv_buffer", "DeepSeek-V3, …"),
    PoolKind(
        "mla-indexer",
        "MLATokenToKVPool with an indexer",
        "kv_buffer, indexer_key_buffer",
        "DeepSeek sparse attention, GLM-5",
        unbooted="its backend asks for a TPU when it boots",
        needs=(versions.INDEXER,),
    ),
    PoolKind(
        "hybrid-mha",
        "HybridLinearKVPool (MHA), RecurrentStatePool",
        "kv_buffer; recurrent_buffers, conv_buffers",
        "Qwen3.5, Bailing-linear; Kimi-Linear with the native backend",
    ),
    PoolKind(
        "hybrid-mla",
        "HybridLinearKVPool (MLA), RecurrentStatePool",
        "kv_buffer; recurrent_buffers, conv_buffers",
        "Kimi-Linear",
    ),
    PoolKind(
        "draft",
        "the draft workers' MHATokenToKVPool, SpecRelayBuffers, DFlashRelayBuffers",
        "kv_buffer; the tuple's entries",
        "EAGLE, MTP, DFlash beside a target",
        predicted=False,
        beside=(versions.RELAY_BUFFERS,),
    ),
)


@dataclass(frozen=True)
class PoolCell:
    """One pool kind in one geometry: its real classes built, dropped and rebuilt, its size predicted."""

    pool: str
    geometry: Geometry

    @property
    def id(self) -> str:
        """The test's id."""
        return f"{self.pool}-{self.geometry.name}"


def pool_cells(version: str | None = versions.NEWEST) -> tuple[PoolCell, ...]:
    """Every pool kind that a version of sglang-jax has, in every geometry."""
    return tuple(PoolCell(pool.id, geometry) for pool in POOLS if not lacking(pool, version) for geometry in GEOMETRIES)


@dataclass(frozen=True)
class EngineRun:
    """One engine that is booted and goes through the whole cycle, or through it without generation.

    ``engine`` and ``cycle`` are keys of those tables of a profile, ``also`` what it shows besides its geometry.
    """

    id: str
    model: str
    geometry: Geometry
    generate: bool
    pool: str = "mha"
    also: str = ""
    engine: Mapping[str, Any] = field(default_factory=dict)
    cycle: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[Part, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """The model's config."""
        return (checkpoint.BUILTIN | checkpoint.GEOMETRIES)[self.model]

    def overrides(self) -> dict[str, Any]:
        """What the run changes of the profile ``tiny``; for a model without weights, all but where its config is."""
        geometry = {name: getattr(self.geometry, name) for name in ("page_size", "tp_size", "dp_size", "dtype")}
        engine = {"max_total_tokens": 4096} | geometry | dict(self.engine)
        # One prompt must fill a page, or the prefix cache is never hit and the control of it fails.
        prompt = "Hello, KV cache. " * max(1, -(-(self.geometry.page_size + 16) // 17))
        # Latency needs the control that compiles all anew: half of a run's time, and not what the runs are for.
        cycle = {"cycles": 1, "generate": self.generate, "prompt": prompt}
        cycle |= {"recompile_control": False} | dict(self.cycle)
        return (
            ({} if self.model in checkpoint.GEOMETRIES else {"model.path": f"builtin:{self.model}"})
            | {f"engine.{key}": value for key, value in engine.items()}
            | (
                {"on_cpu.engine": {"attention_backend": backend}}
                if (backend := engine.get("attention_backend"))
                else {}
            )
            | {f"cycle.{key}": value for key, value in cycle.items()}
        )


_BF16, _FP32 = DTYPES

ENGINE_RUNS = (
    EngineRun("qwen2", "tiny-qwen2", Geometry(16, 4, 2, _BF16), generate=True),
    EngineRun(
        "qwen3",
        "tiny-qwen3",
        Geometry(128, 2, 1, _FP32),
        generate=True,
        also="radix cache off",
        engine={"disable_radix_cache": True},
    ),
    EngineRun(
        "qwen3-moe",
        "tiny-qwen3-moe",
        Geometry(1, 2, 1, _BF16),
        generate=True,
        also="overlap off",
        engine={"disable_overlap_schedule": True},
    ),
    EngineRun(
        "llama",
        "tiny-llama",
        Geometry(16, 1, 1, _BF16),
        generate=True,
        also="chunked prefill: a prompt of several chunks",
        engine={"chunked_prefill_size": 32},
        cycle={"prompt": "Hello, KV cache. " * 6},
    ),
    EngineRun("llama-tp8", "tiny-llama", Geometry(128, 8, 1, _FP32), generate=False),
    EngineRun("gemma2", "tiny-gemma2", Geometry(1, 4, 1, _BF16), generate=False, pool="swa"),
    EngineRun("gemma2-dp2", "tiny-gemma2", Geometry(16, 8, 2, _FP32), generate=False, pool="swa"),
    EngineRun(
        "deepseek-v3",
        "tiny-deepseek-v3",
        Geometry(1, 2, 1, _BF16),
        generate=False,
        pool="mla",
        engine={"attention_backend": "fa"},
    ),
    EngineRun(
        "deepseek-v3-dp2",
        "tiny-deepseek-v3",
        Geometry(16, 4, 2, _BF16),
        generate=False,
        pool="mla",
        engine={"attention_backend": "fa"},
    ),
    EngineRun(
        "kimi-linear",
        "tiny-kimi-linear",
        Geometry(1, 2, 1, _BF16),
        generate=False,
        pool="hybrid-mla",
        also="radix cache off",
        engine={"attention_backend": "fa", "disable_radix_cache": True},
    ),
    EngineRun(
        "kimi-linear-native",
        "tiny-kimi-linear",
        Geometry(16, 4, 2, _FP32),
        generate=False,
        pool="hybrid-mha",
        also="radix cache off",
        engine={"attention_backend": "native", "disable_radix_cache": True},
    ),
    EngineRun(
        "eagle3",
        "tiny-llama",
        Geometry(1, 2, 1, _BF16),
        generate=False,
        pool="draft",
        also="a draft model, its relay buffers, overlap off",
        engine={
            "disable_overlap_schedule": True,
            "speculative_algorithm": "EAGLE3",
            "speculative_eagle_topk": 1,
            "speculative_num_steps": 3,
            "speculative_num_draft_tokens": 4,
            "load_format": "dummy",
        },
    ),
    EngineRun(
        "hicache",
        "tiny-llama",
        Geometry(16, 2, 1, _BF16),
        generate=False,
        also="HiCache: pages of the prefix cache in host memory",
        engine={"hicache_storage": "none", "enable_unified_radix_tree": True},
        needs=(versions.HICACHE,),
    ),
    EngineRun(
        "lora",
        "tiny-llama",
        Geometry(1, 2, 1, _BF16),
        generate=False,
        also="LoRA: the adapters' buffers are weights",
        engine={
            "enable_static_lora": True,
            "max_lora_rank": 8,
            "lora_target_modules": ["q_proj", "o_proj"],
            "lora_scaling": 1.0,
            "max_loras_per_batch": 1,
        },
    ),
)


def engine_runs(version: str | None = versions.NEWEST) -> tuple[EngineRun, ...]:
    """The engine runs that a version of sglang-jax has all parts for."""
    return tuple(run for run in ENGINE_RUNS if not lacking(run, version))


def lacking(of: PoolKind | EngineRun, version: str | None) -> tuple[Part, ...]:
    """What a version lacks of what a pool kind or an engine run needs; () where it can be."""
    return tuple(part for part in of.needs if not versions.has(part, version))


#: What beside the pools holds KV buffers, or copies them, and what becomes of it.
OTHERS = (
    ("HiCache (LRUHostKVPool)", "handled: it reads the buffers through the pool, and the flush waits for its copies"),
    ("LoRA adapters", "weights: they stay when the KV cache is dropped"),
    (
        "PD disaggregation (Raiden, QueueHostKVPool)",
        "refused before anything is deleted: pages move outside of batches",
    ),
    ("Pathways PD", "refused before anything is deleted: pools of two meshes, pages move between them"),
    ("a pool class nobody has seen", "walked in the same way; an array that cannot be placed is an error naming it"),
    ("a pool that points back to its model or runner", "the walk stops there; a weight reached otherwise is an error"),
)


def markdown() -> str:
    """The whole table, as docs/compatibility.md has it."""
    return f"{_pools()}\n\n{_geometry()}\n\n{_runs()}\n\n{_others()}\n"


def _table(title: str, text: str, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join(part for part in (f"## {title}", text, table) if part)


def _named(runs: Iterable[EngineRun]) -> str:
    return ", ".join(f"`{run.id}`" for run in runs) or "–"


def _pools() -> str:
    def rows() -> Iterable[tuple[str, ...]]:
        for pool in POOLS:
            runs = [run for run in ENGINE_RUNS if run.pool == pool.id]
            levels = [
                f"{level}: {_named(chosen)}"
                for level, generate in (("whole cycle", True), ("without generation", False))
                if (chosen := [run for run in runs if run.generate is generate])
            ]
            yield (
                pool.classes, pool.buffers, pool.models, "; ".join(levels) or f"– ({pool.unbooted})",
                f"{len(GEOMETRIES)} geometries", *(_pool_level(pool, version) for version in versions.OLDER),
                "yes" if pool.predicted else "pool by pool",
            )  # fmt: skip

    return _table(
        "Pools",
        "Where no engine runs on a CPU, sglang-jax's own pool classes are built on virtual devices, dropped and "
        "rebuilt. The last column says whether a run's size is predicted from the model's config; `pool by pool`: the "
        "arithmetic of each pool is tested, but how the engine divides the memory among them is its own choice, so a "
        "run's `drop.size_is_predicted` says that nothing predicts it.",
        (
            "pool", "device buffers", "models", "engine level", "pool level",
            *(f"pool level, {version}" for version in versions.OLDER), "size from the config",
        ),
        rows(),
    )  # fmt: skip


def _pool_level(pool: PoolKind, version: str) -> str:
    """What was run of a pool with a version older than the newest."""
    left_out = ", ".join(part.text for part in pool.beside if not versions.has(part, version))
    with_them = f"{len(GEOMETRIES)} geometries" + (f", without what is not in it: {left_out}" if left_out else "")
    return _missing(pool, version) or with_them


def _missing(of: PoolKind | EngineRun, version: str) -> str:
    parts = lacking(of, version)
    return f"not in this version: no {', '.join(part.text for part in parts)}" if parts else ""


def _geometry() -> str:
    def row(name: str, value: object, runs: list[EngineRun], pool_level: str) -> tuple[str, ...]:
        whole = [run for run in runs if run.generate]
        rest = [run for run in runs if not run.generate]
        return f"{name} {value}", pool_level, _named(whole), _named(rest)

    def rows() -> Iterable[tuple[str, ...]]:
        axes: tuple[tuple[str, tuple[Any, ...]], ...] = (
            ("page_size", PAGE_SIZES), ("tp_size", TP_SIZES), ("dp_size", DP_SIZES), ("dtype", DTYPES),
        )  # fmt: skip
        for axis, values in axes:
            for value in values:
                cells = sum(getattr(cell.geometry, axis) == value for cell in pool_cells())
                runs = [run for run in ENGINE_RUNS if getattr(run.geometry, axis) == value]
                yield row(axis, value, runs, f"{cells} cells")
        for name, key in (("overlap", "disable_overlap_schedule"), ("radix cache", "disable_radix_cache")):
            for value in ("on", "off"):
                runs = [run for run in ENGINE_RUNS if bool(run.engine.get(key)) is (value == "off")]
                yield row(name, value, runs, "no part in it")
        chunked = [run for run in ENGINE_RUNS if "chunked_prefill_size" in run.engine]
        yield row("chunked prefill", "in several chunks", chunked, "no part in it")

    return _table(
        "Geometry",
        f"At pool level every combination of the first four: {len(GEOMETRIES)} geometries of {len(POOLS)} kinds of "
        f"pools, {len(pool_cells())} cells, each with its predicted size exact"
        + "".join(f"; of sglang-jax {version} {len(pool_cells(version))} cells" for version in versions.OLDER)
        + f". The table counts those of {versions.NEWEST}.",
        ("axis", "pool level", "engine, whole cycle", "engine, without generation"),
        rows(),
    )


def _runs() -> str:
    return _table(
        "Engines",
        "Each in a process of its own: boot, drop, second parameter set, rebuild; whole: generating before and after, "
        "the same tokens, nothing compiled. What takes a larger pool or more cycles to see is left to the suite and "
        "the soak: latency, resident memory, growth.",
        ("run", "model", "geometry", "besides", "cycle", *versions.OLDER),
        (
            (
                f"`{run.id}`", run.model, run.geometry.name.replace("-", ", "), run.also or "–",
                "whole" if run.generate else "without generation",
                *(_missing(run, version) or "as well" for version in versions.OLDER),
            )
            for run in ENGINE_RUNS
        ),
    )  # fmt: skip


def _others() -> str:
    return _table("What else holds or copies buffers", "", ("what", "what becomes of it"), OTHERS)
