"""Zeros that are filled by words are the zeros that were asked for, in the places that were asked for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kvcycle import zeros
from kvcycle.buffers import BufferSpec
from kvcycle.zeros import compiled_zeros

#: Shape, dtype, spec, and whether its rows are words on every device.
CASES: list[tuple[tuple[int, ...], Any, PartitionSpec, bool]] = [
    ((9, 1, 4, 2, 128), jnp.bfloat16, PartitionSpec("data", None, "tensor", None, None), True),
    ((8, 4, 6), jnp.float16, PartitionSpec(None, "tensor"), True),
    ((8, 6), jnp.bfloat16, PartitionSpec(), True),
    ((0, 6), jnp.bfloat16, PartitionSpec(), True),
    ((8, 3), jnp.bfloat16, PartitionSpec(), False),
    ((4, 8), jnp.bfloat16, PartitionSpec(None, "tensor"), False),
    ((), jnp.bfloat16, PartitionSpec(), False),
    ((8, 4), jnp.float32, PartitionSpec("tensor"), False),
    ((8, 4), jnp.int8, PartitionSpec("tensor"), False),
]


def specs(kind: AxisType) -> list[BufferSpec]:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 4), ("data", "tensor"), axis_types=(kind, kind))
    return [
        BufferSpec(shape, np.dtype(dtype), NamedSharding(mesh, spec), committed=True, weak_type=False)
        for shape, dtype, spec, _ in CASES
    ]


def test_what_is_filled_by_words_has_rows_of_words() -> None:
    assert [zeros._by_words(spec) for spec in specs(AxisType.Auto)] == [case[-1] for case in CASES]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("option_known", [True, False])
def test_zeros_are_zero_and_where_they_belong(
    kind: AxisType, option_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    filled = zeros._filled_by_words

    def fill(wanted: list[BufferSpec]) -> zeros.Zeros:
        tried.append(len(wanted))
        if not option_known:
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option")
        return filled(wanted)

    monkeypatch.setattr(zeros, "_filled_by_words", fill)
    wanted = specs(kind)
    allocate = compiled_zeros(wanted, committed=True)
    assert tried == [len(CASES)]
    arrays = [*allocate(), *allocate()]
    assert [BufferSpec.of(array) for array in arrays] == wanted * 2
    assert not any(np.asarray(array).any() for array in arrays)
    places = [s.data.unsafe_buffer_pointer() for array in arrays if array.size for s in array.addressable_shards]
    assert len(set(places)) == len(places)


def test_a_word_reaches_every_element_and_nothing_is_beside_it() -> None:
    (spec, *_) = specs(AxisType.Auto)
    program = jax.jit(lambda word: zeros._filled_with(word, spec), out_shardings=spec.sharding)
    assert (np.asarray(program(np.uint32(0x3F803F80))) == 1).all()  # bfloat16's 1.0 twice
    compiled = program.lower(np.uint32(0)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes == 0
    assert memory.output_size_in_bytes == np.prod(spec.shape) * 2 // 4
