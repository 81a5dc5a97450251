"""Where reports go: a folder for every run, named by UTC time, and ``latest`` pointing to the newest."""

from __future__ import annotations

import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from kvcycle.errors import ProfileError


def new_run_dir(report_dir: Path) -> Path:
    """Make the run's own folder, named by UTC time, and let ``latest`` point to it.

    Raises:
        ProfileError: the folder cannot be written.
    """
    name = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    try:
        report_dir.mkdir(parents=True, exist_ok=True)
        run_dir = report_dir / name
        if run_dir.exists():
            run_dir = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=report_dir))
            run_dir.chmod(0o755)
        run_dir.mkdir(exist_ok=True)
        link = report_dir / f".latest-{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(run_dir.name)
        link.replace(report_dir / "latest")
    except OSError as error:
        raise ProfileError(
            f"The report directory {report_dir} cannot be written: {error}. Choose another with --kv-report-dir."
        ) from error
    return run_dir
