"""Profiles: which model, engine arguments, cycle, tolerances and thresholds make one validation run.

A profile is a TOML file. Everything about it that can be wrong is said in one sentence before an engine boots: unknown
keys with the nearest known one, an impossible tp_size, a missing model folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field

from kvcycle import checkpoint
from kvcycle.errors import ProfileError
from kvcycle.text import nearest

Platform = Literal["tpu", "cpu"]

#: sglang-jax takes the port at which hosts meet, and the fifth and the sixth after it.
MAX_PORT = 65_535 - 6

#: More than a run of the suite can mean: a record of more is not read.
MAX_CYCLES = 1000

_SHIPPED = "shipped:"
_CONFIGS = Path(__file__).resolve().parent / "configs"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(_Table):
    """Where the weights are: a folder, a hub id, or ``builtin:NAME`` for a checkpoint that kvcycle writes."""

    path: str
    seed: int = 0
    #: Where the geometry is known without the weights: ``shipped:NAME``, or a folder with a config.json.
    config: str | None = None


class EngineArgs(BaseModel):
    """Arguments of sglang-jax's Engine; any field of its ServerArgs may stand here, these are checked for sense."""

    model_config = ConfigDict(extra="allow", frozen=True)

    tp_size: int = Field(default=1, ge=1)
    dp_size: int = Field(default=1, ge=1)
    page_size: int = Field(default=1, ge=1)
    max_total_tokens: int | None = Field(default=None, ge=1)
    disable_precompile: bool = True
    skip_server_warmup: bool = True
    random_seed: int = 0
    #: Hosts of the engine, each with as many of the devices; which one this is; and where host 0 is met, as HOST:PORT.
    nnodes: int = Field(default=1, ge=1)
    node_rank: int = Field(default=0, ge=0)
    dist_init_addr: str | None = None


class OnCPU(_Table):
    """What differs when the suite runs on virtual CPU devices."""

    engine: dict[str, Any] = Field(default_factory=lambda: {"attention_backend": "native"})
    #: Boot with dummy weights from the geometry in model.config: no download, and no meaningful output.
    dummy_weights: bool = False
    #: False where the machine could not generate at this width: bytes are simulated, generation is left out.
    generate: bool = True
    #: What each virtual device can hold, in bytes or as "30.75GiB"; None for as much as the host has.
    limit_bytes: ByteSize | None = Field(default=None, gt=0)


class CycleSpec(_Table):
    """What one run does: how many cycles, which prompt, what the second parameter set is."""

    cycles: int = Field(default=2, ge=1, le=MAX_CYCLES)
    generate: bool = True
    prompt: str = "Hello"
    max_new_tokens: int = Field(default=16, ge=1)
    warm_generates: int = Field(default=3, ge=1)
    #: The second set is ``x + perturb * |x|`` of the first: it must change the output when swapped in.
    perturb: float = Field(default=0.5, gt=0)
    #: Drops once more with jax.clear_caches(), and must see the compilations and the latency that this causes.
    recompile_control: bool = True
    #: Releases the weights at the end of every cycle, and resumes them bit for bit: needs host memory for a copy.
    release_weights: bool = False
    #: Bytes allocated and freed on each device to see that every witness sees.
    canary_bytes: int = Field(default=16 * 2**20, ge=2**12)


class Tolerances(_Table):
    """How far a witness may be off. The ledger has none: it is exact."""

    allocator_bytes: int = Field(default=0, ge=0, lt=2**63)
    rss_fraction: float = Field(default=0.02, ge=0, lt=1)
    #: Of the log-probabilities before and after; 0 means bit-equal.
    logprob: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class Thresholds(_Table):
    """Latency after the rebuild, against this machine's own warm and cold times; and when output counts as varied."""

    latency_factor_of_warm: float = Field(default=3.0, gt=1, allow_inf_nan=False)
    latency_fraction_of_cold: float = Field(default=0.5, gt=0, lt=1)
    min_distinct_tokens: int = Field(default=6, ge=2, lt=2**63)


class Timeouts(_Table):
    """Deadlines in seconds; what does not answer by then is an error that says what was waited for."""

    boot_s: float = Field(default=900.0, gt=0)
    #: For every step of a cycle and every generation, the first one's compilation included.
    step_s: float = Field(default=900.0, gt=0)


class Profile(_Table):
    """A whole validation run; see the classes of its tables."""

    name: str
    description: str = ""
    #: The TPU slice that the profile is meant for, as ``kvcycle plan`` takes it: whose compiler says the sizes.
    topology: str | None = None
    model: ModelSpec
    engine: EngineArgs = EngineArgs()
    on_cpu: OnCPU = OnCPU()
    cycle: CycleSpec = CycleSpec()
    tolerances: Tolerances = Tolerances()
    thresholds: Thresholds = Thresholds()
    timeouts: Timeouts = Timeouts()

    def engine_args(self, platform: Platform) -> dict[str, Any]:
        """The engine arguments for a platform, without the model's path."""
        arguments = self.engine.model_dump()
        if platform == "cpu":
            arguments = EngineArgs.model_validate(arguments | self.on_cpu.engine).model_dump()
            if self.on_cpu.dummy_weights:
                arguments["load_format"] = "dummy"
        return arguments | {"device": platform}

    def on(self, platform: Platform) -> Profile:
        """The profile as it runs on a platform: on CPU, without generation where on_cpu.generate says so."""
        if platform == "cpu" and not self.on_cpu.generate:
            return self.model_copy(update={"cycle": self.cycle.model_copy(update={"generate": False})})
        return self

    @property
    def devices_needed(self) -> int:
        """How many devices the engine spans: tp_size (data-parallel ranks share them)."""
        return self.engine.tp_size

    @property
    def devices_here(self) -> int:
        """How many of them are this host's."""
        return self.devices_needed // self.engine.nnodes

    def model_folder(self) -> Path | None:
        """The local folder of the model, written first if it is built in; None for a hub id.

        Raises:
            ProfileError: the folder does not exist, has no config.json, or cannot be written.
        """
        path = self.model.path
        if path.startswith(checkpoint.BUILTIN_PREFIX):
            name = path.removeprefix(checkpoint.BUILTIN_PREFIX)
            if name not in checkpoint.BUILTIN:
                hint = nearest(name, checkpoint.BUILTIN)
                raise ProfileError(f"model.path={path!r}: there is no built-in checkpoint of that name{hint}.")
            try:
                return checkpoint.ensure_builtin(name, seed=self.model.seed)
            except OSError as error:
                raise ProfileError(
                    f"The checkpoint {path!r} cannot be written to {checkpoint.cache_root()}: {error}. "
                    "Set KVCYCLE_CACHE to a folder that can be written."
                ) from error
        folder = Path(path).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ProfileError(f"model.path={path!r} is a folder without a config.json, so it is no checkpoint.")
            return folder.resolve()
        if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
            raise ProfileError(
                f"model.path={path!r} does not exist; name a folder with a config.json, a hub id (org/name), "
                f"or one of {', '.join(checkpoint.BUILTIN_PREFIX + name for name in checkpoint.BUILTIN)}."
            )
        return None

    def boot_folder(self, platform: Platform) -> Path | None:
        """The folder to boot from: the model's, or on CPU with dummy weights one with its geometry only.

        Raises:
            ProfileError: as :meth:`model_folder`.
        """
        if platform != "cpu" or not self.on_cpu.dummy_weights:
            return self.model_folder()
        config = self.model_config_json()
        if config is None:
            raise ProfileError(
                "on_cpu.dummy_weights needs a geometry: set model.config to a folder with a config.json."
            )
        try:
            return checkpoint.ensure(f"{self.name}-geometry", config, weights=False)
        except OSError as error:
            raise ProfileError(
                f"The geometry of {self.name} cannot be written to {checkpoint.cache_root()}: {error}. "
                "Set KVCYCLE_CACHE to a folder that can be written."
            ) from error

    def config_folder(self) -> Path | None:
        """The folder of the model's config.json: model.config if it is set, else the model's own; None for a hub id.

        Raises:
            ProfileError: there is none where it should be.
        """
        if self.model.config is None:
            return self.model_folder()
        if self.model.config.startswith(_SHIPPED):
            name = self.model.config.removeprefix(_SHIPPED)
            folder = _CONFIGS / name
            if not folder.is_dir():
                known = sorted(path.name for path in _CONFIGS.iterdir() if path.is_dir())
                raise ProfileError(
                    f"model.config={self.model.config!r}: no such config is shipped{nearest(name, known)}; "
                    f"there are: {', '.join(known)}."
                )
            return folder
        folder = Path(self.model.config).expanduser()
        if not (folder / "config.json").is_file():
            raise ProfileError(f"model.config={self.model.config!r} is no folder with a config.json.")
        return folder.resolve()

    def model_config_json(self) -> dict[str, Any] | None:
        """The model's config.json, None for a hub id whose geometry is not known here.

        Raises:
            ProfileError: it cannot be read.
        """
        folder = self.config_folder()
        if folder is None:
            return None
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ProfileError(f"The model's {folder / 'config.json'} cannot be read: {error}.") from error
        if not isinstance(config, dict):
            raise ProfileError(f"The model's {folder / 'config.json'} is no JSON object.")
        return config

    def check_geometry(self, platform: Platform) -> None:
        """Refuse, in a sentence, what the engine could not run: cheap, and before anything boots.

        Raises:
            ProfileError: tp_size, dp_size, page_size or attention_backend do not fit the model or the platform.
        """
        if moved := {"tp_size", "dp_size"} & set(self.on_cpu.engine):
            raise ProfileError(
                f"on_cpu.engine.{min(moved)} cannot be set: there are as many virtual devices as engine.tp_size says."
            )
        self._check_hosts()
        engine = self.engine_args(platform)
        tp, dp, page = engine["tp_size"], engine["dp_size"], engine["page_size"]
        if tp % dp:
            raise ProfileError(
                f"engine.dp_size={dp} does not divide engine.tp_size={tp}; every rank needs as many devices."
            )
        tokens = engine["max_total_tokens"]
        if tokens is not None and tokens < page:
            raise ProfileError(f"engine.max_total_tokens={tokens} is less than one page (engine.page_size={page}).")
        # Without generation the other backends boot, and for some models the backend decides the kind of pool.
        generates = self.on(platform).cycle.generate
        if platform == "cpu" and generates and engine.get("attention_backend") != "native":
            raise ProfileError(
                f"engine.attention_backend={engine.get('attention_backend')!r} does not run on CPU; "
                "set on_cpu.engine.attention_backend='native'."
            )
        config = self.model_config_json()
        if config is None:
            return
        heads = config.get("num_attention_heads")
        if isinstance(heads, int) and heads % (tp // dp):
            fitting = ", ".join(str(n * dp) for n in range(1, heads + 1) if heads % n == 0)
            raise ProfileError(
                f"engine.tp_size={tp} does not divide the model's {heads} attention heads"
                f"{f' (tp_size/dp_size = {tp // dp})' if dp > 1 else ''}; use one of {fitting}."
            )

    def _check_hosts(self) -> None:
        engine = self.engine
        if engine.nnodes == 1:
            return
        if self.devices_needed % engine.nnodes:
            fitting = ", ".join(str(n) for n in range(1, self.devices_needed + 1) if self.devices_needed % n == 0)
            raise ProfileError(
                f"The engine's {self.devices_needed} devices (engine.tp_size) cannot be shared out evenly to "
                f"{engine.nnodes} hosts; use one of {fitting}."
            )
        if engine.node_rank >= engine.nnodes:
            raise ProfileError(
                f"engine.node_rank={engine.node_rank} is none of {engine.nnodes} hosts, which are 0 to "
                f"{engine.nnodes - 1}."
            )
        place, _, port = (engine.dist_init_addr or "").rpartition(":")
        if not place or not port.isdecimal() or not 0 < int(port) <= MAX_PORT:
            raise ProfileError(
                f"engine.dist_init_addr={engine.dist_init_addr!r} is no address at which {engine.nnodes} hosts could "
                f"meet: give host 0's, with a port of at most {MAX_PORT} (sglang-jax also takes the fifth and sixth "
                "after it), as 10.0.0.2:10011."
            )

    def check_one_host(self, what: str) -> None:
        """Refuse several hosts for what knows only one.

        Raises:
            ProfileError: the profile's engine is on several.
        """
        if self.engine.nnodes > 1:
            raise ProfileError(
                f"{what} runs on one host, and engine.nnodes is {self.engine.nnodes}; the suite runs on several "
                "(pytest -m tpu)."
            )
