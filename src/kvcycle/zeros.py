"""The compiled call that returns arrays of zeros: as plain as can be, and on a CPU so that XLA fills them fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from kvcycle.buffers import BufferSpec

Zeros = Callable[[], tuple[jax.Array, ...]]

_WORD = np.dtype(np.uint32)


def compiled_zeros(specs: Sequence[BufferSpec], *, committed: bool) -> Zeros:
    """Compile one call that returns an array of zeros for every spec, all of them committed or none."""
    if committed and jax.default_backend() == "cpu" and any(map(_by_words, specs)):
        try:
            return _filled_by_words(specs)
        except jax.errors.JaxRuntimeError:
            pass  # an XLA that does not know the option: the plain program is slower there, and right everywhere
    # Without out_shardings jit leaves its results uncommitted, as the array in the slot was.
    zeros = partial(_zeros, specs)
    jitted = jax.jit(zeros, out_shardings=_shardings(specs)) if committed else jax.jit(zeros)
    compiled: Zeros = jitted.lower().compile()
    return compiled


def _zeros(specs: Sequence[BufferSpec]) -> tuple[jax.Array, ...]:
    return tuple(map(_zero, specs))


def _zero(spec: BufferSpec) -> jax.Array:
    # Only a Python number makes a weak type, and its kind makes the dtype.
    return jax.lax.full(spec.shape, spec.dtype.type(0).item()) if spec.weak_type else jnp.zeros(spec.shape, spec.dtype)


def _filled_by_words(specs: Sequence[BufferSpec]) -> Zeros:
    """On a CPU, arrays of less than four bytes an element filled by words of four, each with a word of its own.

    XLA finds arrays of one constant equal, fills one and copies it for each other, and a copy reads what a fill does
    not; its loops over two bytes take twice as long as the copies. Of words that it is given it knows nothing, and the
    older of its two emitters fills four bytes at a time with vector stores: together two thirds of the time
    (``python -m benchmarks --only rebuild-mapped``).
    """
    words = np.zeros(len(specs), _WORD)

    def zeros(words: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(
            _filled_with(words[index], spec) if _by_words(spec) else _zero(spec) for index, spec in enumerate(specs)
        )

    lowered = jax.jit(zeros, out_shardings=_shardings(specs)).lower(words)
    compiled = lowered.compile(compiler_options={"xla_cpu_use_fusion_emitters": False})
    return partial(compiled, words)


def _filled_with(word: jax.Array, spec: BufferSpec) -> jax.Array:
    of_words = (*spec.shape[:-1], spec.shape[-1] * spec.dtype.itemsize // _WORD.itemsize)
    return jax.lax.bitcast_convert_type(jnp.broadcast_to(word, of_words), spec.dtype).reshape(spec.shape)


def _by_words(spec: BufferSpec) -> bool:
    """Whether an array's rows are whole words on every device, and its zero is the word's."""
    return (
        spec.dtype in (jnp.bfloat16, jnp.float16)
        and not spec.weak_type
        and len(spec.shape) > 0
        and spec.sharding.shard_shape(spec.shape)[-1] == spec.shape[-1]
        and spec.shape[-1] * spec.dtype.itemsize % _WORD.itemsize == 0
    )


def _shardings(specs: Sequence[BufferSpec]) -> tuple[jax.sharding.Sharding, ...]:
    return tuple(spec.sharding for spec in specs)
