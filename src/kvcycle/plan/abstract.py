"""The engine's own worker, built from abstract arrays: real model, real shardings, real pools, and not a byte of them.

sglang-jax's ``ModelWorker`` is constructed as the scheduler constructs it, on a mesh of TPU devices that exist only as
a description. Four places where it would allocate are replaced, so that they return shape, dtype and sharding instead:

- ``weight_utils.jax.jit(..., out_shardings=…)()`` in the loader's dummy mode, which gives every parameter the sharding
  it gets when loaded (biases are replicated; ``eval_shape`` of the model alone would split them, and be too small);
- the pools' ``_get_kv_zero_allocator`` and ``_get_recurrent_zero_allocator``;
- ``jax_utils.device_array``, which puts a batch on the devices;
- ``model_runner.jax.device_put`` of the placeholders in a quantized model's state.

This is private API, seen on sglang-jax 0.1.0rc0. The replacements last as long as the process, which only plans.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvcycle.plan.compiler import first_line
from kvcycle.plan.model import PlanError
from kvcycle.profile import Profile

#: More than any device has: max_total_tokens, and not the machine's memory, shall decide the pools' size.
_BOUNDLESS_BYTES = 2**60


#: What the stack raises when it does not support something.
REFUSALS = (
    NotImplementedError,
    ValueError,
    AssertionError,
    TypeError,
    AttributeError,
    KeyError,
    ImportError,
    jax.errors.JaxRuntimeError,
)


class Abstract(jax.ShapeDtypeStruct):
    """A parameter as it is once loaded; a class of its own tells it from the stack's placeholders, which are not."""


class _OtherThanLoaded(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, jax.ShapeDtypeStruct) and not isinstance(instance, Abstract)


class _Placeholder(metaclass=_OtherThanLoaded):
    """What the runner means by ShapeDtypeStruct: a slot that was never filled."""


class _JaxWith:
    """The module jax with some functions replaced, to be put in the place of a module's global ``jax``."""

    def __init__(self, **replaced: Any) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)


def _abstract(shape: Any, dtype: Any, sharding: Any) -> Abstract:
    made: Abstract = Abstract(tuple(shape), jnp.dtype(dtype), sharding=sharding)  # type: ignore[no-untyped-call]
    return made


def _abstract_allocator(shape: Any, dtype: Any, sharding: Any) -> Callable[[], Abstract]:
    return lambda: _abstract(shape, dtype, sharding)


def _abstract_jit(function: Callable[[], Any], *, out_shardings: Any) -> Callable[[], Abstract]:
    made = jax.eval_shape(function)
    return _abstract_allocator(made.shape, made.dtype, out_shardings)


def _abstract_put(value: Any, sharding: Any = None, **_: Any) -> Any:
    def one(array: Any) -> Abstract:
        concrete = np.asarray(array)
        return _abstract(concrete.shape, concrete.dtype, sharding)

    return jax.tree.map(one, value)


@contextlib.contextmanager
def seen_as_tpu(devices: list[jax.Device]) -> Iterator[None]:
    """Let ``jax.devices()`` and its like answer as on the TPU: the stack chooses its kernels by them."""
    names = ("devices", "local_devices", "default_backend")
    real = {name: getattr(jax, name) for name in names}
    setattr(jax, "devices", lambda *_, **__: devices)  # noqa: B010 - mypy would not let a function be assigned
    setattr(jax, "local_devices", lambda *_, **__: devices)  # noqa: B010
    setattr(jax, "default_backend", lambda: "tpu")  # noqa: B010
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(jax, name, function)


class AbstractEngine:
    """One profile's model worker on a mesh of described devices.

    Attributes:
        worker: sglang-jax's ModelWorker.
        runner: its ModelRunner.
        params: one abstract array for each weight, as the runner holds them.
        devices: the devices of the mesh, by id.
    """

    def __init__(self, profile: Profile, folder: Path, devices: list[jax.Device]) -> None:
        """Build it.

        Args:
            profile: ``engine.max_total_tokens`` must be set.
            folder: with the model's config.json; weights are not looked at.
            devices: the topology's.

        Raises:
            PlanError: the stack refuses the profile or the model, with its words.
        """
        self._all_devices = devices
        self.profile = profile
        try:
            self._build(profile, folder)
        except REFUSALS as error:
            raise PlanError(_refused(profile, folder, error)) from error
        self.params: list[Any] = list(self.runner.model_state_leaves)

    def _build(self, profile: Profile, folder: Path) -> None:
        from sgl_jax.srt.utils import jax_utils

        _replace(jax_utils, "device_array", _abstract_put)  # before the modules that import it by name

        from sgl_jax.srt.managers import tp_worker
        from sgl_jax.srt.mem_cache import memory_pool
        from sgl_jax.srt.model_executor import model_runner
        from sgl_jax.srt.server_args import ServerArgs
        from sgl_jax.srt.utils import weight_utils
        from sgl_jax.srt.utils.mesh_utils import create_device_mesh

        _replace(weight_utils, "jax", _JaxWith(jit=_abstract_jit))
        _replace(model_runner, "jax", _JaxWith(ShapeDtypeStruct=_Placeholder, device_put=_abstract_put))
        _replace(memory_pool, "_get_kv_zero_allocator", _abstract_allocator)
        with contextlib.suppress(ImportError):  # there since hybrid models are
            from sgl_jax.srt.mem_cache import recurrent_state_pool

            _replace(recurrent_state_pool, "_get_recurrent_zero_allocator", _abstract_allocator)

        class Runner(model_runner.ModelRunner):  # type: ignore[misc]
            free_bytes = _BOUNDLESS_BYTES

            def get_available_device_memory(self) -> int:
                return self.free_bytes

        tp_worker.ModelRunner = Runner
        _check_architecture(folder)
        arguments = profile.engine_args("tpu") | {"model_path": str(folder), "load_format": "dummy"}
        with _environment(JAX_PLATFORMS="tpu"):  # ServerArgs compares it with the device
            self.server_args = ServerArgs(**arguments)
        with seen_as_tpu(self._all_devices):
            self.mesh = create_device_mesh(
                ici_parallelism=[self.server_args.dp_size, self.server_args.tp_size // self.server_args.dp_size],
                dcn_parallelism=[1, 1],
                device_indexes=self.server_args.device_indexes,
            )
            self.worker = tp_worker.ModelWorker(self.server_args, self.mesh)
        self.devices: list[jax.Device] = sorted(self.mesh.devices.flat, key=lambda device: device.id)
        self.runner = self.worker.model_runner

    @property
    def kv(self) -> list[Any]:
        """One abstract array for each KV (or state) buffer, in the pools' order."""
        return list(jax.tree.leaves(self.runner.memory_pools))

    @property
    def pools(self) -> dict[str, Any]:
        """The pools that hold them, by the engine's name."""
        return dict(self.runner.memory_pools._pools)

    def pool_buffers(self) -> list[tuple[Any, list[Any]]]:
        """Each pool and its buffers."""
        return [(pool, list(jax.tree.leaves(pool))) for pool in self.pools.values()]

    @property
    def claimed_kv_bytes(self) -> int | None:
        """What the engine itself says its KV cache takes, summed over devices; None if a pool does not say."""
        sizes = [getattr(pool, "get_kv_size_bytes", None) for pool in self.pools.values()]
        try:
            return int(sum(np.sum(size()) for size in sizes if size is not None)) if all(sizes) else None
        except (NotImplementedError, TypeError):
            return None

    def resize(self, tokens: int) -> None:
        """Make the pools anew for another ``max_total_tokens``, as the runner made them."""
        with seen_as_tpu(self._all_devices):
            self.runner.init_memory_pool(
                self.server_args.max_running_requests, tokens, _BOUNDLESS_BYTES, dp_size=self.server_args.dp_size
            )

    def token_cap(self, capacity_bytes: int, params_bytes: int) -> int | None:
        """What the engine lowers max_total_tokens to on a device of that capacity; None for hybrid models."""
        if self.runner.linear_recurrent_config is not None:
            return None  # the split between state and KV would change the server's arguments
        page = int(self.server_args.page_size)
        self.runner.free_bytes = capacity_bytes - params_bytes
        try:
            return int(self.runner.profile_max_num_token(capacity_bytes)) // page * page
        except RuntimeError:  # not enough memory for anything
            return 0
        finally:
            self.runner.free_bytes = _BOUNDLESS_BYTES

    def model_function(self) -> tuple[Any, tuple[Any, ...]]:
        """The jitted function that runs the model, and its arguments up to the batch."""
        inner = inspect.getclosurevars(self.runner.jitted_run_model).nonlocals
        function = inner["jitted_run_model"]
        return function, (inner["model_def"], inner["model_state_def"], self.params)


def _replace(module: Any, name: str, value: Any) -> None:
    """Put ``value`` in a module's place ``name``.

    Raises:
        PlanError: the place is not there: this sglang-jax allocates in another way, and really would.
    """
    if not hasattr(module, name):
        from kvcycle.engine import stack

        raise PlanError(
            f"This version of kvcycle cannot plan with sglang-jax {stack().sglang_jax}: {module.__name__} has no "
            f"{name}. It is known to plan with sglang-jax 0.1.0rc0."
        )
    setattr(module, name, value)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _check_architecture(folder: Path) -> None:
    """Refuse a model that sglang-jax has no code for, before transformers is asked for it.

    Raises:
        PlanError: with the architectures that it has code for.
    """
    from sgl_jax.srt.models.registry import ModelRegistry

    from kvcycle.engine import stack

    version = stack().sglang_jax
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    wanted = list(config.get("architectures") or [])
    known = sorted(ModelRegistry.get_supported_archs())
    if not any(name in known for name in wanted):
        raise PlanError(
            f"sglang-jax {version} has no code for the architecture {', '.join(wanted) or '(none is named)'} "
            f"of {folder.name}/config.json; it has it for {', '.join(known)}."
        )


def _refused(profile: Profile, folder: Path, error: Exception) -> str:
    from kvcycle.engine import stack

    return (
        f"sglang-jax {stack().sglang_jax} refuses the profile {profile.name!r} with the model of {folder.name!r}: "
        f"{first_line(error)} ({type(error).__name__}). "
        "Change the engine.* keys or the model's config.json accordingly."
    )
