"""A TPU VM that is a local folder, a gcloud that reaches it, and a small repository to bring there."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcycle.vm.remote import BASE

ROOT = Path(__file__).parents[3]
GCLOUD = Path(__file__).with_name("gcloud.py")
NAME, ZONE, PROJECT, USER = "my-tpu", "us-central2-b", "my-project", "tester"
STACK = "sglang-jax-0.1.0rc0"

#: A suite in one file: it leaves reports, says what it was given, and ends as it is told to.
CONFTEST = """
import json, os, sys
from pathlib import Path
import pytest

def pytest_addoption(parser):
    parser.addoption("--kv-profile"); parser.addoption("--kv-report-dir"); parser.addoption("--kv-set", action="append")
    parser.addoption("--require-tpu", action="store_true")

def pytest_configure(config):
    config.addinivalue_line("markers", "tpu: the suite")
    folder = Path(config.rootpath, config.getoption("--kv-report-dir"), "2026-01-01T00-00-00Z")
    folder.mkdir(parents=True)
    (folder.parent / "latest").symlink_to(folder.name)
    config.option.xmlpath = str(folder / "junit.xml")
    kept = {name: os.environ.get(name) for name in ("KVCYCLE_RANK", "KVCYCLE_HOSTS", "KVCYCLE_COORDINATOR")}
    kept |= {"argv": sys.argv[1:], "token_length": len(os.environ.get("HF_TOKEN", ""))}
    (folder / "record.json").write_text(json.dumps(kept))
"""
TESTS = """
import os, sys, time
from pathlib import Path
import pytest

GO = Path(os.environ["HOME"], "go")  # a run that waits goes on when this is there

@pytest.mark.tpu
def test_of_the_suite(request, capfd):
    with capfd.disabled():
        for line in range(400):
            print(f"line {line:4} of the log, with bytes that are no ASCII: \\u00d7 \\u2026", flush=True)
        print("\\x1b[31mred", flush=True)
        if "wait" in (request.config.getoption("--kv-set") or []):
            print("waiting", flush=True)
            deadline = time.monotonic() + 300  # whatever becomes of the test: nothing is left that waits
            while not GO.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
        print("the last line", flush=True)
    assert "fail" not in (request.config.getoption("--kv-set") or [])
"""

#: A python whose pip installs nothing and says so: it is content once it has "installed", or fails with ``~/pip-says``.
PYTHON = f"""#!/bin/sh
case "$1 $2" in
"-m venv")
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    exit ;;
"-m pip")
    case " $* " in *" --no-index "*) [ -e "$0.ready" ]; exit ;; esac
    echo "pip $*" >>"$HOME/pip-calls"
    if [ -e "$HOME/pip-says" ]; then cat "$HOME/pip-says" >&2; exit 1; fi
    echo "Collecting jax==0.10.2"
    : >"$0.ready"
    exit ;;
esac
exec "{sys.executable}" "$@"
"""


def host_key(seed: int) -> str:
    """A well-formed ed25519 key, as a known_hosts file has it."""
    blob = b"\0\0\0\x0bssh-ed25519\0\0\0 " + hashlib.sha256(bytes([seed])).digest()
    return f"ssh-ed25519 {base64.b64encode(blob).decode()}"


def fingerprint(key: str) -> str:
    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


@dataclass
class StandIn:
    """The state that the stand-in reads, and what a test asks of it."""

    root: Path
    hosts: int = 1
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = [host_key(worker) for worker in range(self.hosts)]
        self.vm: dict[str, Any] = {
            "name": NAME,
            "user": USER,
            "account": "someone@example.com",
            "state": "READY",
            "hosts": self.hosts,
            "describe_error": "",
            "keys": keys,
            "fingerprints": [fingerprint(key) for key in keys],
            "scanned_keys": keys,
            "published_keys": keys,
            "environment": {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # the small suite needs none, and starts sooner
        }
        self.root.mkdir()
        self.set()
        self.plant()
        tools = self.root / "bin"
        tools.mkdir()
        for tool in ("gcloud", "ssh-keyscan"):
            script = f'#!/bin/sh\nexec "{sys.executable}" -S "{GCLOUD}" "{self.root}" {tool} "$@"\n'
            self._executable(tools / tool, script)
        for worker in range(self.hosts):
            self._environment(self.home(worker))
        self.environment |= {
            "STAND_IN_PATH": os.environ["PATH"],
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.root / "client-home"),
            "KVCYCLE_CACHE": str(self.root / "cache"),
        }

    def set(self, **changes: Any) -> None:
        self.vm |= changes
        (self.root / "vm.json").write_text(json.dumps(self.vm))

    def plant(self, *faults: dict[str, Any]) -> None:
        (self.root / "faults.json").write_text(json.dumps([{"times": 1, **fault} for fault in faults]))

    def home(self, worker: int = 0) -> Path:
        return self.root / f"home-{worker}"

    @property
    def pins(self) -> list[str]:
        return [f"--host-key={pin}" for pin in self.vm["fingerprints"]]

    def calls(self, needle: str = "") -> list[list[str]]:
        path = self.root / "calls.jsonl"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in calls if any(needle in word for word in call)]

    def runs(self, worker: int = 0) -> list[Path]:
        return sorted((self.home(worker) / BASE / "runs").glob("*"))

    def real_python(self) -> None:
        """Let the conda environment be this test's own, pip and all."""
        for worker in range(self.hosts):
            python = self.home(worker) / "miniconda3" / "envs" / "sglang-jax" / "bin" / "python"
            self._executable(python, f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')

    def end_what_lives(self) -> None:
        for worker in range(self.hosts):
            for run in self.runs(worker):
                with suppress(OSError, ValueError):
                    if not (run / "exit-code").exists():
                        os.killpg(int((run / "pid").read_text()), signal.SIGKILL)

    def _environment(self, home: Path) -> None:
        """A conda whose environment is ready, and a python to make a virtual environment with, which is then empty."""
        python = home / "miniconda3" / "envs" / "sglang-jax" / "bin" / "python"
        self._executable(python, PYTHON)
        python.with_name("python.ready").touch()
        self._executable(home / "system" / "python3.13", PYTHON)
        self._executable(
            home / "miniconda3" / "bin" / "conda",
            f'#!/bin/sh\ncase "$*" in\n"run -n sglang-jax "*) echo "{python}" ;;\n'
            'env*) printf "# conda environments:\\nbase  /x\\nsglang-jax  /y\\n" ;;\n*) exit 1 ;;\nesac\n',
        )

    def _executable(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)


def commit(folder: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *words], cwd=folder, check=True)

    git("init", "-q")
    git("add", "--all")
    git("commit", "-q", "-m", "Everything")


def small_repository(folder: Path) -> Path:
    """What kvcycle takes for a checkout of itself, with a suite of one test."""
    for path, text in {
        "conftest.py": CONFTEST,
        "tests/test_suite.py": TESTS,
        "pyproject.toml": '[project]\nname = "k"\nversion = "1"\ndependencies = ["pytest"]\n'
        '[project.optional-dependencies]\ntpu = ["jax"]\n'
        '[tool.pytest.ini_options]\naddopts = ["-p", "no:cacheprovider"]\n',
        f"constraints/{STACK}.txt": "pytest==9\n",
        ".gitignore": "__pycache__/\nreports/\n",
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "guard.py", folder / "scripts")
    find = folder / "scripts" / "find-python.sh"
    find.write_text(
        '#!/bin/sh\nif [ -e "$HOME/system" ]; then echo "$HOME/system/python3.13"; else\n'
        'echo "No working Python 3.13 or 3.12 was found" >&2; exit 1; fi\n'
    )
    find.chmod(0o755)
    commit(folder)
    return folder


def this_repository(folder: Path, changes: dict[Path, str] | None = None) -> Path:
    """The project as it lies here, as a repository of one commit, with files that have another text."""
    for name in ("src", "tests", "fixtures", "profiles", "constraints", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "pyproject.toml", "README.md", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for path, text in (changes or {}).items():
        (folder / path).write_text(text)
    commit(folder)
    return folder
