"""The text of README.md and docs/: what it names is there, links lead somewhere, generated pages are up to date."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import typer

from fedcl.commands.cli import app
from fedcl.config import Config, load_config

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


def spans(page: str) -> list[str]:
    """Code within the text of a page."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page].read_text(encoding="utf-8"), flags=re.S | re.M)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = PAGES[page].parent
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page].read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        path = folder / name if name else PAGES[page]
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page}: there is no heading #{anchor}"


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_what_the_text_names_is_there(page: str) -> None:
    root = typer.main.get_command(app)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    verbs = set(root.commands)  # type: ignore[attr-defined]
    sections = {
        name: set(vars(value)) for name, value in vars(Config()).items() if hasattr(value, "__dataclass_fields__")
    }
    for span in spans(page):
        if (verb := re.match(r"fedcl ([a-z]+)\b", span)) is not None:
            assert verb.group(1) in verbs, f"{page}: {span}"
        if (extra := re.search(r"fedcl-sim\[(\w+)\]", span)) is not None:
            assert extra.group(1) in extras, f"{page}: {span}"
        for section, key in re.findall(r"(?<![\w./])([a-z]+)\.([a-z_]+)(?=[=,\s]|$)", span):
            if section in sections and not key.endswith(("py", "yaml", "json", "csv", "md")):
                assert key in sections[section], f"{page}: there is no setting {section}.{key}"
    for option in re.findall(r"`(--[a-z-]+)", PAGES[page].read_text(encoding="utf-8")):
        known = {o for c in root.commands.values() for p in c.params for o in p.opts}  # type: ignore[attr-defined]
        assert option in known or option == "--node-config", f"{page}: no command has {option}"


def test_every_page_is_in_the_table_of_pages() -> None:
    index = PAGES["docs/README.md"].read_text(encoding="utf-8")
    assert {page for page in PAGES if page.startswith("docs/")} == {
        "docs/README.md", *(f"docs/{name}" for name in re.findall(r"\]\(([\w-]+\.md)\)", index))
    }  # fmt: skip


def test_the_reference_is_what_the_cards_say() -> None:
    from fedcl.experiments.reference import pages

    for name, text in pages().items():
        same = PAGES[f"docs/{name}"].read_text(encoding="utf-8") == text
        assert same, f"docs/{name} is out of date: python -m fedcl.experiments.reference"


def test_every_protocol_of_the_reference_can_be_asked_for() -> None:
    protocols = re.findall(
        r"`fedcl sweep protocol=(\S+) strategy=finetune`", PAGES["docs/reference-protocols.md"].read_text()
    )
    assert len(protocols) >= 17
    for name in protocols:
        assert load_config({"protocol": name, "strategy": ["finetune"]}, []).protocol.name == name


def test_the_readme_names_every_strategy_and_scenario() -> None:
    from fedcl.experiments.reference import builtin

    readme = PAGES["README.md"].read_text(encoding="utf-8")
    for kind in ("strategies", "scenarios", "partitions"):
        missing = [card["name"] for card in builtin(kind) if f"`{card['name']}`" not in readme]
        assert not missing, f"README.md does not name the {kind} {', '.join(missing)}"


def test_the_picture_can_be_drawn_again(tmp_path: Path) -> None:
    from fedcl.experiments.concepts import FILE, concepts
    from fedcl.plots.style import save

    save(concepts(), tmp_path / "concepts.png")
    assert (tmp_path / "concepts.png").stat().st_size > 10_000
    assert FILE.stat().st_size < 200_000
