"""Profiles as TOML files: where they are looked up, the overrides of a command line, and a sentence for every mistake.

Unknown keys are named with the nearest known one, before anything expensive starts.
"""

from __future__ import annotations

import ast
import importlib.util
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvcycle.errors import ProfileError
from kvcycle.profile import Profile
from kvcycle.text import nearest

#: Engine arguments that kvcycle decides itself: the cycle needs the engine in this process.
_RESERVED_ENGINE_KEYS = {
    "model_path": "set model.path instead",
    "device": "the platform decides it (--kv-platform)",
    "enable_single_process": "the cycle needs the engine in its own process",
}


def profile_folders() -> list[Path]:
    """Where profiles are looked up by name: the source tree's ``profiles/``, else those shipped in the package."""
    here = Path(__file__).resolve().parent
    return [folder for folder in (here.parents[1] / "profiles", here / "_profiles") if folder.is_dir()]


def profile_names() -> list[str]:
    """The names of all profiles that come with kvcycle."""
    return sorted({path.stem for folder in profile_folders() for path in folder.glob("*.toml")})


def load_profile(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Profile:
    """Load a profile by name or path, with overrides by dotted key.

    Example:
        ``load_profile("tiny", {"engine.page_size": 16})``

    Raises:
        ProfileError: no such profile, a broken file, an unknown key, or a value of the wrong kind.
    """
    path = _find(str(name_or_path))
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"The profile {path} cannot be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"The profile {path} is not valid TOML: {error}.") from error
    for key, value in (overrides or {}).items():
        _set(raw, key, value)
    try:
        profile = Profile.model_validate(raw)
    except ValidationError as error:
        raise ProfileError(_sentence(error, str(name_or_path))) from error
    try:
        profile.engine_args("cpu")
    except ValidationError as error:
        raise ProfileError(_sentence(error, str(name_or_path), "on_cpu", "engine")) from error
    for table, arguments in (("engine", raw.get("engine", {})), ("on_cpu.engine", profile.on_cpu.engine)):
        _check_engine_keys(table, arguments)
    return profile


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Turn ``KEY=VALUE`` texts into overrides; a value is read as TOML, and as plain text where it is none.

    Raises:
        ProfileError: an assignment without ``=``, or without a key.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ProfileError(f"{assignment!r} is not KEY=VALUE, for example engine.page_size=16.")
        try:
            overrides[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            overrides[key.strip()] = text
    return overrides


def _find(name: str) -> Path:
    if name.endswith(".toml") or "/" in name:
        if not Path(name).is_file():
            raise ProfileError(f"There is no profile file {name!r}.")
        return Path(name)
    for folder in profile_folders():
        if (path := folder / f"{name}.toml").is_file():
            return path
    known = profile_names()
    raise ProfileError(f"There is no profile {name!r}{nearest(name, known)}; there are: {', '.join(known)}.")


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    here = raw
    for table in tables:
        here = here.setdefault(table, {})
        if not isinstance(here, dict):
            raise ProfileError(f"{key} cannot be set: {table} is a value, not a table.")
    here[last] = value


def _sentence(error: ValidationError, source: str, *tables: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in (*tables, *first["loc"]))
    if first["type"] == "extra_forbidden":
        table: Any = Profile
        for part in first["loc"][:-1]:
            table = table.model_fields[part].annotation
        return f"Profile {source!r} has no key {key!r}{nearest(str(first['loc'][-1]), table.model_fields)}."
    if first["type"] == "missing":
        return f"Profile {source!r} lacks the key {key!r}."
    return f"Profile {source!r}: {key}={first['input']!r} will not do: {first['msg']}."


def _check_engine_keys(table: str, arguments: Mapping[str, Any]) -> None:
    known = server_args_fields()
    for key in arguments:
        if key in _RESERVED_ENGINE_KEYS:
            raise ProfileError(f"{table}.{key} cannot be set: {_RESERVED_ENGINE_KEYS[key]}.")
        if known and key not in known:
            raise ProfileError(f"{table}.{key} is no argument of the installed sglang-jax{nearest(key, known)}.")


@cache
def server_args_fields() -> frozenset[str]:
    """The field names of the installed sglang-jax's ServerArgs, read from its source: importing it would import jax.

    Empty where sglang-jax is not installed; then engine keys go unchecked until the boot.
    """
    try:
        spec = importlib.util.find_spec("sgl_jax.srt.server_args")
    except ModuleNotFoundError:
        return frozenset()
    if spec is None or spec.origin is None:
        return frozenset()
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return frozenset(
        statement.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "ServerArgs"
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    )
