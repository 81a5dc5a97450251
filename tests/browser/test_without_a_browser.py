"""Where no browser is installed its tests skip with what to install, and fail where CI asks for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("required", "outcome", "code"), [("0", "1 skipped", 0), ("1", "1 error", 1)])
def test_without_a_browser(required: str, outcome: str, code: int, pytestconfig: pytest.Config) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/browser/test_page.py", "-k", "what_one_sees_first"],
        cwd=pytestconfig.rootpath,
        env=os.environ | {"PATH": str(Path(sys.executable).parent), "KVCYCLE_REQUIRE_BROWSER": required},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert outcome in done.stdout
    said = " ".join(done.stdout.split())
    assert "there is no chromium and no chromedriver here" in said
    assert "apt-get install -y chromium chromium-driver" in said
