"""The jinja templates of page_assets. They escape every value that is not `Markup` already."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

# Of a page that is served: nothing comes from elsewhere, and no other page may frame it.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "img-src data:; connect-src 'self'; form-action 'none'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}
_ASSETS = Path(__file__).resolve().parent / "page_assets"


def render(name: str, **values: Any) -> Markup:
    """Fills a template.

    Args:
        name: its file in page_assets.
        values: its variables; the template fails on one that is missing.
    """
    return Markup(_environment().get_template(name).render(values))


def asset(name: str) -> Markup:
    """The text of a file in page_assets that belongs in a page as it is (style, script)."""
    return Markup((_ASSETS / name).read_text(encoding="utf-8"))


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
