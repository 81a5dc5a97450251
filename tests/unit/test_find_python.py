"""scripts/find-python.sh with interpreters that are shell scripts, on a PATH that holds nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "find-python.sh"
#: What a pyenv shim does for a version that is installed but not active.
FAILING_SHIM = 'echo "pyenv: command not found" >&2\nexit 127\n'


def python_claiming(version: str) -> str:
    """A script that runs its argument's code on this test's own interpreter, which claims another version."""
    major, minor, patch = version.split(".")
    claim = f"import sys; sys.version_info = ({major}, {minor}, {patch}, 'final', 0); "
    # sys.argv is ['-c', '-c', CODE, ...]: what the caller wrote begins at the second.
    run = "code = sys.argv[2]; sys.argv[1:3] = []; exec(code)"
    return f'exec "{sys.executable}" -c "{claim}{run}" "$@"\n'


@dataclass
class Machine:
    """A PATH, a home and a pyenv of this test's own."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path.mkdir()
        for tool in ("sh", "sed"):  # what the script itself calls
            found = shutil.which(tool)
            assert found is not None
            (self.path / tool).symlink_to(found)
        self.environment |= {"PATH": str(self.path), "HOME": str(self.root / "home")}

    @property
    def path(self) -> Path:
        return self.root / "bin"

    def pyenv_version(self, version: str) -> Path:
        return self.root / "home" / ".pyenv" / "versions" / version / "bin" / "python3"

    def install(self, target: Path, body: str) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"#!/bin/sh\n{body}")
        target.chmod(0o755)
        return target

    def find(self, *versions: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.path / "sh", SCRIPT, *versions],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def assert_found(result: subprocess.CompletedProcess[str], expected: Path) -> None:
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{expected}\n", "")


def assert_refused(result: subprocess.CompletedProcess[str], sentence: str) -> None:
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"{sentence}\n")


@pytest.mark.parametrize("version", ["3.12.0", "3.13.9"])
def test_takes_the_python_that_is_given_before_any_on_path(machine: Machine, version: str) -> None:
    machine.install(machine.path / "python3.13", python_claiming("3.13.0"))
    given = machine.install(machine.root / "elsewhere" / "python", python_claiming(version))
    machine.environment["PYTHON"] = str(given)
    assert_found(machine.find(), given)


def test_takes_a_given_name_from_path(machine: Machine) -> None:
    given = machine.install(machine.path / "my-python", python_claiming("3.12.4"))
    machine.environment["PYTHON"] = "my-python"
    assert_found(machine.find(), given)


@pytest.mark.parametrize("version", ["2.7.18", "3.11.7", "3.14.0", "4.12.0"])
def test_refuses_a_given_python_of_another_version(machine: Machine, version: str) -> None:
    machine.install(machine.path / "python3.13", python_claiming("3.13.0"))
    given = machine.install(machine.root / "old-python", python_claiming(version))
    machine.environment["PYTHON"] = str(given)
    assert_refused(
        machine.find(),
        f"PYTHON={given} is Python {version}, and kvcycle needs 3.13 or 3.12; give another, or leave PYTHON unset.",
    )


def test_refuses_a_given_python_that_does_not_run(machine: Machine) -> None:
    given = machine.install(machine.path / "python3.12", FAILING_SHIM)
    machine.environment["PYTHON"] = str(given)
    assert_refused(machine.find(), f"PYTHON={given} does not run; give another, or leave PYTHON unset.")


def test_refuses_a_given_python_that_does_not_exist(machine: Machine) -> None:
    machine.environment["PYTHON"] = "nowhere/python"
    assert_refused(
        machine.find(),
        "PYTHON=nowhere/python is no command; give the path of a Python 3.13 or 3.12, or leave PYTHON unset.",
    )


def test_names_the_part_that_a_given_python_lacks(machine: Machine) -> None:
    # As on a Debian without python3-venv; None in sys.modules makes the import fail.
    crippled = python_claiming("3.12.3").replace("import sys;", "import sys; sys.modules['ensurepip'] = None;", 1)
    given = machine.install(machine.root / "crippled", crippled)
    machine.environment["PYTHON"] = str(given)
    result = machine.find()
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"PYTHON={given} is Python 3.12.3 without a part that kvcycle needs (")
    assert "ensurepip" in result.stderr


def test_passes_over_a_failing_shim_in_silence(machine: Machine) -> None:
    machine.install(machine.path / "python3.13", FAILING_SHIM)
    works = machine.install(machine.path / "python3.12", python_claiming("3.12.1"))
    assert_found(machine.find(), works)


def test_passes_over_other_versions_and_takes_a_plain_python3(machine: Machine) -> None:
    machine.install(machine.path / "python", python_claiming("2.7.18"))
    works = machine.install(machine.path / "python3", python_claiming("3.13.2"))
    assert_found(machine.find(), works)


def test_prefers_the_newer_version_on_path(machine: Machine) -> None:
    machine.install(machine.path / "python3.12", python_claiming("3.12.1"))
    newer = machine.install(machine.path / "python3.13", python_claiming("3.13.1"))
    assert_found(machine.find(), newer)


def test_finds_a_pyenv_version_that_is_not_active(machine: Machine) -> None:
    for name in ("python3.13", "python3.12", "python3"):
        machine.install(machine.path / name, FAILING_SHIM)
    machine.install(machine.pyenv_version("3.11.7"), python_claiming("3.11.7"))
    works = machine.install(machine.pyenv_version("3.12.1"), python_claiming("3.12.1"))
    assert_found(machine.find(), works)


def test_looks_for_pyenv_where_its_own_variable_says(machine: Machine) -> None:
    machine.install(machine.pyenv_version("3.13.0"), FAILING_SHIM)
    pyenv = machine.root / "pyenv"
    works = machine.install(pyenv / "versions" / "3.13.0" / "bin" / "python3", python_claiming("3.13.0"))
    machine.environment["PYENV_ROOT"] = str(pyenv)
    assert_found(machine.find(), works)


def test_takes_what_uv_finds(machine: Machine) -> None:
    works = machine.install(machine.root / "uv-python", python_claiming("3.13.5"))
    machine.install(machine.path / "uv", f'[ "$2" = find ] && echo "{works}"\n')
    assert_found(machine.find(), works)


def test_has_uv_install_one_when_there_is_none(machine: Machine) -> None:
    late = machine.root / "uv-python"
    archive = machine.install(machine.root / "archive", python_claiming("3.13.5"))
    find, install = f'[ -e "{late}" ] && echo "{late}"', f'{shutil.which("mv")} "{archive}" "{late}"'
    machine.install(machine.path / "uv", f'case "$2" in find) {find} ;; install) {install} ;; esac\n')
    result = machine.find()
    assert (result.returncode, result.stdout) == (0, f"{late}\n")
    assert result.stderr.startswith("No Python 3.13 or 3.12 is installed; uv installs Python 3.13")


def test_takes_only_the_version_that_is_asked_for(machine: Machine) -> None:
    machine.install(machine.path / "python3.13", python_claiming("3.13.1"))
    machine.install(machine.path / "python3", python_claiming("3.13.1"))
    asked = machine.install(machine.pyenv_version("3.12.1"), python_claiming("3.12.1"))
    assert_found(machine.find("3.12"), asked)


@pytest.mark.parametrize("uv", [None, "exit 2\n"], ids=["no-uv", "uv-fails"])
def test_says_in_one_sentence_what_to_do_when_there_is_none(machine: Machine, uv: str | None) -> None:
    machine.install(machine.path / "python3", python_claiming("3.11.2"))
    if uv is not None:
        machine.install(machine.path / "uv", uv)
    result = machine.find()
    assert (result.returncode, result.stdout) == (1, "")
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("No working Python 3.13 or 3.12 was found")
    assert all(way in sentence for way in ("pyenv install 3.13", "uv python install 3.13", "apt-get", "PYTHON="))
    assert "Traceback" not in result.stderr
