"""From what a page shows to one file that needs nothing else, and is not too large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from markupsafe import Markup

from .figures import Picture

MOST_BYTES = 5_000_000
"""Of a report."""


@dataclass(frozen=True)
class Limits:
    """What is cut to keep a page small: rows of a table, and bytes of a picture as SVG before it becomes a PNG."""

    rows: int
    svg: int


LEVELS = (Limits(1000, 400_000), Limits(300, 100_000), Limits(60, 0))
"""Tried in turn, until the page is small enough."""


class Page(Protocol):
    """What can be made into a file."""

    @property
    def template(self) -> str:
        """File name of the template."""

    @property
    def title(self) -> str:
        """Of the browser's tab."""

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Drawn figures."""

    def parts(self, limits: Limits) -> dict[str, Any]:
        """Values for the template, ``choosers`` among them."""


def render(page: Page) -> str:
    """The HTML, cut as little as gets it under :data:`MOST_BYTES`; the last attempt, if none does."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Whatever a name holds is text: nothing but the pictures and the page's own files is inserted unescaped.
    environment = Environment(
        loader=PackageLoader("fedcl.report", "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    template = environment.get_template(page.template)
    text = ""
    for limits in LEVELS:
        parts = page.parts(limits)
        data = {chooser.name: chooser.data(limits.rows) for chooser in parts["choosers"]}
        markup = {picture.kind: _markup(picture, limits) for picture in page.pictures}
        text = template.render(page=page, data=data, markup=markup, limits=limits, **parts)
        if len(text.encode()) <= MOST_BYTES:
            break
    return text


def _markup(picture: Picture, limits: Limits) -> Markup:
    """The picture itself; its words stand on the element around it."""
    if len(picture.svg) <= limits.svg:
        return Markup(picture.svg)  # matplotlib has escaped every text in it
    image = picture.png()
    return Markup('<img alt="" src="{}">').format(image) if len(image) < len(picture.svg) else Markup(picture.svg)
