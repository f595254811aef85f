"""The page of `cuconv profile --html`: a file of its own, in which names stay text; and what a browser makes of it."""

import base64
import contextlib
import hashlib
import html.parser
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from cuconv import cli, layers, models, profiling
from cuconv.plan.devices import DEVICES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
H200 = DEVICES["H200"]

EVIL = "<script>document.title='broken'<img src=x onerror=alert(1)>"
ODD = "é & \"quotes' `${1+1}` @DATA@ \u2028 ]]>"


def model():
    """Three layers whose order by name, time and work differ, and names that would like to be markup."""
    x = models.Input((512, 64), name="x")
    y = layers.Conv1D(64, 9, padding="same", name="m large")(x)
    y = layers.ZeroPadding1D(1, name="z pad")(y)
    y = layers.Conv1D(8, 1, activation="softmax", name=EVIL)(y)
    return models.Model(x, layers.DepthwiseConv1D(3, name="a depthwise")(y), name=ODD)


@pytest.fixture(scope="module")
def report():
    return profiling.profile(model(), [(16, 512, 64)], H200)


@pytest.fixture(scope="module")
def page(report):
    return profiling.page(report)


# --- The text ----------------------------------------------------------------------------------------------------


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and the text in each kind of element."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.inside = [], {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data):
        self.texts.setdefault(self.inside, []).append(data)

    def handle_endtag(self, tag):
        self.inside = None


def test_names_stay_text(page, report):
    found = Elements(page)
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert not [tag for tag, _ in found.tags if tag in ("img", "iframe", "object", "embed", "form", "a")]
    assert found.texts["title"] == [f"{ODD}: predicted for H200, cuconv profile"]
    data, _ = found.texts["script"]
    assert json.loads(data) == json.loads(json.dumps(report)) and "<" not in data
    assert [row["name"] for row in json.loads(data)["layers"]] == ["m large", "z pad", EVIL, "a depthwise"]


@pytest.mark.parametrize(
    "text", ["</script><script>x", "<!--<script>", "]]></script >", "<!doctype html>", "@POLICY@@TITLE@"]
)
def test_no_text_ends_the_data(report, text):
    """Whatever stands in a name, a reason or a device, it comes back from the page as it went in."""
    for key in ("model", "device"):
        found = Elements(profiling.page({**report, key: text}))
        assert json.loads(found.texts["script"][0])[key] == text
        assert len([tag for tag, _ in found.tags if tag == "script"]) == 2
        assert text in found.texts["title"][0]


def test_numbers_that_json_does_not_know_are_refused(report):
    with pytest.raises(ValueError, match="not JSON compliant"):
        profiling.page({**report, "seconds": np.inf})


def test_the_policy_names_the_style_and_the_script_and_nothing_else(page):
    found = Elements(page)
    (policy,) = [a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]

    def digest(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert dict(part.split(" ", 1) for part in policy.split("; ")) == {
        "default-src": "'none'",
        "style-src": digest("".join(found.texts["style"])),
        "script-src": digest(found.texts["script"][1]),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    place = [dict(a) for _, a in found.tags]
    first = next(i for i, each in enumerate(place) if each.get("http-equiv"))
    assert first < next(i for i, (tag, _) in enumerate(found.tags) if tag in ("style", "script", "link"))


def test_the_page_names_no_other_file(page):
    found = Elements(page)
    addresses = [a[key] for _, a in found.tags for key in ("src", "href", "data", "action") if key in a]
    assert addresses == ["data:,"], "the icon, which a browser would look for otherwise"
    without_data = page.replace(found.texts["script"][0], "")
    assert re.findall(r"(?:https?:)?//[\w.]+", without_data) == ["http://www.w3.org"], "the name of SVG's elements"
    assert not re.search(r"url\(|@import|\bfetch\b|XMLHttp|WebSocket|innerHTML|\beval\b|document\.write", without_data)
    assert not re.search(r"\son\w+=|\sstyle=", without_data), "the policy would refuse it"


def test_the_command_writes_the_page_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model().save("model.npz")
    command = ["profile", "model.npz", "--batch-size", "16", "--device", "H200", "--html", "page.html"]
    assert cli.main(command) == 0
    whole = Path("page.html").read_text(encoding="utf-8")
    assert whole.startswith("<!doctype html>") and whole.rstrip().endswith("</html>") and "@DATA@" not in whole[:400]
    assert sorted(os.listdir()) == ["model.npz", "page.html"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(command) == 1
    assert "page.html cannot be written: No space left" in capsys.readouterr().err
    assert Path("page.html").read_text(encoding="utf-8") == whole and len(os.listdir()) == 2


# --- In a browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium that may not reach anything, with its logs."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (CHROMIUM and DRIVER):
        pytest.skip("Chromium or chromedriver is not installed")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
        "--window-size=1280,1000",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def files(report, tmp_path_factory):
    """Pages by name: what is predicted, what is measured on a CPU, and a model of one view."""
    folder = tmp_path_factory.mktemp("pages")
    x = models.Input((9, 3), name="x")
    view = models.Model(x, layers.Activation("linear", name="linear")(x), name="view")
    reports = {
        "predicted": report,
        "measured": profiling.profile(model(), [(2, 512, 64)], H200, "cpu", 10),
        "view": profiling.profile(view, [(2, 9, 3)], H200),
        "many": {**report, "layers": [{**report["layers"][i % 4], "number": i + 1} for i in range(400)]},
    }
    for name, each in reports.items():
        (folder / f"{name}.html").write_text(profiling.page(each), encoding="utf-8")
    return {name: (folder / f"{name}.html", each) for name, each in reports.items()}


@contextlib.contextmanager
def opened(browser, path):
    """The page, and afterwards: no message on the console, nothing asked for but the page itself."""
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(path.as_uri())
    yield
    assert browser.get_log("browser") == []
    messages = [json.loads(each["message"])["message"] for each in browser.get_log("performance")]
    requests = [each["params"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    # The browser's own start page may still be asking for its parts.
    asked = {each["request"]["url"] for each in requests if not each["documentURL"].startswith("chrome")}
    assert asked <= {path.as_uri(), "data:,"} and path.as_uri() in asked


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def names(browser):
    texts = "return [...document.querySelectorAll('tr.row td.name b')].map((each) => each.textContent)"
    return browser.execute_script(texts)


def header(browser, title):
    return next(each for each in find(browser, "th") if each.text.replace("\n", " ").startswith(title))


@pytest.mark.parametrize("name", ["predicted", "measured", "view", "many"])
def test_the_page_shows_every_layer_without_asking_for_anything(browser, files, name):
    path, told = files[name]
    with opened(browser, path):
        assert names(browser) == [row["name"] for row in told["layers"]]
        assert find(browser, "h1")[0].get_attribute("textContent") == told["model"]
        assert told["model"] in browser.execute_script("return document.title")
        word = f"{told['timing']} {'on' if name == 'measured' else 'for'} {told['device']}"
        assert find(browser, "#source")[0].text == word
        assert len(find(browser, ".strip button")) == len(told["layers"])
        with_work = [row for row in told["layers"] if row["flops"]]
        assert len(find(browser, "#roofline circle")) == len(with_work)
        heading = find(browser, "#roofline h2")[0].text
        assert heading == "Roofline of H200: predicted", "a CPU's times lie under no roof of a GPU"
        text = find(browser, "main")[0].get_attribute("textContent")
        assert not re.search(r"NaN|Infinity|∞|undefined|\[object", text)


def test_a_measured_page_labels_every_time(browser, files):
    path, _ = files["measured"]
    with opened(browser, path):
        titles = [each.text.replace("\n", " ").strip(" ↕↑↓\u00a0") for each in find(browser, "th")]
        assert "Time, measured" in titles and "On H200, predicted" in titles and "Of roof" not in titles
        for figure in find(browser, ".figure"):
            assert any(word in figure.text for word in ("measured", "predicted")) or "FLOP" in figure.text


def test_columns_sort(browser, files):
    path, told = files["predicted"]
    rows = {row["name"]: row for row in told["layers"]}
    with opened(browser, path):
        for title, key in (("Time", "seconds"), ("Work", "flops"), ("Data", "bytes"), ("Of roof", "share_of_roof")):
            for direction, sign in (("descending", -1), ("ascending", 1)):
                header(browser, title).find_element("css selector", "button").click()
                assert header(browser, title).get_attribute("aria-sort") == direction
                assert len(find(browser, "th[aria-sort]")) == 1
                expected = sorted(rows, key=lambda name: (sign * rows[name][key], rows[name]["number"]))
                assert names(browser) == expected, title
        header(browser, "Layer").find_element("css selector", "button").click()
        assert names(browser) == [EVIL, "a depthwise", "m large", "z pad"]
        header(browser, "#").find_element("css selector", "button").click()
        assert names(browser) == list(rows)


def test_a_click_on_a_row_shows_its_plan(browser, files):
    path, told = files["predicted"]
    with opened(browser, path):
        assert not find(browser, "tr.plan")
        row = find(browser, "tr.row")[0]
        row.click()
        (plan,) = find(browser, "tr.plan")
        step = told["layers"][0]["steps"][0]
        for fact in (step["kernel"], step["tile"], f"{step['threads']} threads", step["reason"], *step["rejected"]):
            assert fact in plan.text, fact
        assert step["rejected"] and f"{step['registers']}" in plan.text and "predicted" in plan.text
        assert row.get_attribute("aria-expanded") == "true"
        header(browser, "Layer").find_element("css selector", "button").click()
        after = find(browser, "#rows > tr")
        assert after[after.index(row) + 1] == plan, "a plan stays below its row"
        row.click()
        assert not find(browser, "tr.plan") and row.get_attribute("aria-expanded") == "false"
        find(browser, "tr.row")[1].send_keys("\ue007")  # Enter
        assert len(find(browser, "tr.plan")) == 1


@pytest.mark.parametrize("selector", [".strip button", "#roofline circle"])
def test_the_pictures_lead_to_the_row(browser, files, selector):
    path, told = files["predicted"]
    first, largest = told["layers"][0], max(told["layers"], key=lambda row: row["seconds"] * (row["flops"] > 0))
    with opened(browser, path):
        part = find(browser, selector)[0]  # circles are drawn from the largest on, so that none is hidden
        browser.execute_script("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", part)
        (plan,) = find(browser, "tr.plan")
        expected = (first if "strip" in selector else largest)["name"]
        assert plan.is_displayed() and expected in browser.switch_to.active_element.text
        assert browser.execute_script("return document.activeElement.nextSibling === arguments[0]", plan)


def test_markup_in_a_name_does_nothing(browser, files):
    """Neither does a script that is put into the page afterwards: the policy holds."""
    path, _ = files["predicted"]
    with opened(browser, path):
        assert EVIL in names(browser)
        assert not find(browser, "main img") and not find(browser, "main script")
        assert browser.execute_script("return document.title").startswith("é & ")
    browser.get(path.as_uri())
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s);"
        "const i = new Image(); i.src = 'http://localhost:9/x.png'; document.body.append(i);"
    )
    assert browser.execute_script("return window.broken") is None
    refused = [each["message"] for each in browser.get_log("browser")]
    assert len([each for each in refused if "Content Security Policy" in each]) == 2


READABLE = ("h1", ".lead", "p.dim", "td.right", ".side", "td code", "#source", ".why", "th button", ".strip button")


@pytest.mark.parametrize("name", ["predicted", "measured"])
def test_both_colour_schemes(browser, files, name, tmp_path):
    """Each is readable: the contrast of text to its ground; and the page fits the window."""
    path, _ = files[name]
    shots = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        with opened(browser, path):
            find(browser, "tr.row")[0].click()
            shots[scheme] = tmp_path / f"{scheme}.png"
            assert browser.save_screenshot(str(shots[scheme])) and shots[scheme].stat().st_size > 10_000
            assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
            table = "const t = document.getElementById('layers').parentElement; return t.scrollWidth - t.clientWidth"
            assert browser.execute_script(table) == 0, "all columns at 1280 pixels"
            for selector in READABLE:
                for element in find(browser, selector):
                    assert contrast(*colours(browser, element)) >= 4.5, (scheme, selector)
    assert shots["light"].read_bytes() != shots["dark"].read_bytes()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def colours(browser, element):
    """The text's colour, and the first ground behind it."""
    return browser.execute_script(
        """let e = arguments[0]; const text = getComputedStyle(e).color; let ground;
        do { ground = getComputedStyle(e).backgroundColor; e = e.parentElement; } while (/, 0\\)$/.test(ground) && e);
        return [text, ground];""",
        element,
    )


def contrast(*both):
    """WCAG's ratio of two colours."""
    light = []
    for colour in both:
        rgb = np.array([float(each) for each in re.findall(r"[\d.]+", colour)[:3]]) / 255
        light.append(np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722))
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_a_narrow_window_scrolls_inside(browser, files):
    path, _ = files["predicted"]
    metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        with opened(browser, path):
            find(browser, "tr.row")[0].click()
            time.sleep(0.1)
            assert browser.execute_script("return document.documentElement.scrollWidth <= 400")
            plan = "return document.querySelector('.inside').getBoundingClientRect().width"
            assert browser.execute_script(plan) <= 400
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
