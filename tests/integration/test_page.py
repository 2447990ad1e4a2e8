"""The page at `/` in a real browser, on a real engine that asks for a key."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from pipeline import Pipeline

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DEADLINE_S = 30.0
KEY = "a-key-of-the-test"
QUESTION = "What is the for statement?"
COUNT_TEXTS = """() => {
    window.texts = new Set();
    new MutationObserver(() => {
        const answer = [...document.querySelectorAll(".turn.assistant .text")].at(-1);
        if (answer) window.texts.add(answer.textContent);
    }).observe(document.getElementById("log"), {subtree: true, childList: true, characterData: true});
}"""
ESCAPE_AT_FIRST_TEXT = """() => {
    new MutationObserver((_, observer) => {
        if (!document.querySelector(".turn.assistant .text")?.textContent) return;
        observer.disconnect();
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
    }).observe(document.getElementById("log"), {subtree: true, childList: true, characterData: true});
}"""
CONTRASTS = """() => {
    const channel = value => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const light = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).map(Number);
        return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    };
    const backdrop = element => {
        for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (!/^rgba\\(.*, 0\\)$/.test(colour)) return colour;
        }
        return "rgb(255, 255, 255)";
    };
    const hasText = e => [...e.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    const texts = [...document.querySelectorAll("body *:not(script)")].filter(
        e => e.offsetWidth && hasText(e) && !e.closest(".hidden-text, .skip, :disabled"));
    return texts.map(e => {
        const [a, b] = [light(getComputedStyle(e).color), light(backdrop(e))].sort((x, y) => y - x);
        return [`${e.tagName} ${e.className} ${e.textContent.trim().slice(0, 30)}`, (a + 0.05) / (b + 0.05)];
    });
}"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY + "\n")
    keys.chmod(0o600)
    config = Path(__file__).parents[2] / "configs" / "tiny.toml"
    with Pipeline(str(config), {"http.api_key_file": str(keys)}) as pipeline:
        assert pipeline.http_url is not None
        yield pipeline.http_url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # The sandbox of Chromium does not work for root, as which CI runs.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Visit:
    """The open page, and what the browser reported about it."""

    page: Page
    messages: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)  # of chat requests

    def give_key(self) -> None:
        self.page.get_by_text("Settings").click()
        self.page.get_by_label("API key").fill(KEY)

    def ask(self, text: str) -> None:
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def expect_answers(self, count: int) -> None:
        expect(self.page.locator(".turn.assistant .facts")).to_have_count(count, timeout=DEADLINE_S * 1e3)


@pytest.fixture
def visit(url: str, browser: Browser) -> Iterator[Callable[..., Visit]]:
    contexts = []

    def open_page(**settings: Any) -> Visit:
        context = browser.new_context(**settings)
        contexts.append(context)
        visit = Visit(context.new_page())

        def on_console(message: ConsoleMessage) -> None:
            visit.messages.append(f"{message.type}: {message.text}")

        def on_request(request: Any) -> None:
            visit.addresses.append(request.url)
            if request.method == "POST":
                visit.bodies.append(json.loads(request.post_data))

        visit.page.on("console", on_console)
        visit.page.on("pageerror", lambda error: visit.messages.append(str(error)))
        visit.page.on("request", on_request)
        visit.page.goto(url)
        expect(visit.page.locator("#state")).to_have_text("ready", timeout=DEADLINE_S * 1e3)
        return visit

    yield open_page
    for context in contexts:
        context.close()


def eventually(condition: Callable[[], bool], page: Page) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        page.wait_for_timeout(50)  # runs the browser's events


def test_a_chat_streams_and_the_curves_and_the_timeline_move(url: str, visit: Callable[..., Visit]) -> None:
    opened = visit()
    page = opened.page
    opened.give_key()
    page.evaluate(COUNT_TEXTS)
    opened.ask(QUESTION)
    opened.expect_answers(1)
    answer = page.locator(".turn.assistant .text").inner_text()
    assert answer
    texts = page.evaluate("[...window.texts]")
    assert len(texts) > 3
    assert all(answer.startswith(text.strip()) for text in texts), "the answer only ever grows"

    tokens = page.locator(".panel", has_text="Tokens per second")
    curve = tokens.locator("path").last
    expect(curve).to_have_attribute("d", re.compile("L"), timeout=DEADLINE_S * 1e3)
    earlier = curve.get_attribute("d")
    opened.ask("And the while statement?")
    expect(tokens.locator(".value")).not_to_have_text(re.compile("^0 "), timeout=DEADLINE_S * 1e3)
    expect(curve).not_to_have_attribute("d", earlier or "", timeout=DEADLINE_S * 1e3)
    for title in ("Sequences", "KV cache", "The device's time", "CPU by process"):
        expect(page.locator(".panel", has_text=title).locator("path").first).to_be_attached()
    expect(page.locator("#summary")).to_contain_text(re.compile(r"\d+ steps\. The device computes"))
    opened.expect_answers(2)

    assert [message["role"] for message in opened.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert opened.bodies[1]["messages"][1]["content"].strip() == answer.strip()
    assert opened.messages == []
    assert all(address.startswith((url, "data:")) for address in opened.addresses)


def test_a_key_is_asked_for_in_words_and_the_question_can_be_sent_again(visit: Callable[..., Visit]) -> None:
    opened = visit()
    opened.ask(QUESTION)
    expect(opened.page.get_by_role("alert")).to_contain_text("The server needs a key")
    expect(opened.page.get_by_label("API key")).to_be_focused()
    opened.page.keyboard.type(KEY)
    opened.page.get_by_role("button", name="Try again").click()
    opened.expect_answers(1)
    expect(opened.page.get_by_role("alert")).to_have_count(0)
    assert len(opened.bodies[1]["messages"]) == 1


def test_a_refusal_is_shown_in_words_and_does_not_end_the_chat(visit: Callable[..., Visit]) -> None:
    opened = visit()
    opened.give_key()
    opened.page.get_by_label("Temperature").fill("9")
    opened.ask(QUESTION)
    expect(opened.page.get_by_role("alert")).to_contain_text("The server refused the request. (400: temperature")
    opened.page.get_by_label("Temperature").fill("0")
    opened.ask("What is a list?")
    opened.expect_answers(1)
    assert [message["content"] for message in opened.bodies[1]["messages"]] == ["What is a list?"]


def test_the_page_says_that_the_engine_does_not_answer_and_goes_on_when_it_does(visit: Callable[..., Visit]) -> None:
    page = visit().page
    page.route("**/live?*", lambda route: route.abort())
    expect(page.locator("#state")).to_have_text("no answer", timeout=DEADLINE_S * 1e3)
    page.unroute("**/live?*")
    expect(page.locator("#state")).to_have_text("ready", timeout=DEADLINE_S * 1e3)


def test_everything_works_with_the_keyboard_alone(visit: Callable[..., Visit]) -> None:
    opened = visit()
    page, keyboard = opened.page, opened.page.keyboard
    keyboard.press("Tab")
    expect(page.get_by_text("Skip to the chat")).to_be_focused()
    keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    stops = []
    while not page.locator("#canvas").evaluate("e => e === document.activeElement"):
        keyboard.press("Tab")
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        stops.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert style != "none", f"the focus on {stops[-1]} cannot be seen"
        assert len(stops) < 60, stops
        if stops[-1] == "Settings":
            keyboard.press("Space")
        if stops[-1] == "key":
            keyboard.type(KEY)
    assert {"send", "temperature", "key", "follow"} <= set(stops)

    page.get_by_label("Message", exact=True).focus()
    keyboard.type(QUESTION)
    keyboard.press("Enter")
    opened.expect_answers(1)
    page.locator("#canvas").focus()
    eventually(lambda: keyboard.press("ArrowLeft") is None and page.locator("#step-tip").is_visible(), page)
    expect(page.locator("#step-text")).to_contain_text(re.compile(r"Step \d+: .* on the device"))
    shown = page.locator("#canvas").get_attribute("aria-label") or ""
    assert re.fullmatch(r"Timeline of steps, .* shown", shown)
    keyboard.press("+")
    expect(page.locator("#canvas")).not_to_have_attribute("aria-label", shown)
    keyboard.press("-")
    expect(page.locator("#canvas")).to_have_attribute("aria-label", shown)
    keyboard.press("Escape")
    expect(page.locator("#follow")).to_have_attribute("aria-pressed", "true")
    plot = page.locator(".plot").first
    plot.focus()
    eventually(lambda: keyboard.press("ArrowLeft") is None and plot.locator(".tip").is_visible(), page)
    expect(plot.locator(".tip")).to_contain_text("s ago")


def test_escape_stops_an_answer_keeps_its_text_and_frees_the_engine(url: str, visit: Callable[..., Visit]) -> None:
    opened = visit()
    page = opened.page
    opened.give_key()
    page.evaluate(ESCAPE_AT_FIRST_TEXT)
    opened.ask(QUESTION)
    opened.expect_answers(1)
    expect(page.locator(".facts")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert page.locator(".turn.assistant .text").inner_text()
    eventually(lambda: page.request.get(f"{url}/live").json()["gauges"]["num_running"] == 0, page)
    assert page.request.get(f"{url}/live").json()["counters"]["num_cancelled"] >= 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_in_one_direction_and_text_has_contrast(scheme: str, visit: Callable[..., Visit]) -> None:
    opened = visit(viewport={"width": 320, "height": 640}, color_scheme=scheme, reduced_motion="reduce")
    page = opened.page
    opened.give_key()
    opened.ask("What_is_a_very_long_word_without_a_single_space_that_no_line_of_a_phone_can_hold?")
    opened.expect_answers(1)
    for tab in ("curl", "Python", "JavaScript"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") == 320
    assert page.evaluate("(log => log.scrollWidth - log.clientWidth)(document.getElementById('log'))") == 0
    faint = [text for text, contrast in page.evaluate(CONTRASTS) if contrast < 4.5]
    assert not faint
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 150) == (scheme == "dark")
    assert opened.messages == []


def test_examples_have_the_address_and_the_model_and_can_be_copied(url: str, visit: Callable[..., Visit]) -> None:
    opened = visit(permissions=["clipboard-read", "clipboard-write"])
    page = opened.page
    page.get_by_role("tab", name="curl").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Python")).to_have_attribute("aria-selected", "true")
    page.get_by_role("button", name="Copy").click()
    expect(page.locator("#copied")).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    compile(copied, "example", "exec")
    assert f'base_url="{url}/v1"' in copied
    assert 'model="tiny-model"' in copied
    assert 'os.environ["RINGFEED_API_KEY"]' in copied
    assert KEY not in copied
