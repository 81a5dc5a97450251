"""examples/rl_loop.py as a user runs it: the bytes of every step, and an output that follows the weights."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from itertools import pairwise

KV_BYTES = 33_556_480
WEIGHTS = 5_526_528

#: What each step changes on every device, from rollout to rollout.
STEPS = {
    "KV cache released": -KV_BYTES,
    "trainer's copy": +WEIGHTS,
    "weights released": -WEIGHTS,
    "trained": 0,
    "weights updated, resumed": 0,
    "KV cache resumed": +KV_BYTES,
}


def test_the_loop_gives_back_every_byte_and_the_rollout_follows_the_weights(
    guarded: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = guarded("examples/rl_loop.py")
    assert done.returncode == 0, done.stdout
    rows = re.findall(r"^ *([\w' ,]+?) {2,}([\d, ]+)$", done.stdout, re.MULTILINE)
    table = [(step, [int(size.replace(",", "")) for size in sizes.split()]) for step, sizes in rows]
    assert [step for step, _ in table] == ["rollout 0", *STEPS, "rollout 1", *STEPS, "rollout 2", "everything released"]
    for (_, before), (step, after) in pairwise(table):
        if step in STEPS:
            assert [b - a for a, b in zip(before, after, strict=True)] == [STEPS[step]] * 4, step
    assert max(table[-1][1]) < 16_384
    assert re.search(r"^what stays, summed over the devices: \w+\[[\d, ]+\] [\d,]+ B, ", done.stdout, re.MULTILINE)
    lines = [line for line in done.stdout.splitlines() if re.match(r"(bytes in use|(  )?[\w' ,]+ {2,}[\d,]+ )", line)]
    assert len({len(line) for line in lines}) == 1, lines  # the columns line up

    compiled = [int(count) for count in re.findall(r"^rollout \d: (\d+) compilations", done.stdout, re.MULTILINE)]
    tokens = re.findall(r"tokens (\[.*\])", done.stdout)
    assert compiled[0] > 0
    assert compiled[1:] == [0, 0]
    assert len(set(tokens)) == 3
