"""An engine in another process, through KVCache, its state and a waiting request; prints what it saw as JSON.

A script of its own, since sglang-jax starts the scheduler's process as a new python that imports the main module again.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    from sgl_jax.srt.entrypoints.engine import Engine

    import kvcycle
    from kvcycle.errors import KVCacheStateError, UnsupportedEngineError

    engine = Engine(server_args=kvcycle.ServerArgs(**arguments))
    kv, weights = kvcycle.KVCache(engine), kvcycle.Weights(engine)
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}

    def generate() -> list[int]:
        return [int(token) for token in engine.generate(prompt="Hello", sampling_params=sampling)["output_ids"]]

    def in_use() -> dict[int, int]:
        return {use.id: use.ledger_bytes for use in kv.snapshot().devices}

    def refusal(call: Any) -> str:
        try:
            call()
        except (KVCacheStateError, UnsupportedEngineError) as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    occupation = kvcycle.enable_memory_occupation(engine)
    seen: dict[str, Any] = {
        "waiting": 0,
        "bytes_by_device": kv.bytes_by_device,
        "buffers": kv.buffers,
        "states": [kv.state],
    }
    seen["before"] = generate()
    kv.flush()
    at_rest = in_use()
    with kv.released() as freed:
        seen["states"].append(kv.state)
        seen["freed"] = {"by_device": freed.bytes_by_device, "buffers": freed.buffers, "deleted": freed.deleted_buffers}
        seen["fell"] = [at_rest[device] - now for device, now in in_use().items()]
        seen["twice"] = refusal(kv.drop)
        seen["arrays"] = refusal(lambda: kv.specs)
        released = weights.release()
        seen["weights"] = [at_rest[device] - now - freed.bytes_by_device[device] for device, now in in_use().items()]
        seen["weights_freed"] = list(released.bytes_by_device.values())
        seen["update"] = refusal(lambda: weights.resume([]))

        def resume() -> None:
            deadline = time.monotonic() + 60
            while not seen["waiting"] and time.monotonic() < deadline:
                seen["waiting"] = occupation.state().requests["waiting"]
            weights.resume()
            kv.rebuild()

        # Another thread than the one that waits for the answer: else it would wait for ever.
        resuming = threading.Thread(target=resume)
        resuming.start()
        seen["waited"] = generate()
        resuming.join()
    kv.flush()
    seen["states"].append(kv.state)
    seen["resident"] = [[use.by_owner["kv"], use.by_owner["weights"]] for use in kv.snapshot().devices]
    seen["nonzero_after_rebuild"] = bool(kv.nonzero_slots())
    engine.release_memory_occupation(tags=["kv_cache"])
    seen["tags"] = list(occupation.released)
    engine.resume_memory_occupation()
    seen["after"] = generate()
    engine.shutdown()
    return seen


if __name__ == "__main__":
    print("SEEN " + json.dumps(main(json.loads(sys.argv[1]))), flush=True)
