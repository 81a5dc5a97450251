"""The code that goes to the VM: exactly one commit of this checkout, as a git bundle.

A tree that differs from its commit is refused, or, with ``--allow-dirty``, becomes a commit of its own that is made
beside the repository: the same tree gives the same commit, and neither the repository nor its index is touched.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from kvcycle.errors import VMError
from kvcycle.vm.shell import Shell

_SHOWN_CHANGES = 5


@dataclass(frozen=True)
class Source:
    """A commit to bring: where its checkout is, its full revision, and whether it is a snapshot of a changed tree."""

    root: Path
    revision: str
    dirty: bool

    @property
    def label(self) -> str:
        """The short revision, with ``-dirty`` for a tree that is no commit of the repository."""
        return self.revision[:12] + ("-dirty" if self.dirty else "")


def find_source(shell: Shell, folder: Path, work: Path, *, allow_dirty: bool) -> Source:
    """Find what would be brought from the checkout that ``folder`` is in; ``work`` takes the snapshot of a dirty tree.

    Raises:
        VMError: it is no checkout of kvcycle, its history is cut off, or it has changes and may not have them.
    """
    if shutil.which("git") is None:
        raise VMError("There is no git here, and the code goes to the VM as a git bundle: install git.")
    root = Path(_git(shell, folder, "rev-parse", "--show-toplevel", what=f"{folder} is in no git checkout of kvcycle"))
    if not (root / "scripts" / "guard.py").is_file() or not (root / "constraints").is_dir():
        raise VMError(f"{root} is no checkout of kvcycle (no scripts/guard.py or constraints/). Start from one.")
    head = _git(shell, root, "rev-parse", "HEAD", what=f"{root} has no commit yet")
    if _git(shell, root, "rev-parse", "--is-shallow-repository") == "true":
        raise VMError(f"The history of {root} is cut off, and no bundle of it can be made: git fetch --unshallow.")
    changes = _git(shell, root, "status", "--porcelain").splitlines()
    if not changes:
        return Source(root, head, dirty=False)
    if not allow_dirty:
        shown = "".join(f"\n  {line}" for line in changes[:_SHOWN_CHANGES])
        more = f"\n  and {len(changes) - _SHOWN_CHANGES} more" if len(changes) > _SHOWN_CHANGES else ""
        raise VMError(
            f"{root} differs from its commit {head[:12]} in {len(changes)} places, so that the run could not be named "
            f"by a commit. Commit them, or bring the tree as it is with --allow-dirty.{shown}{more}"
        )
    return Source(root, _snapshot(shell, root, head, work), dirty=True)


def bundle(shell: Shell, source: Source, work: Path) -> Path:
    """Write the bundle that holds the commit and all it rests on, and return its path."""
    path = work / f"{source.revision}.bundle"
    if source.dirty:
        beside = ["git", f"--git-dir={_beside(work)}"]
        _run(shell, source.root, [*beside, "update-ref", "refs/heads/kvcycle-dirty", source.revision])
        _run(shell, source.root, [*beside, "bundle", "create", "-q", str(path), "refs/heads/kvcycle-dirty"])
    else:
        _run(shell, source.root, ["git", "bundle", "create", "-q", str(path), "HEAD"])
    return path


def _beside(work: Path) -> Path:
    return work / "snapshot.git"


def _snapshot(shell: Shell, root: Path, head: str, work: Path) -> str:
    """Commit the tree as it is, untracked files too, into a bare repository that borrows the real one's objects."""
    beside = _beside(work)
    shutil.rmtree(beside, ignore_errors=True)
    _run(shell, root, ["git", "init", "-q", "--bare", str(beside)])
    objects = Path(root, _git(shell, root, "rev-parse", "--git-path", "objects")).resolve()
    (beside / "objects" / "info" / "alternates").write_text(f"{objects}\n", encoding="utf-8")
    # The repository's own settings and ignores hold; only what is written goes elsewhere.
    env = {"GIT_INDEX_FILE": str(beside / "index"), "GIT_OBJECT_DIRECTORY": str(beside / "objects")}
    date = _git(shell, root, "show", "-s", "--format=%cI", head)
    for who in ("AUTHOR", "COMMITTER"):  # the same tree gives the same commit
        env |= {f"GIT_{who}_NAME": "kvcycle", f"GIT_{who}_EMAIL": "kvcycle@localhost", f"GIT_{who}_DATE": date}
    _run(shell, root, ["git", "read-tree", head], env)
    _run(shell, root, ["git", "add", "--all"], env)
    tree = _run(shell, root, ["git", "write-tree"], env)
    message = f"The working tree on {head}, which is no commit"
    return _run(shell, root, ["git", "commit-tree", tree, "-p", head, "-m", message], env)


def _git(shell: Shell, folder: Path, *words: str, what: str = "") -> str:
    return _run(shell, folder, ["git", *words], what=what)


def _run(shell: Shell, folder: Path, argv: list[str], env: dict[str, str] | None = None, what: str = "") -> str:
    done = shell.run(argv, cwd=folder, env=env)
    if done.code != 0:
        why = (done.stderr or (f"exit code {done.code}",))[-1]
        raise VMError(f"{what or 'git could not make the bundle for the VM'}: {why}")
    return done.stdout.strip("\n")
