"""What versions of sglang-jax lack: the table says of the installed one what its source says."""

from __future__ import annotations

import ast
import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from kvcycle import versions
from kvcycle.versions import NEWEST, OLDER, PARTS, TESTED_STACKS, Part


def spec_of(module: str) -> ModuleSpec | None:
    """Where the module is installed; it is not imported, which would start jax."""
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:  # not even the package that it would be in
        return None


def arguments_of(owner: ast.ClassDef) -> set[str]:
    """What a class can be made with: its ``__init__``'s arguments, and the fields that a dataclass has instead."""
    names = set()
    for node in owner.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
            names |= {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    return names


def is_installed(part: Part) -> bool:
    """Whether the installed sglang-jax has the part. The class itself must be there, or nothing is known of it."""
    spec = spec_of(part.module)
    if spec is None or not part.owner:
        return spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (owner,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == part.owner]
    return part.argument in arguments_of(owner)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.text)
def test_the_installed_version_has_what_the_table_says_and_lacks_what_it_says(part: Part) -> None:
    assert is_installed(part) is versions.has(part, versions.installed())


@pytest.mark.parametrize(
    ("part", "there"),
    [
        (Part("sgl_jax.srt.mem_cache.memory_pool", "MLATokenToKVPool", "kv_lora_rank"), True),
        (Part("sgl_jax.srt.mem_cache.memory_pool", "MLATokenToKVPool", "no_such_argument"), False),
        (Part("sgl_jax.srt.server_args", "ServerArgs", "page_size"), True),
        (Part("sgl_jax.srt.server_args", "ServerArgs", "no_such_argument"), False),
        (Part("sgl_jax.srt.speculative.eagle_util"), True),
        (Part("sgl_jax.srt.speculative.no_such_module"), False),
        (Part("sgl_jax.no_such_package.no_such_module"), False),
    ],
    ids=lambda value: value.text if isinstance(value, Part) else None,
)
def test_the_look_at_the_source_tells_what_is_there_from_what_is_not(part: Part, there: bool) -> None:
    assert is_installed(part) is there


def test_every_part_is_lacking_somewhere_and_there_in_the_newest() -> None:
    for part in PARTS:
        assert part.absent_from
        assert set(part.absent_from) <= set(OLDER)
        assert versions.has(part, NEWEST)
    assert {NEWEST, *OLDER} == set(TESTED_STACKS)


def test_a_part_is_named_as_python_writes_it() -> None:
    assert [part.text for part in PARTS] == [
        "`MLATokenToKVPool(indexer_key_dim=…)`", "`speculative.relay_buffer`", "`ServerArgs(hicache_storage=…)`",
        "`disaggregation`",
    ]  # fmt: skip
