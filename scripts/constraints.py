"""Resolve a stack and write its constraints file: constraints.py STACK, for example sglang-jax-0.1.0rc0.

pip resolves kvcycle with every extra, in an empty environment of each supported Python, and installs nothing. A package
that the two resolutions disagree on gets one line for each Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.12", "3.13")
FAMILY = "sglang-jax-"

HEADER = """\
# The exact versions of all that kvcycle needs with {stack}, on Python {pythons}: what its runs
# are made with and compared by. `make` installs by this file (pip install --constraint).
# It was resolved, and is resolved anew, by: make constraints STACK={stack}
"""


def resolve(python: str, requirements: list[str]) -> dict[str, str]:
    """The versions that pip would install, by normalized name."""
    anywhere = {name: value for name, value in os.environ.items() if name != "PYTHON"}  # one PYTHON cannot be both
    interpreter = subprocess.run(
        [ROOT / "scripts/find-python.sh", python], check=True, stdout=subprocess.PIPE, text=True, env=anywhere
    ).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="kvcycle-constraints-") as folder:
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        report = Path(folder, "report.json")
        pip = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check", "-qq", "install"]
        subprocess.run(
            [*pip, "--dry-run", "--ignore-installed", "--report", report, *requirements], check=True, cwd=ROOT
        )
        items = json.loads(report.read_text())["install"]
    versions = {normalize(item["metadata"]["name"]): item["metadata"]["version"] for item in items}
    del versions["kvcycle"]
    return versions


def normalize(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def merge(resolved: dict[str, dict[str, str]]) -> list[str]:
    """One sorted line per package where the Pythons agree, one per Python where they do not."""
    lines = []
    for name in sorted({name for versions in resolved.values() for name in versions}):
        pins = {python: versions[name] for python, versions in resolved.items() if name in versions}
        if len(set(pins.values())) == 1:
            lines.append(f"{name}=={next(iter(pins.values()))}")
        else:
            lines += [f'{name}=={version} ; python_version == "{python}"' for python, version in pins.items()]
    return lines


def main(stack: str) -> None:
    version = stack.removeprefix(FAMILY)
    if version in ("", stack):
        sys.exit(f"A stack is named {FAMILY}VERSION, for example {FAMILY}0.1.0rc0, and not {stack!r}.")
    # The engine's own extras choose the JAX that this version of it was made for, and with it libtpu.
    requirements = [".[dev,plan,tpu]", f"sglang-jax[cpu,tpu]=={version}"]
    resolved = {}
    for python in PYTHONS:
        print(f"Resolving {stack} on Python {python}: a few minutes, since pip reads many archives ...", flush=True)
        try:
            resolved[python] = resolve(python, requirements)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{stack} could not be resolved on Python {python} ({Path(error.cmd[0]).name} failed; see above).")
    lines = merge(resolved)
    target = ROOT / "constraints" / f"{stack}.txt"
    target.write_text(HEADER.format(stack=stack, pythons=" and ".join(PYTHONS)) + "\n".join(lines) + "\n")
    print(f"{target.relative_to(ROOT)}: {len(lines)} lines.")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("constraints.py needs the name of a stack.")
    main(sys.argv[1])
