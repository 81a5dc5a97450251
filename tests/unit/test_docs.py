"""The documentation is whole: every check has its line, every link its page and heading."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from kvcycle.checks import CHECKS
from kvcycle.record_parts import Evidence, PhaseName


@pytest.fixture
def docs(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.rootpath / "docs"


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_every_check_has_its_line_and_says_what_to_do(docs: Path) -> None:
    text = (docs / "checks.md").read_text()
    lines = text[text.index("## Dropping") :].splitlines()  # above are symptoms
    for check in CHECKS:
        (row,) = (line for line in lines if line.startswith(f"| `{check}` |"))
        assert all(cell.strip() for cell in row.strip("|").split("|")), row


def test_no_line_is_of_a_check_that_is_not_there(docs: Path) -> None:
    text = (docs / "checks.md").read_text()
    named = set(
        re.findall(r"`((?:drop|params2|swap|rebuild|generate|cycles|weights|soak|controls)\.(?!html)[a-z_0-9]+)`", text)
    )
    assert named <= set(CHECKS)


def test_why_it_did_not_free_the_memory_is_the_first_thing_on_its_page(docs: Path) -> None:
    text = (docs / "checks.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[0] == "It did not free the memory, why?"


def test_every_phase_is_in_the_runbook_and_every_label_is_explained(docs: Path) -> None:
    runbook, record = (docs / "runbook.md").read_text(), (docs / "record.md").read_text()
    assert [phase for phase in get_args(PhaseName) if f"`{phase}`" not in runbook] == []
    assert [label for label in get_args(Evidence) if f"\n| `{label}` |" not in record] == []


def test_every_page_is_in_the_index(docs: Path) -> None:
    index = (docs / "README.md").read_text()
    pages = {page.name for page in docs.glob("*.md")} - {"README.md"}
    assert [page for page in sorted(pages) if f"]({page}" not in index] == []


def test_every_link_leads_somewhere(docs: Path) -> None:
    root = docs.parent
    broken = []
    for page in [*docs.glob("*.md"), root / "README.md", root / "reports" / "README.md", root / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if target.startswith("http"):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists() or (anchor and anchor not in headings(file)):
                broken.append(f"{page.name}: {target}")
    assert broken == []
