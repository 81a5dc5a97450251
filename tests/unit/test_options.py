"""The suite's options: which of several places holds, and one sentence for each that will not do."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fixtures.options import PROFILE, SETTINGS, Settings, pytest_report_header, selects_suite
from kvcycle.errors import ProfileError
from kvcycle.profile import Profile
from kvcycle.profile_file import profile_folders, profile_names
from kvcycle.report.folder import new_run_dir

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("config_cache")

#: And without the plugin that collects all garbage, five times, at the end of each session.
PLUGIN = ("-p", "fixtures.options", "-p", "no:unraisableexception")
REPORTERS = ("-p", "pytest_reportlog.plugin", "-p", "pytest_benchmark.plugin")
NOT_TPU = ("-m", "not tpu")
SUITE = ("-m", "tpu", "--kv-platform", "cpu")
TINY = next(folder / "tiny.toml" for folder in profile_folders())


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the options of whoever runs these tests; what prepare() sets goes back, too."""
    for name in [name for name in os.environ if name.startswith("KVCYCLE_") and name != "KVCYCLE_CACHE"]:
        monkeypatch.delenv(name)
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    # Reading the entry points of everything installed is most of a start.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.fixture
def profiles(pytester: pytest.Pytester) -> Path:
    """Profiles in the session's folder that are named by where they are asked for."""
    for name in ("command", "variable", "ini"):
        (pytester.path / f"{name}.toml").write_text(TINY.read_text().replace('"tiny"', f'"{name}"'))
    return pytester.path


def configured(pytester: pytest.Pytester, *arguments: str, ini: str = "") -> pytest.Config:
    """A session's config, in this process: what a start of pytest does before it collects."""
    pytester.makeini(f"[pytest]\nmarkers = tpu: the suite\n{ini}")
    return pytester.parseconfigure(*PLUGIN, *arguments)


def settled(pytester: pytest.Pytester, *arguments: str, ini: str = "") -> tuple[Settings, Profile]:
    config = configured(pytester, *NOT_TPU, *arguments, ini=ini)
    return config.stash[SETTINGS], config.stash[PROFILE]


# Precedence ----------------------------------------------------------------------------------------------------------

#: What is given where → who holds: the command line, else the environment, else the ini, else the default.
PLACES = [(True, True, True), (True, False, True), (False, True, True), (False, False, True), (False, False, False)]


@pytest.mark.parametrize(("command", "variable", "ini"), PLACES)
def test_precedence(
    command: bool,
    variable: bool,
    ini: bool,
    profiles: Path,
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--kv-profile=command.toml", "--kv-cycles=5", "--kv-set=cycle.prompt=c", "--kv-platform=tpu"]
    variables = {"KVCYCLE_PROFILE": "variable.toml", "KVCYCLE_CYCLES": "4", "KVCYCLE_SET": "cycle.prompt=v"}
    variables |= {"KVCYCLE_PLATFORM": "cpu", "KVCYCLE_REPORT_DIR": "v"}
    for name, value in variables.items() if variable else ():
        monkeypatch.setenv(name, value)
    settings, profile = settled(
        pytester,
        *(arguments if command else ()),
        ini="kv_profile = ini.toml\nkv_cycles = 3\nkv_set = cycle.prompt=i\nkv_platform = cpu\nkv_report_dir = i"
        if ini
        else "",
    )
    name = "command" if command else "variable" if variable else "ini" if ini else "tiny"
    assert profile.name == name
    assert settings.profile_name == (name if name == "tiny" else f"{name}.toml")
    assert profile.cycle.cycles == {"command": 5, "variable": 4, "ini": 3, "tiny": 2}[name]
    assert profile.cycle.prompt == {"command": "c", "variable": "v", "ini": "i", "tiny": "Hello"}[name]
    assert settings.platform == {"command": "tpu", "variable": "cpu", "ini": "cpu", "tiny": "tpu"}[name]
    folder = "v" if variable else "i" if ini else "reports"
    assert settings.report_dir == pytester.path / folder


def test_keys_may_be_set_one_after_the_other(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCYCLE_SET", "engine.page_size=16; cycle.prompt=a=b ;")
    several = {"engine.page_size": 16, "cycle.prompt": "a=b"}
    settings, _ = settled(pytester)
    assert settings.overrides == several
    settings, _ = settled(pytester, "--kv-set", "engine.page_size=32", "--kv-set", "cycle.prompt=c")
    assert settings.overrides == {"engine.page_size": 32, "cycle.prompt": "c"}
    monkeypatch.delenv("KVCYCLE_SET")
    settings, _ = settled(pytester, ini="kv_set =\n  engine.page_size=16\n  cycle.prompt=a=b\n")
    assert settings.overrides == several


def test_cycles_hold_against_a_set_key(pytester: pytest.Pytester) -> None:
    _, profile = settled(pytester, "--kv-set", "cycle.cycles=7", "--kv-cycles", "3")
    assert profile.cycle.cycles == 3


@pytest.mark.parametrize(
    ("arguments", "variable", "ini", "required"),
    [
        ((), None, "", False),
        ((), None, "require_tpu = true", True),
        ((), "1", "", True),
        ((), "0", "require_tpu = true", False),
        ((), "", "require_tpu = true", False),
        ((), "no", "", False),
        (("--require-tpu",), "0", "", True),
    ],
)
def test_whether_a_tpu_is_required(
    arguments: Sequence[str],
    variable: str | None,
    ini: str,
    required: bool,
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable is not None:
        monkeypatch.setenv("KVCYCLE_REQUIRE_TPU", variable)
    settings, _ = settled(pytester, *arguments, ini=ini)
    assert settings.require_tpu is required


# What will not do ----------------------------------------------------------------------------------------------------

_KNOWN = ", ".join(profile_names())


@pytest.mark.parametrize(
    ("arguments", "variables", "ini", "sentence"),
    [
        (["--kv-profile=tinny"], {}, "", f"There is no profile 'tinny' (did you mean 'tiny'?); there are: {_KNOWN}."),
        ([], {"KVCYCLE_PROFILE": "./x.toml"}, "", "There is no profile file './x.toml'."),
        (["--kv-set=page_size"], {}, "", "'page_size' is not KEY=VALUE, for example engine.page_size=16."),
        ([], {"KVCYCLE_SET": "a=1;b"}, "", "'b' is not KEY=VALUE, for example engine.page_size=16."),
        (
            ["--kv-set=engine.page_sise=1"],
            {},
            "",
            "engine.page_sise is no argument of the installed sglang-jax (did you mean 'page_size'?).",
        ),
        (
            ["--kv-cycles=0"],
            {},
            "",
            "Profile 'tiny': cycle.cycles=0 will not do: Input should be greater than or equal to 1.",
        ),
        (
            [],
            {},
            "kv_cycles = two",
            (
                "Profile 'tiny': cycle.cycles='two' will not do: Input should be a valid integer, unable to parse "
                "string as an integer."
            ),
        ),
        (
            [],
            {"KVCYCLE_PLATFORM": "gpu"},
            "",
            "kv_platform='gpu' is no platform; use tpu, or cpu for virtual devices.",
        ),
        ([], {}, "kv_platform = gpu", "kv_platform='gpu' is no platform; use tpu, or cpu for virtual devices."),
        (
            [*SUITE, "--kv-set=engine.tp_size=3"],
            {},
            "",
            "engine.tp_size=3 does not divide the model's 4 attention heads; use one of 1, 2, 4.",
        ),
        (
            [*SUITE, "--kv-set=model.path=nowhere/there/model"],
            {},
            "",
            (
                "model.path='nowhere/there/model' does not exist; name a folder with a config.json, a hub id "
                "(org/name), or one of builtin:tiny-qwen2, builtin:tiny-qwen3, "
                "builtin:tiny-qwen3-moe, builtin:tiny-llama, builtin:tiny-gemma2."
            ),
        ),
    ],
)
def test_an_option_that_will_not_do_is_one_sentence(
    arguments: Sequence[str],
    variables: Mapping[str, str],
    ini: str,
    sentence: str,
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(pytest.UsageError) as caught:
        configured(pytester, *NOT_TPU, *arguments, ini=ini)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        (["--kv-hosts=0"], {}, "kv_hosts='0' is no number of hosts: give 1 or more."),
        ([], {"KVCYCLE_HOSTS": "two"}, "kv_hosts='two' is no number of hosts: give 1 or more."),
        (
            ["--kv-hosts=3"],
            {},
            "The engine's 4 devices (engine.tp_size) cannot be shared out evenly to 3 hosts; use one of 1, 2, 4.",
        ),
        (
            ["--kv-hosts=2", "--kv-platform=tpu"],
            {},
            (
                "kv_hosts=2 with kv_platform=tpu: a TPU slice has the hosts that it has. Start the suite on each of "
                "them, with KVCYCLE_RANK and KVCYCLE_COORDINATOR set, as 'kvcycle vm run --worker all' does; or share "
                "virtual devices of this machine: --kv-platform cpu."
            ),
        ),
        (
            ["--kv-hosts=2"],
            {"KVCYCLE_RANK": "1"},
            (
                "KVCYCLE_RANK='1' and KVCYCLE_COORDINATOR='' do not say which of 2 hosts this is: set both on every "
                "host, as 0, 1, ... and the address of host 0 with a free port."
            ),
        ),
        ([], {"KVCYCLE_RANK": "1"}, "kv_hosts='' is no number of hosts: give 1 or more."),
        (
            ["--kv-hosts=2"],
            {"KVCYCLE_RANK": "2", "KVCYCLE_COORDINATOR": "10.0.0.2:10011"},
            "engine.node_rank=2 is none of 2 hosts, which are 0 to 1.",
        ),
        (
            ["--kv-hosts=2"],
            {"KVCYCLE_RANK": "1", "KVCYCLE_COORDINATOR": "10.0.0.2:65530"},
            (
                "engine.dist_init_addr='10.0.0.2:65530' is no address at which 2 hosts could meet: give host 0's, with "
                "a port of at most 65529 (sglang-jax also takes the fifth and sixth after it), as 10.0.0.2:10011."
            ),
        ),
    ],
)
def test_hosts_that_cannot_be_are_one_sentence_and_leave_nothing(
    arguments: Sequence[str],
    variables: Mapping[str, str],
    sentence: str,
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(pytest.UsageError) as caught:
        configured(pytester, *SUITE, *arguments)
    assert str(caught.value) == sentence
    assert not (pytester.path / "reports").exists()


def test_the_first_host_starts_the_others_and_writes_the_report(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(pytester, *REPORTERS, *SUITE, "--kv-hosts=2")
    settings, engine = config.stash[SETTINGS], config.stash[PROFILE].engine
    assert (settings.hosts, settings.rank, settings.starts_the_hosts) == (2, 0, True)
    assert settings.run_dir is not None
    assert (engine.nnodes, engine.node_rank) == (2, 0)
    assert re.fullmatch(r"127\.0\.0\.1:\d+", engine.dist_init_addr or "")
    assert os.environ["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=2")
    assert settings.overrides == {}  # what a person has set, and nothing else
    assert pytest_report_header(config)[0].startswith("kvcycle: profile tiny, platform cpu, 2 hosts, report ")


def test_a_later_host_starts_and_writes_nothing(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOSTS": "2", "RANK": "1", "COORDINATOR": "10.0.0.2:10011"}.items():
        monkeypatch.setenv(f"KVCYCLE_{name}", value)
    config = configured(pytester, *REPORTERS, *SUITE, "--junitxml=mine.xml")
    settings = config.stash[SETTINGS]
    assert (settings.hosts, settings.rank, settings.starts_the_hosts, settings.selected) == (2, 1, False, True)
    assert settings.run_dir is None
    assert config.option.xmlpath is None
    assert config.stash[PROFILE].engine.dist_init_addr == "10.0.0.2:10011"
    assert not (pytester.path / "reports").exists()


def test_a_platform_that_is_none_is_refused_by_name(pytester: pytest.Pytester) -> None:
    with pytest.raises(pytest.UsageError, match=r"argument --kv-platform: invalid choice: 'gpu'"):
        configured(pytester, "--kv-platform", "gpu")


def test_a_report_folder_that_cannot_be_written(pytester: pytest.Pytester) -> None:
    (pytester.path / "taken").write_text("a file")
    with pytest.raises(pytest.UsageError) as caught:
        configured(pytester, *SUITE, "--kv-report-dir", "taken")
    assert str(caught.value) == (
        f"The report directory {pytester.path / 'taken'} cannot be written: [Errno 17] File exists: "
        f"'{pytester.path / 'taken'}'. Choose another with --kv-report-dir."
    )


def test_the_whole_project_refuses_with_exit_code_4_before_anything_boots(
    pytester: pytest.Pytester, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The project's own conftest.py, in a process of its own.
    root = pytestconfig.rootpath
    pytester.makeconftest((root / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile("import pytest\n\n@pytest.mark.tpu\ndef test_nothing(): raise AssertionError('collected')\n")
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{root / 'src'}")
    result = pytester.runpytest_subprocess(*SUITE, "--kv-set", "engine.tp_size=3")
    assert result.ret == pytest.ExitCode.USAGE_ERROR == 4
    sentence = "ERROR: engine.tp_size=3 does not divide the model's 4 attention heads; use one of 1, 2, 4."
    assert [line for line in result.errlines if line] == [sentence]
    assert [line for line in result.outlines if line] == []


# The run's folder ----------------------------------------------------------------------------------------------------


def test_the_suite_reports_into_a_folder_of_its_own(pytester: pytest.Pytester) -> None:
    config = configured(pytester, *REPORTERS, *SUITE, "--kv-report-dir", "out")
    run_dir = config.stash[SETTINGS].run_dir
    assert run_dir is not None
    assert run_dir.parent == pytester.path / "out"
    assert (pytester.path / "out" / "latest").resolve() == run_dir
    option = config.option
    assert [option.xmlpath, option.report_log, option.benchmark_json] == [
        str(run_dir / name) for name in ("junit.xml", "reportlog.jsonl", "benchmark.json")
    ]
    headers = config.hook.pytest_report_header(config=config, start_path=pytester.path)
    assert [f"kvcycle: profile tiny, platform cpu, report out/{run_dir.name}"] in headers


@pytest.mark.parametrize("arguments", [NOT_TPU, (*SUITE, "--collect-only")])
def test_a_session_that_runs_no_suite_leaves_no_folder(arguments: Sequence[str], pytester: pytest.Pytester) -> None:
    config = configured(pytester, *arguments, "--kv-report-dir", "out")
    assert config.stash[SETTINGS].run_dir is None
    assert not (pytester.path / "out").exists()


def test_runs_of_the_same_second_have_their_own_folders(tmp_path: Path) -> None:
    runs = [new_run_dir(tmp_path / "deep" / "reports") for _ in range(3)]
    assert len(set(runs)) == 3
    for run in runs:
        assert run.is_dir()
        assert run.stat().st_mode & 0o755 == 0o755
    assert (tmp_path / "deep" / "reports" / "latest").resolve() == runs[-1]
    assert {path.name for path in runs[0].parent.iterdir()} == {"latest", *(run.name for run in runs)}


def test_a_folder_that_is_called_latest_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "notes.txt").write_text("mine")
    with pytest.raises(ProfileError, match=r"^The report directory .* cannot be written: "):
        new_run_dir(tmp_path)
    assert (tmp_path / "latest" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("expression", "selects"),
    [
        ("", True),
        ("tpu", True),
        ("tpu or slow", True),
        ("not tpu", False),
        ("slow", False),
        ("tpu and slow", False),
        ("not slow", True),
        ("tpu and", False),  # pytest itself says so, later
    ],
)
def test_which_expressions_select_the_suite(expression: str, selects: bool, pytestconfig: pytest.Config) -> None:
    class Config:
        """As much of a config as the question needs."""

        option: Any = type("Option", (), {"markexpr": expression})

    config: Any = Config()
    assert selects_suite(config) is selects
