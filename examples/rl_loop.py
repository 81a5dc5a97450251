"""An RL loop on one set of devices: rollout, release, train, update the weights, resume, roll out again.

    python examples/rl_loop.py        # the tiny profile on virtual CPU devices, in about a minute

The engine lends its KV cache to a copy of the weights for training, then its own weights to the training step, and
takes the trained ones. The two calls are sglang's; kvcycle makes them work. The train step is plain jax.
"""

from __future__ import annotations

import gc
from typing import Any

import kvcycle
from kvcycle.compiles import counting

ROUNDS = 2
LEARNING_RATE = 0.03


def rollout(engine: Any, kv: kvcycle.KVCache) -> tuple[list[int], int]:
    """The tokens of a greedy generation, and how often XLA compiled for it."""
    with counting() as span:
        answer = engine.generate(
            prompt="Hello", sampling_params={"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
        )
    kv.flush()  # also lets the pipeline drain: what is counted next is what stays
    return list(answer["output_ids"]), span.compiles.any_work


def train(params: kvcycle.ParamSet, reward: float) -> tuple[kvcycle.ParamSet, float]:
    """One step of gradient descent on all parameters, in place; any loss of yours goes here."""
    import jax
    import jax.numpy as jnp

    def loss_of(leaves: list[jax.Array]) -> jax.Array:
        wide = [leaf.astype(jnp.float32) for leaf in leaves]
        pulls = [jnp.sum((leaf - jnp.abs(jax.lax.stop_gradient(leaf))) ** 2) for leaf in wide]
        return reward * sum(pulls, jnp.float32(0)) / 2

    def step(leaves: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(leaves)
        return [leaf - LEARNING_RATE * gradient for leaf, gradient in zip(leaves, gradients, strict=True)], loss

    # The engine takes the trained parameters as they are, so they keep the shardings that it compiled for.
    shardings = [leaf.sharding for leaf in params.leaves]
    trained, loss = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))(list(params.leaves))
    return kvcycle.ParamSet(tuple(jax.block_until_ready(trained))), float(loss)


def show(step: str) -> None:
    """One line of the table: the bytes of all live arrays, device by device."""
    gc.collect()
    print(f"{step:<28}" + "".join(f"{use.ledger_bytes:>14,}" for use in kvcycle.snapshot().devices), flush=True)


def main() -> None:
    """Run the loop and print the bytes on each device after every step."""
    profile = kvcycle.load_profile("tiny")
    with kvcycle.boot(profile, "cpu") as engine:
        kv = kvcycle.KVCache(engine)
        kvcycle.enable_memory_occupation(engine, weights="discard")  # training has new ones
        print(f"{'bytes in use':<28}" + "".join(f"{f'device {n}':>14}" for n in range(profile.devices_needed)))
        tokens, compiled = rollout(engine, kv)
        show("rollout 0")
        told = [f"rollout 0: {compiled} compilations, tokens {tokens}"]
        for number in range(1, ROUNDS + 1):
            engine.release_memory_occupation(tags=["kv_cache"])
            show("  KV cache released")
            params = kvcycle.ParamSet.clone(engine)
            show("  trainer's copy")
            engine.release_memory_occupation(tags=["weights"])
            show("  weights released")
            params, loss = train(params, reward=len(set(tokens)) / len(tokens))
            show("  trained")
            engine.resume_memory_occupation(tags=["weights"], update=params)
            show("  weights updated, resumed")
            engine.resume_memory_occupation(tags=["kv_cache"])
            show("  KV cache resumed")
            tokens, compiled = rollout(engine, kv)
            show(f"rollout {number}")
            told.append(f"rollout {number}: {compiled} compilations, loss before it {loss:.6g}, tokens {tokens}")
        left = engine.release_memory_occupation()  # whatever is resident
        show("everything released")
        print(*told, sep="\n")
        named = ", ".join(f"{what} {size:,} B" for what, size in left.remaining)
        print(f"what stays, summed over the devices: {named}")


if __name__ == "__main__":
    main()
