"""One record of what several hosts have measured: each measures its own devices, and the first puts it together.

Pure functions on a record's parts, one for each kind: given each host's part by rank they return the whole. What
belongs to a device stays with it; what belongs to a process is kept by host beside the sum; where all hosts must have
done the same, the whole has the worst of them, so that a check fails if it would on one host.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter

from kvcycle.hosts import Hosts
from kvcycle.record_info import (
    DropInfo,
    Layout,
    Params2Info,
    PhaseInfo,
    RebuildInfo,
    WeightsReleasedInfo,
    WeightsResumedInfo,
)
from kvcycle.record_parts import KV, Boot, Canary, Device, Generate, Params, Phase, Pool, SwapInfo, sum_of


def together[T](
    hosts: Hosts, kind: Any, mine: T, merge: Callable[[Sequence[T]], T], numbers: Mapping[int, int] | None = None
) -> T:
    """On the first host the whole of what every host measured; on the others what they have themselves.

    Args:
        hosts: the hosts; of one, ``mine`` is the whole.
        kind: the type of ``mine``, which travels as JSON.
        mine: what this host measured.
        merge: one of this module's functions.
        numbers: the number of every device in the record, by its id.
    """
    if not hosts.several:
        return mine
    adapter: TypeAdapter[T] = TypeAdapter(kind)
    numbered = renumbered(mine, numbers or {})
    told = hosts.gather(f"measured {getattr(kind, '__name__', kind)}", adapter.dump_json(numbered).decode())
    return merge([adapter.validate_json(part) for part in told]) if told else numbered


def renumbered(part: Any, numbers: Mapping[int, int]) -> Any:
    """The part with its devices' numbers in place of their ids: on virtual devices those of hosts are far apart."""
    if isinstance(part, tuple | list):
        return type(part)(renumbered(entry, numbers) for entry in part)
    if isinstance(part, dict):  # by device
        return {numbers.get(key, key) if isinstance(key, int) else key: value for key, value in part.items()}
    if not isinstance(part, BaseModel):
        return part
    new: dict[str, Any] = {}
    for name, value in part:
        if name in ("id", "device") and isinstance(value, int):
            new[name] = numbers.get(value, value)
        elif (name.endswith("by_device") and value is not None) or isinstance(value, BaseModel | tuple):
            new[name] = renumbered(value, numbers)
    return part.model_copy(update=new)


# What does not change -------------------------------------------------------------------------------------------------


def _united[V](maps: Iterable[Mapping[int, V]]) -> dict[int, V]:
    united: dict[int, V] = {}
    for one in maps:
        united.update(one)
    return dict(sorted(united.items()))


def devices(parts: Sequence[tuple[Device, ...]]) -> tuple[Device, ...]:
    """All devices, in the order of their numbers."""
    return tuple(sorted((device for part in parts for device in part), key=lambda device: device.id))


def kv(parts: Sequence[KV]) -> KV:
    """One cache over all devices: its buffers are the same on every host, its bytes are not."""
    first = parts[0]
    held = _united(part.bytes_by_device for part in parts)
    # The first host's prediction is the run's: the others do not ask the compiler.
    predicted = first.predicted_bytes_by_device
    claimed = [part.claimed_bytes for part in parts]
    return first.model_copy(
        update={
            "bytes": sum(part.bytes for part in parts),
            "bytes_by_device": held,
            "predicted_bytes_by_device": dict.fromkeys(held, max(predicted.values())) if predicted else None,
            "claimed_bytes": None if None in claimed else sum(known or 0 for known in claimed),
            "pools": tuple(
                Pool(type=pool.type, buffers=pool.buffers, bytes=sum(part.pools[index].bytes for part in parts))
                for index, pool in enumerate(first.pools)
            ),
        }
    )


def params(parts: Sequence[Params]) -> Params:
    """One set of weights over all devices."""
    return Params(
        arrays=parts[0].arrays,
        bytes_on_devices=sum(part.bytes_on_devices for part in parts),
        bytes_by_device=_united(part.bytes_by_device for part in parts),
    )


def boot(parts: Sequence[Boot]) -> Boot:
    """As long as the slowest host's."""
    by_host = tuple(part.compiles for part in parts)
    return Boot(
        seconds=max(part.seconds for part in parts),
        before=tuple(use for part in parts for use in part.before),
        after=tuple(use for part in parts for use in part.after),
        compiles=sum_of(by_host),
        compiles_by_host=by_host,
    )


def canaries(parts: Sequence[tuple[Canary, ...]]) -> tuple[Canary, ...]:
    """Every host's."""
    return tuple(
        canary.model_copy(update={"host": host}) for host, part in enumerate(parts) for canary in part
    )  # fmt: skip


# What a cycle measures ------------------------------------------------------------------------------------------------


def phase(parts: Sequence[Phase]) -> Phase:
    """All devices' use; what each host's compiler did and its process holds; what was done on all of them."""
    by_host = tuple(part.compiles for part in parts)
    rss = tuple(part.rss_bytes for part in parts)
    infos = [part.info for part in parts]
    spoken = any(size is not None for size in rss)
    return Phase(
        name=parts[0].name,
        t_s=parts[0].t_s,
        seconds=max(part.seconds for part in parts),
        rss_bytes=sum(size or 0 for size in rss) if None not in rss else None,
        rss_bytes_by_host=rss if spoken else (),
        devices=tuple(use for part in parts for use in part.devices),
        ledger_bytes_sum=sum(part.ledger_bytes_sum for part in parts),
        compiles=sum_of(by_host),
        compiles_by_host=by_host,
        info=None if None in infos else info([one for one in infos if one is not None]),
    )


def generate(parts: Sequence[Generate]) -> Generate:
    """The first host's answer, which the others were told, and what every host's compiler did meanwhile."""
    by_host = tuple(part.compiles for part in parts)
    return parts[0].model_copy(update={"compiles": sum_of(by_host), "compiles_by_host": by_host})


def residue(parts: Sequence[dict[int, int]]) -> dict[int, int]:
    """Bytes by device, of all devices."""
    return _united(parts)


def swap(parts: Sequence[SwapInfo]) -> SwapInfo:
    """Shared and restored is what every host shares and has restored."""
    return SwapInfo(
        leaves=parts[0].leaves,
        runner_shared=min(part.runner_shared for part in parts),
        model_shared=min(part.model_shared for part in parts),
        model_params=parts[0].model_params,
        restored=min(part.restored for part in parts),
    )


def info(parts: Sequence[PhaseInfo]) -> PhaseInfo | None:
    """What was done in a phase; None where the hosts did not do the same kind of thing."""
    kinds = {type(part) for part in parts}
    return _INFOS[kinds.pop()](parts) if len(kinds) == 1 else None


def _drop(parts: Sequence[DropInfo]) -> DropInfo:
    return DropInfo(
        buffers=max((part.buffers for part in parts), key=lambda found: abs(found - parts[0].buffers)),
        deleted_buffers=min(part.deleted_buffers for part in parts),
        missing_delete_method=max(part.missing_delete_method for part in parts),
        bytes_by_device=_united(part.bytes_by_device for part in parts),
    )


def _params2(parts: Sequence[Params2Info]) -> Params2Info:
    errors = [f"host {host}: {part.error}" for host, part in enumerate(parts) if part.error is not None]
    return Params2Info(
        arrays=min(part.arrays for part in parts),
        requested_bytes_by_device=_united(part.requested_bytes_by_device for part in parts),
        # 0 where a host has no second set: then there is nothing to look at
        buffers=sum(part.buffers for part in parts) if all(part.buffers for part in parts) else 0,
        buffers_shared_with_engine=sum(part.buffers_shared_with_engine for part in parts),
        error="; ".join(errors) or None,
    )


def _rebuild(parts: Sequence[RebuildInfo]) -> RebuildInfo:
    before, after = dict(parts[0].layouts_before), dict(parts[0].layouts_after)
    moved, nonzero = list(parts[0].moved_owners), list(parts[0].nonzero_slots)
    for host, part in enumerate(parts[1:], start=1):
        _add_unlike(before, part.layouts_before, parts[0].layouts_before, host)
        _add_unlike(after, part.layouts_after, parts[0].layouts_after, host)
        for path in [path for path in before if path.endswith(_on(host))]:  # both, so that they are compared
            plain = path.removesuffix(_on(host))
            if plain in part.layouts_after:
                after[path] = part.layouts_after[plain]
        for path in [path for path in after if path.endswith(_on(host))]:
            plain = path.removesuffix(_on(host))
            if plain in part.layouts_before:
                before[path] = part.layouts_before[plain]
        moved += [path + _on(host) for path in part.moved_owners]
        nonzero += [path + _on(host) for path in part.nonzero_slots if path not in parts[0].nonzero_slots]
    return RebuildInfo(
        layouts_before=before, layouts_after=after, moved_owners=tuple(moved), nonzero_slots=tuple(nonzero)
    )


def _on(host: int) -> str:
    return f" (host {host})"


def _add_unlike(whole: dict[str, Layout], theirs: Mapping[str, Layout], first: Mapping[str, Layout], host: int) -> None:
    """Every host has the same slots: one that differs from the first host's stands beside it, with the host's name."""
    whole.update({path + _on(host): layout for path, layout in theirs.items() if first.get(path) != layout})


def _released(parts: Sequence[WeightsReleasedInfo]) -> WeightsReleasedInfo:
    return WeightsReleasedInfo(
        arrays=parts[0].arrays,
        deleted_arrays=min(part.deleted_arrays for part in parts),
        host_bytes=sum(part.host_bytes for part in parts),
        digests=_digests([part.digests for part in parts]),
    )


def _resumed(parts: Sequence[WeightsResumedInfo]) -> WeightsResumedInfo:
    return WeightsResumedInfo(
        digests=_digests([part.digests for part in parts]),
        model_params=parts[0].model_params,
        model_shared=min(part.model_shared for part in parts),
    )


def _digests(parts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """A digest of every array over its digests on all hosts, of which each is over that host's shards."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    return {
        name: hashlib.blake2b(" ".join(part.get(name, "none") for part in parts).encode(), digest_size=16).hexdigest()
        for name in names
    }


_INFOS: dict[type[Any], Callable[[Any], PhaseInfo]] = {
    DropInfo: _drop,
    Params2Info: _params2,
    RebuildInfo: _rebuild,
    WeightsReleasedInfo: _released,
    WeightsResumedInfo: _resumed,
}
