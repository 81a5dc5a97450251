"""The templates, and how what a record says in words reaches them: escaped for HTML, and printable."""

from __future__ import annotations

from functools import cache

import jinja2
from markupsafe import Markup

from kvcycle.text import exact_bytes, printable, seconds, signed_bytes


def _finalize(value: object) -> object:
    """Every text that a template shows: what would hide or reorder characters is escaped as in a terminal."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvcycle.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "exact_bytes": exact_bytes,
        "signed_bytes": signed_bytes,
        "seconds": seconds,
        "fraction": lambda value: f"{value:.6f}",
    }
    return environment


def render(template: str, **values: object) -> str:
    """One page from its template."""
    return _templates().get_template(template).render(**values)
