"""The page of a report: what a model wrote stays text, nothing is loaded, filters work, and it can be read anywhere."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

from nested_reft.reports.page import MOST_SAMPLES, MOST_TEXT, embedded, page
from nested_reft.reports.run_charts import run_charts
from nested_reft.reports.run_files import read_run
from tests.reports.browser import Browser, chromium
from tests.reports.runs_on_disk import ATTACKS, line, sample, write_run


def page_of(*paths: Path) -> str:
    runs = [read_run(path) for path in paths]
    return page(runs, run_charts(runs))


def hostile_run(path: Path) -> Path:
    """Samples of three steps; all names and texts try to get out of where they stand."""
    samples = [
        sample(step, f"{text} {step}", source=text if index else "sums", accuracy=index % 2, answer=text, stop=text)
        for step in (1, 2, 3)
        for index, text in enumerate(ATTACKS)
    ]
    names = {f"{prefix}{text}": 0.5 for prefix in ("heldout/", "reward/") for text in ATTACKS}
    names |= {f"curriculum/{text}/probability": 0.5 for text in ATTACKS}
    lines = [line(step, warning=ATTACKS[1], curriculum_audit=ATTACKS[0], **names) for step in range(1, 31)]
    config = {"name": ATTACKS[1], "model": {ATTACKS[0]: ATTACKS[1]}}
    return write_run(path, lines, samples, config=config, versions={"device": ATTACKS[0]}, summary={"steps": 30})


def data_of(text: str):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_nothing_that_a_model_wrote_is_markup(tmp_path):
    """There are two script elements, the data and the program, and no tag that an attack brought."""
    text = page_of(hostile_run(tmp_path / "run"))
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text and "<!--" not in text and not {"\x1b", "\u202e"} & set(text)
    shown = {what: words for what, words in data_of(text)["samples"][1]["texts"]}
    assert shown == {"prompt": "2 + 2 =", "right answer": ATTACKS[1], "sample": f"{ATTACKS[1]} 1"}


@pytest.mark.parametrize("text", [*ATTACKS, "\u2028\u2029", "]]>&lt;", '"\\', "\ud800"])
def test_embedded_data_is_read_back_and_cannot_end_its_element(text):
    written = embedded({"text": [text]})
    assert json.loads(written) == {"text": [text]}
    assert not set("<>&\u2028\u2029") & set(written)


def test_the_policy_allows_the_pages_own_script_and_style_alone(tmp_path):
    text = page_of(hostile_run(tmp_path / "run"))
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    assert policy is not None and text.index("Content-Security-Policy") < text.index("<title>")
    rules = dict(rule.split(" ", 1) for rule in policy[1].split("; "))
    assert rules.pop("default-src") == "'none'" and "unsafe" not in policy[1]
    for rule, pattern in (("script-src", r"<script>(.*?)</script>"), ("style-src", r"<style>(.*?)</style>")):
        (content,) = re.findall(pattern, text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules.pop(rule) == f"'sha256-{digest}'"
    assert all(value in ("'none'", "'script'") for value in rules.values())
    # An attribute of style or of an event would need a policy that allows it for everybody.
    markup = re.sub(r'"[^"]*"', "", text.split("<body>")[1].split("<script")[0])
    assert not re.search(r"<[^>]*\s(style|on\w+)=", markup)


def test_its_size_is_bounded(tmp_path):
    long = "x" * (10 * MOST_TEXT)
    samples = [sample(step, long if step == 1 else "4") for step in range(1, 2 * MOST_SAMPLES)]
    text = page_of(write_run(tmp_path / "run", [line(1)], samples))
    assert len(data_of(text)["samples"]) == MOST_SAMPLES
    assert f"This page holds 1,000 of {2 * MOST_SAMPLES - 1:,} logged samples" in text
    assert f"and {9 * MOST_TEXT} more characters" in text and len(text) < 2_000_000


def test_samples_of_one_step_and_version_stand_together(tmp_path):
    """Replay mixes versions."""
    samples = [sample(2, version=version) for version in (1, 0, 1, 0)]
    shown = data_of(page_of(write_run(tmp_path / "run", [line(2)], samples)))["samples"]
    assert [each["version"] for each in shown] == [0, 0, 1, 1]


def test_a_run_with_nothing_in_it_has_a_page(tmp_path):
    text = page_of(write_run(tmp_path / "run", [], config={}))
    assert "No step has been logged yet" in text and "<figure" not in text and 'id="samples"' not in text


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = chromium()
    if program is None:
        pytest.skip("needs Chromium, which is not installed")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("page")
    path = directory / "report.html"
    path.write_text(page_of(hostile_run(directory / "run")), encoding="utf-8")
    return path.as_uri()


def texts(browser) -> list[str]:
    return browser.run("[...document.querySelectorAll('#list pre:last-of-type')].map(each => each.textContent)")


def test_a_malicious_completion_stays_text_and_nothing_is_loaded(browser, address):
    events = browser.open(address)
    assert browser.run("document.title") == "run: report"
    assert texts(browser)[:2] == [f"{ATTACKS[0]} 1", f"{ATTACKS[1]} 1"] and len(texts(browser)) == 12
    assert browser.run("document.querySelectorAll('img, iframe, object, link, [onerror]').length") == 0
    assert browser.run("document.scripts.length") == 2
    requests = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
    assert requests == [address]
    assert not [each for each in events if each["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]


def test_what_got_into_the_page_all_the_same_would_not_run(browser, tmp_path):
    """The policy is the second wall: markup that a mistake let through finds no way to act or to load."""
    text = page_of(hostile_run(tmp_path / "run"))
    inside = (
        "<script>window.ran = 1</script><style>body { display: none }</style><iframe src='data:text/html,'></iframe>"
    )
    inside += "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw=' onload='window.ran = 1' onerror='window.ran = 1'>"
    path = tmp_path / "report.html"
    path.write_text(text.replace("<body>", f"<body>{inside}"), encoding="utf-8")
    events = browser.open(path.as_uri())
    assert browser.run("typeof window.ran") == "undefined"
    assert browser.run("getComputedStyle(document.body).display") == "block"
    assert browser.run("document.querySelector('img').naturalWidth") == 0
    # It is this policy that refuses, and the page's own script goes on.
    refused = [each["params"]["entry"]["text"] for each in events if each["method"] == "Log.entryAdded"]
    assert len(refused) >= 4 and all("Content Security Policy" in each for each in refused)
    assert len(texts(browser)) == 12


@pytest.mark.parametrize(
    ("hash", "number"),
    [
        ("", 12),
        ("#wrong", 6),
        ("#verdict=right", 6),
        ("#step=2", 4),
        ("#from=2&to=3&verdict=wrong", 4),
        ("#source=sums", 3),
        ("#text=%3C%2FSCRIPT", 3),
        ("#text=nothing+of+the+kind", 0),
        ("#curves", 12),
    ],
)
def test_filters_stand_in_the_address(hash, number, browser, address):
    browser.open(address + hash)
    assert len(texts(browser)) == number
    assert browser.run("document.getElementById('count').textContent") == f"{number} of 12 samples fit."


def test_filters_can_be_typed(browser, address):
    """And the address follows, so that it can be passed on."""
    browser.open(address)
    browser.run("document.getElementById('filter-verdict').value = 'wrong'")
    browser.run("document.getElementById('filter-verdict').dispatchEvent(new Event('input'))")
    assert len(texts(browser)) == 6 and browser.run("location.hash") == "#verdict=wrong"
    headings = browser.run("[...document.querySelectorAll('#list h3')].map(each => each.textContent)")
    assert headings == [f"step {step}, policy version {step - 1}" for step in (1, 2, 3)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400, 320])
def test_it_can_be_read_in_light_and_dark_and_in_a_narrow_window(width, scheme, browser, address):
    """Nothing is wider than the window, letters of figures have 8 pixels or more, and ink differs from paper."""
    browser.open(address, width, scheme)
    assert browser.run("document.documentElement.scrollWidth") <= width
    letters = "document.querySelector('figure svg[role=img]').getBoundingClientRect().width / 480 * 12"
    assert browser.run(letters) >= (8 if width >= 400 else 6)
    for element in ("body", ".warnings", ".sample .facts", "figcaption"):
        assert contrast(browser, element) >= 4.5, element


def contrast(browser, element: str) -> float:
    """Of an element's letters and what is behind them, as WCAG 2 defines it."""
    colours = browser.run(f"""(() => {{
        let place = document.querySelector({element!r}); const ink = getComputedStyle(place).color;
        while (getComputedStyle(place).backgroundColor === "rgba(0, 0, 0, 0)") place = place.parentElement;
        return [ink, getComputedStyle(place).backgroundColor]; }})()""")
    light, dark = sorted(map(luminance, colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_page_of_several_runs_tells_them_apart(browser, tmp_path):
    first = write_run(tmp_path / "one", [line(1)], [sample(1)], config={"train": {"seed": 1}})
    second = write_run(tmp_path / "two", [line(1)], [sample(1), sample(1)], config={"train": {"seed": 2}})
    path = tmp_path / "report.html"
    path.write_text(page_of(first, second), encoding="utf-8")
    browser.open(f"{path.as_uri()}#run=1")
    assert len(texts(browser)) == 2
    assert browser.run("document.querySelector('#list h3').textContent") == "two, step 1, policy version 0"
    cells = browser.run("[...document.querySelectorAll('tbody tr')].map(each => each.innerText.split('\\t'))")
    assert cells == [["train.seed", "1", "2"]]
