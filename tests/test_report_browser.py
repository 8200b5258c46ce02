"""The report in a real browser: Chromium, headless, cut off from any network.

Every test has a page of its own, and at its end no message on the console, no error, no dialog, and
no request beside the file itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.doctor.finding import Finding
from normwise.doctor.report import CheckReport
from normwise.pages import Page, Section, library
from normwise.pages.training import percentiles
from normwise.report import compose, from_dict

pytest.importorskip("vl_convert")
sync_api = pytest.importorskip("playwright.sync_api")

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if BROWSER is None and not os.environ.get("CI"):
    pytest.skip("no chromium (make test installs Debian's as root)", allow_module_level=True)

HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "'\"><svg onload=window.hacked=1>",
    "a\u2028b\u202ec",
    "with space/slash#hash?%41&amp;",
    "{{ 7 * 7 }}${window.hacked = 1}",
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    block = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    net = nn.Sequential(*block, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            nn.init.uniform_(module.weight, 0.5, 2)
    return net.eval()


def finding(code: str, layer: str, severity: str, **evidence: Any) -> Finding:
    return Finding(code, "rule", layer, severity, "high", f"fact of {layer}", "advice", evidence)


def checked() -> CheckReport:
    findings = [
        finding("NW101", "1", "error", share=0.5),
        finding("NW101", "4", "error", share=0.25),
        finding("NW302", "1", "warning", values=9),
        finding("NW302", "6", "warning", values=100),
        *(finding("NW201", name, "info") for name in HOSTILE),
    ]
    return CheckReport(findings, {"norms": 9, "source": "a file", "skipped": {}, "errors": {}})


def demo_run(looks: int = 301) -> dict[str, Any]:
    """As large as that of the full demo."""
    steps = list(range(0, 10 * looks, 10))
    network = {
        "steps_to_90": 40, "steps_to_95": None, "final_accuracy": 0.98, "step_ms": 1.25,
        "drift": 1.0, "looks": steps, "accuracies": [i / looks for i in range(looks)],
        "test_losses": [1 / (i + 1) for i in range(looks)],
        "sigmoid_inputs": {q: [float(q) + i for i in range(looks)] for q in ("15", "50", "85")},
    }  # fmt: skip
    apart = {"largest": 4e-6, "step": 1}
    agreement = {"passed": True, "verified_steps": 300, "tolerance": 5e-4}
    agreement |= {"verified_training_loss": apart, "verified_test_loss": apart}
    return {
        "title": "demo", "seed": 0, "seconds": 9.5, "settings": {"steps": 3000}, "typical_unit": 3,
        "networks": dict.fromkeys(("none", "torch.nn", "normwise"), network),
        "agreement": agreement,
    }  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """'all' has everything; 'check' is small, and quick to load."""
    net, x = network(), torch.randn(4, 3, 9, 9)
    folder = tmp_path_factory.mktemp("pages")
    rows = [
        {"step": step, "name": name, "low": -1.0 * k, "middle": step / 9, "high": 2.0 + k}
        for k, name in enumerate(("1", "4"))
        for step in range(20)
    ]
    chart = percentiles(rows, "Inputs", "Their percentiles.", ("low", "middle", "high"))
    watched = Page("", [Section("watch", charts=[chart])])
    everything = [
        checked(),
        nw.fold(net, x, seconds=0),
        nw.recalibrate(net, [x]),
        from_dict(json.loads(json.dumps(demo_run()))),
        watched,
    ]
    paths = {name: folder / f"{name}.html" for name in ("all", "check")}
    compose(*[one for one in everything if one is not watched], title="All of it").save(
        paths["all"]
    )
    compose(checked()).save(paths["check"])
    paths["watch"] = folder / "watch.html"
    watched.save(paths["watch"])
    return paths


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    assert BROWSER is not None, "CI is to test the report in a browser: install chromium"
    with sync_api.sync_playwright() as playwright:
        # As root Chromium has no sandbox; the pages are ours.
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


Open = Any  # open_page(path, fragment="", width=1280) -> a page; .noise


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Open]:
    """Opens a file and waits until its charts are drawn; asserts at the end that all was quiet."""
    noise: list[str] = []
    contexts = []

    def open_(path: Path, fragment: str = "", width: int = 1280) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": 800})
        contexts.append(context)
        context.set_default_timeout(10_000)
        context.set_offline(True)
        own = path.as_uri()

        def ask(route: Any) -> None:
            if route.request.url.partition("#")[0] == own:
                route.continue_()
            else:
                noise.append(f"request for {route.request.url[:200]}")
                route.abort()

        context.route("**/*", ask)
        page = context.new_page()
        page.on("console", lambda m: noise.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda error: noise.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (noise.append("dialog"), dialog.dismiss()))
        page.goto(own + fragment)
        page.wait_for_function("document.documentElement.dataset.ready")
        return page

    open_.noise = noise
    yield open_
    for context in contexts:
        hacked = (page.evaluate("window.hacked") for page in context.pages)
        noise.extend("code out of a name was run" for one in hacked if one)
        context.close()
    assert noise == []


def column(page: Any, key: str, table: int = 0) -> list[str]:
    block = page.locator("[data-table]").nth(table)
    keys = [head.get_attribute("data-column") for head in block.locator("th").all()]
    rows = block.locator("tbody tr").filter(visible=True)
    cells = rows.locator(f"td:nth-child({keys.index(key) + 1})")
    return [text.strip() for text in cells.all_inner_texts()]


def head(page: Any, name: str, table: int = 0) -> Any:
    block = page.locator("[data-table]").nth(table)
    return block.get_by_role("button", name=name, exact=True)


def focused(page: Any, expression: str) -> Any:
    return page.evaluate(f"document.activeElement.{expression}")


# What is there


def test_every_chart_is_drawn_and_has_a_name(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["all"])
    figures = page.locator("figure")
    assert figures.count() >= 9
    for figure in figures.all():
        svg = figure.locator("svg.marks")
        assert svg.locator(".mark-rect path, .mark-symbol path, .mark-line path").count() > 0
        name = figure.locator(".drawing").get_attribute("aria-label")
        assert figure.locator("strong").inner_text() in name
        assert "NaN" not in svg.inner_html()


def test_the_page_is_one_file_under_5_mb_that_may_load_nothing(
    pages: dict[str, Path], open_page: Open
) -> None:
    assert 500_000 < pages["all"].stat().st_size < 5_000_000
    page = open_page(pages["check"])
    answers = page.evaluate(
        """async () => {
          let blocked = 0;
          document.addEventListener("securitypolicyviolation", () => blocked++);
          const answers = [await new Promise((done) => {
            const image = new Image();
            image.onload = () => done("loaded");
            image.onerror = () => done("refused");
            image.src = "https://example.com/a.png";
          })];
          try { await fetch("https://example.com/"); answers.push("loaded"); }
          catch { answers.push("refused"); }
          try { eval("1"); answers.push("run"); } catch { answers.push("refused"); }
          while (blocked < 3) await new Promise((done) => setTimeout(done, 10));
          return answers;
        }"""
    )
    assert answers == ["refused"] * 3
    assert all("Content Security Policy" in line for line in open_page.noise)
    open_page.noise.clear()


def test_names_of_strangers_are_text(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["check"])
    layers = column(page, "layer")
    assert layers[-6:] == [*HOSTILE[:3], r"a\u2028b\u202ec", *HOSTILE[4:]]
    assert page.locator("td img, td svg, td script").count() == 0


def test_a_chart_answers_the_pointer(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["check"])
    page.locator("svg.marks .mark-rect path").first.hover()
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    text = tooltip.inner_text()
    assert all(part in text for part in ("severity", "error", "findings", "layer"))


def test_the_data_of_a_chart_are_a_table_too(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["check"])
    figure = page.locator("figure").nth(1)
    figure.get_by_text("Data of this chart").click()
    assert figure.locator("th").all_inner_texts() == ["severity", "rule", "findings"]
    assert figure.locator("tbody tr").first.inner_text().split("\t") == ["error", "NW101 rule", "2"]


def test_without_the_library_the_data_are_tables(
    tmp_path: Path, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normwise.pages.render.charts_library", lambda: None)
    checked().save_html(tmp_path / "a.html")
    assert (tmp_path / "a.html").stat().st_size < 60_000
    page = open_page(tmp_path / "a.html")
    assert page.get_by_text(library.HOW_TO_GET_CHARTS).is_visible()
    assert page.locator("figure td").filter(visible=True).count() > 10
    page.get_by_role("button", name="error 2").click()
    assert column(page, "severity") == ["error", "error"]


# Sorting and filtering


def test_a_column_sorts_both_ways_with_nothing_last(
    pages: dict[str, Path], open_page: Open
) -> None:
    page = open_page(pages["check"])
    found = column(page, "severity")
    head(page, "severity").click()
    assert column(page, "severity") == sorted(found, key=["error", "warning", "info"].index)
    head(page, "severity").click()
    assert column(page, "severity")[0] == "info"
    assert page.locator("th.severity").get_attribute("aria-sort") == "descending"
    for _ in range(2):
        head(page, "evidence").click()
        assert column(page, "evidence")[-6:] == [""] * 6


def test_numbers_sort_as_numbers(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["all"])
    for table, name, sign in ((1, "error", 1), (1, "error", -1), (2, "shift before", 1)):
        head(page, name, table).click()
        key = f"fact {name.replace(' ', '_')}"
        numbers = [sign * float(text) for text in column(page, key, table)]
        assert len(numbers) == 3
        assert numbers == sorted(numbers)


def test_rows_are_filtered_by_text_and_by_severity(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["check"])
    count = page.locator("output")
    field = page.get_by_role("searchbox", name="Filter")
    assert count.inner_text() == "10 rows"
    page.get_by_role("button", name="error 2").click()
    page.get_by_role("button", name="warning 2").click()
    assert column(page, "severity") == ["error", "error", "warning", "warning"]
    field.fill("SHARE = 0.25")
    assert column(page, "layer") == ["4"]
    assert count.inner_text() == "1 of 10 rows"
    field.fill("nothing has this")
    assert page.get_by_text("No row matches the filters.").is_visible()
    field.press("Escape")
    assert count.inner_text() == "10 rows"


# Layers


def test_a_layer_leads_from_row_to_chart_to_row(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["all"])
    page.locator("[data-table]").first.locator("td.layer a", has_text=re.compile("^4$")).click()
    assert page.evaluate("location.hash") == "#layer=4"
    assert page.locator("tr.picked").count() == 3  # a finding, fold, recalibration
    bar = page.get_by_role("complementary", name="Picked layer")
    total = int(re.search(r"place \d+ of (\d+)", bar.inner_text())[1])
    assert total == 3 + page.locator("figure").count() - 6  # those with layers
    faint = page.locator("figure").first.locator('.mark-rect path[opacity="0.15"]')
    faint.first.wait_for()
    visited = []
    for _ in range(total):
        bar.get_by_role("button", name="Next place").click()
        visited.append(focused(page, "tagName"))
    assert visited.count("TR") == 3
    bar.get_by_role("button", name="Clear").click()
    assert page.locator("tr.picked").count() == 0
    assert page.evaluate("location.hash") == ""
    faint.first.wait_for(state="detached")


def test_a_mark_leads_to_its_layer(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["check"])
    page.locator("svg.marks .mark-rect path").first.click()
    assert page.evaluate("location.hash") == "#layer=1"
    assert page.locator("tr.picked td.layer").all_inner_texts() == ["1", "1"]


def test_an_address_leads_to_a_layer_of_any_name(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["check"])
    for link in page.locator("[data-table] td.layer a").all()[-len(HOSTILE) :]:
        name = link.inner_text()
        page.evaluate("hash => { location.hash = hash }", link.get_attribute("href"))
        page.wait_for_function("name => window.pageLayers.picked === name", arg=name)
        assert page.locator("tr.picked td.layer").inner_text() == name
        assert "picked" in focused(page, "className")


def test_an_address_and_the_jump_box_open_a_layer(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["check"], "#layer=6")
    assert page.locator("tr.picked td.layer").inner_text() == "6"
    box = page.get_by_role("combobox", name="Layer")
    box.fill("4")
    box.press("Enter")
    assert page.locator("tr.picked td.layer").inner_text() == "4"
    assert "picked" in focused(page, "className")


def test_a_jump_to_a_row_that_is_filtered_out_shows_it(
    pages: dict[str, Path], open_page: Open
) -> None:
    page = open_page(pages["check"])
    page.get_by_role("button", name="error 2").click()
    page.get_by_role("combobox", name="Layer").fill("6")
    page.get_by_role("combobox", name="Layer").press("Enter")
    assert page.locator("tr.picked").is_visible()


def test_a_chart_of_one_layer_at_a_time(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["watch"])
    menu = page.get_by_role("combobox", name="Show layer")
    line = page.locator(".mark-line path").first
    before = line.get_attribute("d")
    menu.select_option("4")
    page.wait_for_function(
        "before => document.querySelector('.mark-area path').getAttribute('d') !== before",
        arg=before,
    )
    assert page.locator(".mark-area path").get_attribute("fill-opacity") == "0.2"


# Keyboard


def test_the_keyboard_is_enough(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["check"])
    press = page.keyboard.press
    press("Tab")
    assert focused(page, "className") == "skip"
    press("Enter")
    assert focused(page, "id") == "main"
    press("/")
    assert focused(page, "className") == "filter"
    page.locator("tbody tr").first.focus()
    press("ArrowDown")
    assert focused(page, "dataset.layer") == "4"
    press("Enter")
    assert page.evaluate("location.hash") == "#layer=4"
    press("End")
    assert focused(page, "dataset.layer") == HOSTILE[-1]
    press("Escape")
    assert page.evaluate("location.hash") == ""
    press("Home")
    assert focused(page, "dataset.layer") == "1"
    assert page.locator('tbody tr[tabindex="0"]').count() == 1


def test_a_chart_is_walked_through_with_the_arrows(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["check"])
    page.locator(".drawing").first.focus()
    for key, layer in (("ArrowRight", "1"), ("ArrowRight", "4"), ("ArrowLeft", "1")):
        page.keyboard.press(key)
        assert page.evaluate("window.pageLayers.picked") == layer
    page.keyboard.press("Enter")
    assert focused(page, "tagName") == "TR"
    assert focused(page, "dataset.layer") == "1"


def test_all_that_can_be_used_has_a_name(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["all"])
    tree = page.locator("body").aria_snapshot()
    roles = "button|searchbox|combobox|link|region|table|navigation"
    used = re.findall(rf"^ *- '?(?:{roles})\b.*", tree, re.MULTILINE)
    assert len(used) > 50
    assert [line for line in used if not re.match(r" *- '?\w+ \"[^\"]", line)] == []
    assert page.get_by_role("heading", level=1).count() == 1


# Light, dark, and a phone


def brightness(page: Any, what: str, of: str = "backgroundColor") -> float:
    color = page.evaluate(f"getComputedStyle(document.querySelector('{what}')).{of}")
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 765


def test_light_and_dark_follow_the_system_and_the_button(
    pages: dict[str, Path], open_page: Open
) -> None:
    page = open_page(pages["check"])
    button = page.get_by_role("button", name="Dark")

    def expect(dark: bool) -> None:
        # The button hears of the system's change a moment later.
        pressed = f'#theme[aria-pressed="{str(dark).lower()}"]'
        page.locator(pressed).wait_for()
        assert (brightness(page, "body") < 0.2) is dark
        # Text of charts goes along.
        assert (brightness(page, "svg.marks text", "fill") > 0.6) is dark

    expect(False)
    page.emulate_media(color_scheme="dark")
    expect(True)
    for dark in (False, True):  # from now on what the button says
        button.click()
        expect(dark)
    page.emulate_media(color_scheme="light")
    expect(True)


def test_a_phone_scrolls_one_way(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["all"], width=360)
    for width in (360, 320):
        page.set_viewport_size({"width": width, "height": 700})
        page.wait_for_function("width => document.documentElement.scrollWidth === width", arg=width)
        # Charts follow a moment later.
        page.wait_for_function(
            "width => [...document.querySelectorAll('td > *, th, svg, h1, p, button, input')]"
            ".every((e) => e.getBoundingClientRect().right <= width + 1)",
            arg=width,
        )
    assert page.locator("td").first.evaluate("e => getComputedStyle(e, '::before').content") == (
        '"severity"'
    )
    head(page, "severity").click()
    assert column(page, "severity")[0] == "error"
