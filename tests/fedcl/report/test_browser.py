"""Reports in a real browser: from disk, without a network, with the keyboard, on a phone, in both colours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedcl.report import write_report

from_page = pytest.mark.parametrize("which", ["single", "comparison"])
pytestmark = [
    pytest.mark.browser,
    pytest.mark.usefixtures("chromium"),  # before any run is made for a test that would be skipped
    pytest.mark.skipif("browser" in os.environ.get("FEDCL_SKIP", "").split(","), reason="FEDCL_SKIP names browser"),
]

Opened = Callable[..., Any]

CONTRAST = Path(__file__).with_name("contrast.js").read_text(encoding="utf-8")

NAMES = Path(__file__).with_name("names.js").read_text(encoding="utf-8")


@pytest.fixture
def opened(chromium: Any) -> Iterator[Opened]:
    """``opened(path, ...)``: the page of a report, in a browser that reaches no network; fails if it complains."""
    complaints: list[str] = []
    requests: list[str] = []
    contexts = []

    def show(path: Path, width: int = 1280, scheme: str = "light", script: bool = True) -> Any:
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url[:80]}"))
        page.on("request", lambda request: requests.append(request.url[:80]))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}") or dialog.dismiss())
        page.goto(path.resolve().as_uri())
        return page

    yield show
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in requests if url.startswith("file:")]) == len(contexts)


@pytest.fixture
def report(request: pytest.FixtureRequest, which: str) -> Path:
    path: Path = request.getfixturevalue(which)
    return path


@contextmanager
def changed(page: Any, what: str) -> Iterator[None]:
    """What a script finds in the page is another afterwards."""
    before = page.evaluate(what)
    yield
    assert page.evaluate(what) != before


def column(page: Any, table: str, number: int) -> list[str]:
    texts = page.locator(f"{table} tbody tr").evaluate_all(
        "(rows, n) => rows.map((row) => (row.cells[n].dataset.v ?? row.cells[n].textContent).replace(/\\u202f/g, ''))",
        number,
    )
    return [str(text) for text in texts]


@from_page
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_names(report: Path, scheme: str, opened: Opened, tmp_path: Path) -> None:
    page = opened(report, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    found = page.evaluate(CONTRAST)
    assert found["bad"] == []
    assert found["seen"] > 200
    assert page.evaluate(NAMES) == []
    picture = page.screenshot(full_page=True, path=tmp_path / "page.png")
    assert len(picture) > 50_000


def test_the_check_of_contrast_sees_weak_text(single: Path, opened: Opened) -> None:
    page = opened(single)
    page.evaluate("document.documentElement.style.setProperty('--muted', '#999999')")
    assert page.evaluate(CONTRAST)["bad"]


@from_page
def test_dark_and_light(report: Path, opened: Opened) -> None:
    grounds = {scheme: ground(opened(report, scheme=scheme)) for scheme in ("light", "dark")}
    assert grounds["light"] == "rgb(255, 255, 255)"
    assert grounds["dark"] != grounds["light"]
    page = opened(report, scheme="dark")
    button = page.get_by_role("button", name="Light colours")
    button.click()
    assert ground(page) == grounds["light"]
    assert page.get_by_role("button", name="Dark colours").is_visible()
    page.get_by_role("button", name="Dark colours").click()
    assert ground(page) == grounds["dark"]


def ground(page: Any) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


@from_page
def test_a_narrow_screen(report: Path, opened: Opened) -> None:
    page = opened(report, width=360)
    page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    tables = page.locator(".scroll").evaluate_all(
        "(nodes) => nodes.map((node) => [node.scrollWidth, node.clientWidth])"
    )
    assert any(whole > shown for whole, shown in tables), "no table is wider than the screen: nothing was tested"
    assert all(shown <= 360 for _, shown in tables)


def test_tables_are_sorted(single: Path, opened: Opened) -> None:
    page = opened(single)
    table, lost = "#table-classes", 5
    head = page.locator(f"{table} thead th").nth(lost)
    # Sorted by name, those of the last task, which have no forgetting, are not at the end.
    page.locator(f"{table} thead th").nth(0).get_by_role("button").click()
    written = column(page, table, lost)
    assert "" in written
    assert any(not first and then for first, then in pairwise(written))
    values = sorted(float(value) for value in written if value)
    for direction, expected in (("ascending", values), ("descending", values[::-1])):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        now = column(page, table, lost)
        assert [float(value) for value in now if value] == expected
        assert set(now[len(values) :]) == {""}, "undefined ones are last"
    page.locator(f"{table} thead th").nth(0).get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "none"
    assert [int(name) for name in column(page, table, 0)] == list(range(10))


@pytest.mark.parametrize("what", ["classes", "clients"])
def test_one_is_chosen(what: str, single: Path, opened: Opened) -> None:
    page = opened(single)
    place = f"[data-chooser={what}]"
    drawn = f"document.querySelector('{place} .chart g.line path').getAttribute('d')"
    told = f"document.querySelector('{place} table').textContent"
    with changed(page, drawn), changed(page, told):
        page.locator(f"{place} select").select_option(index=1)
    noun, name = {"classes": ("class", "Class"), "clients": ("client", "Client")}[what]
    label = page.locator(f"{place} select option").nth(1).text_content()
    assert page.locator(f"{place} .caption").text_content() == f"{name} {label}: accuracy (%) after each task"
    # The same numbers as the file has, to the digits shown.
    shown = [text for text in column(page, f"{place} table", 1) if text != "–"]
    assert shown == numbers_of(single.parent, noun, 1)
    said = page.locator(f"{place} .chart > svg").get_attribute("aria-label")
    assert all(text in said for text in shown)
    with changed(page, drawn), changed(page, told):
        page.locator(f"#table-{what} tbody button").nth(2).click()
    assert page.locator(f"{place} select").evaluate("(node) => [node.value, node === document.activeElement]") == [
        "2",
        True,
    ]


def numbers_of(folder: Path, noun: str, index: int) -> list[str]:
    from fedcl.measure.breakdown import read_classes, read_clients

    table = read_classes(folder, 3).accuracy if noun == "class" else read_clients(folder, 3, 3).seen()
    return [f"{round(100 * value, 2):.1f}" for value in table[:, index].tolist() if value == value]


def test_methods_are_drawn_for_a_chosen_class(comparison: Path, opened: Opened) -> None:
    page = opened(comparison)
    assert page.locator("[data-chooser=classes] .chart g.line").count() == 2
    head = page.locator("[data-chooser=classes] thead").text_content()
    assert "finetune" in head
    assert "replay" in head


def test_the_keyboard_is_enough(single: Path, opened: Opened) -> None:
    page = opened(single)
    active = "document.activeElement"
    page.keyboard.press("Tab")
    assert page.evaluate(f"{active}.textContent") == "Skip to the results"
    assert page.evaluate(f"{active}.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate(f"{active}.id") == "main"
    seen = []
    for _ in range(400):
        page.keyboard.press("Tab")
        what = page.evaluate(
            f"[{active}.tagName, {active}.id, {active}.closest('table')?.id, getComputedStyle({active}).outlineStyle]"
        )
        if what[0] == "BODY":
            break
        seen.append(what)
        if what[0] == "BUTTON" and what[2] == "table-matrix":
            page.keyboard.press("Enter")
            assert page.evaluate(f"{active}.closest('th').ariaSort") in ("ascending", "descending")
        elif what[0] == "SELECT":
            with changed(page, f"{active}.closest('[data-chooser]').querySelector('table').textContent"):
                page.keyboard.press("ArrowDown")
        elif what[0] == "SUMMARY":
            with changed(page, f"{active}.parentElement.open"):
                page.keyboard.press("Enter")
    assert [what for what in seen if what[3] in ("none", "")] == [], "what has the focus is not marked"
    kinds = {what[0] for what in seen}
    assert {"BUTTON", "SELECT", "INPUT", "SUMMARY", "DIV"} <= kinds
    assert {"pick-classes", "pick-clients", "find", "only-changed"} <= {what[1] for what in seen}


def test_settings_are_found(single: Path, opened: Opened) -> None:
    page = opened(single)
    rows = page.locator("details.settings tbody tr:visible")
    page.get_by_label("Search").fill("partition.alpha")
    assert rows.count() == 1
    assert "changed" in rows.first.text_content()
    assert page.locator("#found").text_content() == "1 setting"
    page.get_by_label("Search").fill("")
    page.get_by_label("Changed only").check()
    assert rows.count() == page.locator("tr.changed").count() > 5


def test_without_scripts_everything_is_there_to_read(single: Path, opened: Opened) -> None:
    page = opened(single, script=False)
    assert page.locator("table.sortable:visible").count() >= 5
    assert page.locator("button:visible, select:visible, input:visible").count() == 0
    assert page.locator("figure.plot:visible").count() >= 8


def test_paper_has_no_controls(single: Path, opened: Opened) -> None:
    page = opened(single, scheme="dark")
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert ground(page) == "rgb(255, 255, 255)"
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0


def test_names_are_text(tmp_path: Path, made_runs: ModuleType, opened: Opened) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"'é日本"
    settings = {"strategy": ["finetune"], "data.name": "digits", "data.root": evil}
    folder = made_runs.make_run(tmp_path, "x", 0, 0.5, settings, {"name": evil, "dataset": evil, "num_clients": 1})
    (folder / "class_accuracy.csv").write_text('task,"' + evil.replace('"', '""') + '",b\n0,0.5,\n1,0.25,0.75\n')
    warning = {"event": "warning", "time": 0.0, "attempt": 1, "message": evil}
    (folder / "events.jsonl").write_text(json.dumps(warning) + "\n")
    page = opened(write_report([folder]).path)
    assert evil in page.locator(".lead").text_content()
    assert page.locator("[data-chooser=classes] select option").first.text_content() == evil
    assert evil in page.locator("#events").text_content()
    assert evil in page.locator("#settings").text_content()
    assert page.locator("img[src=x]").count() == 0
