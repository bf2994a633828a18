"""The playground in a real browser, against the real server."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.browser import CHROMIUM, DRIVER, ENTER, ESCAPE, RIGHT, TAB, Browser, browse
from tests.server.live import KEY, LOOPS, Live
from tests.server.playground_page import CONTRASTS, SCROLLED_ABOVE_QUESTION, SLIDE, TOKENS, ask

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER) and os.environ.get("CI") != "true",
        reason="needs chromium and chromedriver",
    ),
]

EASY = "Who are you?"
HARD = "What is 904821 + 583397?"
A, B = ".pane:nth-child(1)", ".pane:nth-child(2)"
AA = 4.5
"""WCAG's least contrast of text to what is behind it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browse() as opened:
        opened.resize(1280, 800)
        yield opened


@pytest.fixture
def page(browser: Browser, live: Live) -> Browser:
    """The playground, connected, as a visitor finds it who has typed the key before."""
    browser.open(f"{live.url}/playground")
    browser.script("sessionStorage.setItem('ouro-key', arguments[0]); localStorage.clear()", KEY)
    browser.open(f"{live.url}/playground")
    browser.until("connects", "#model", lambda text: live.model in text)
    # The visit without the key has been refused, which the console notes.
    browser.errors()
    return browser


def asked_of_api(live: Live, question: str, **depth: Any) -> Any:
    return live.client.chat.completions.create(
        model=live.model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        extra_body={"return_depths": True, "return_exit_cdf": True, **depth},
    )


def inspected(page: Browser) -> list[str]:
    """The numbers of the inspector's rows, one per loop."""
    return page.script(
        "return [...document.querySelectorAll('#inspector .cdf .value')].map((v) => v.innerText)"
    )


def words(page: Browser) -> list[str]:
    """What the inspector's loops would say, one per loop that ran."""
    shown = "return [...document.querySelectorAll('#inspector .word code')].map((v) => v.innerText)"
    return page.script(shown)


def said(loops: list[list[dict[str, Any]]]) -> list[str]:
    return [json.dumps(guesses[0]["token"]) for guesses in loops]


def test_the_page_needs_no_key_and_the_api_behind_it_does(browser: Browser, live: Live) -> None:
    browser.open(f"{live.url}/playground")
    browser.script("sessionStorage.clear()")
    browser.open(f"{live.url}/playground")
    browser.until("asks for a key", "#notice", lambda text: "asks for an API key" in text)
    browser.press("wrong" + ENTER)
    browser.until("refuses", "#notice", lambda text: "refused this API key" in text)
    browser.press("\ue003" * len("wrong") + KEY + ENTER)
    browser.until("connects", "#model", lambda text: live.model in text)
    assert browser.text("#notice") == ""


def test_everything_comes_from_the_server_itself(page: Browser, live: Live) -> None:
    ask(page, EASY)
    loaded = page.script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert any(name.endswith("/playground/page.js") for name in loaded)
    assert [name for name in loaded if not name.startswith(live.url)] == []
    assert page.errors() == []
    policy = live.http.get("/playground").headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")


def test_tokens_stream_and_are_coloured_by_the_depths_of_the_api(page: Browser, live: Live) -> None:
    page.script(
        "window.seen = new Set(); new MutationObserver(() => window.seen.add("
        "document.querySelectorAll('.token').length)).observe("
        "document.querySelector('.talk'), {childList: true, subtree: true})"
    )
    page.script(SLIDE, A, {"exit_threshold": 0.5})
    ask(page, EASY)
    assert page.script("return window.seen.size") > 3
    ask_hard = asked_of_api(live, HARD, exit_threshold=0.5).choices[0]
    page.click("#clear")
    ask(page, HARD)
    tokens = page.script(TOKENS, A)
    assert [token["depth"] for token in tokens] == ask_hard.depths
    colours = {(token["depth"], token["colour"]) for token in tokens}
    assert len(colours) == len(set(ask_hard.depths)) == len({colour for _, colour in colours}) > 1
    assert ask_hard.message.content in page.text(f"{A} .answer").replace("\n", "")


def test_pointer_and_keyboard_both_show_how_a_token_left(page: Browser, live: Live) -> None:
    page.script(SLIDE, A, {"exit_threshold": 0.5})
    ask(page, HARD)
    choice = asked_of_api(live, HARD, exit_threshold=0.5, logprobs=True, return_loops=2).choices[0]
    rows = [
        [*(f"{value:.3f}" for value in cdf), *["not run"] * (LOOPS - len(cdf))]
        for cdf in choice.exit_cdf
    ]
    page.hover(f"{A} .token:nth-of-type(1)")
    shown = page.until("hovers", "#inspector", lambda text: "Depth" in text)
    assert f"Depth {choice.depths[0]} of {LOOPS} · probability" in shown
    assert inspected(page) == rows[0]
    assert words(page) == said(choice.loops[0])
    page.hover("#model")
    page.until("leaves", "#inspector", lambda text: not text)

    page.script("document.querySelector('.talk').focus()")
    page.press(TAB)
    page.press(RIGHT)
    shown = page.until("focuses", "#inspector", lambda text: "Depth" in text)
    assert f"Depth {choice.depths[1]} of {LOOPS}" in shown
    assert inspected(page) == rows[1]
    assert words(page) == said(choice.loops[1])
    page.press(ESCAPE)
    assert page.text("#inspector") == ""


def test_two_settings_answer_side_by_side(page: Browser, live: Live) -> None:
    page.click("#compare")
    page.script(SLIDE, A, {"exit_threshold": 1, "exit_mode": "skip"})
    page.script(SLIDE, B, {"exit_threshold": 0.2})
    ask(page, HARD)
    means = []
    for pane, threshold in ((A, 1), (B, 0.2)):
        answer = asked_of_api(live, HARD, exit_threshold=threshold, exit_mode="skip")
        assert [token["depth"] for token in page.script(TOKENS, pane)] == answer.choices[0].depths
        means.append(page.text(f"{pane} [data-value=mean]"))
        assert means[-1] == f"{answer.usage.depth['mean']:.2f}"
        told = page.script(f"return document.querySelector('{pane} .histogram').ariaLabel")
        counted = {d: int(n) for d, n in re.findall(r"depth (\d): (\d+)", told)}
        assert counted == answer.usage.depth["histogram"]
    assert float(means[0]) == LOOPS > float(means[1])


def test_lossless_is_offered_and_a_draft_that_was_taken_back_is_shown(
    page: Browser, live: Live
) -> None:
    lossless = {"exit_threshold": 0, "exit_mode": "lossless"}
    page.script(SLIDE, A, lossless)
    ask(page, HARD)
    answer = asked_of_api(live, HARD, return_drafts=True, **lossless)
    choice, depth = answer.choices[0], answer.usage.depth
    drafted = zip(choice.drafts, choice.depths, strict=True)
    taken_back = [draft for draft, depth in drafted if draft not in (0, depth)]
    assert taken_back, "every draft of loop 1 was right"
    marked = (
        f"return [...document.querySelectorAll('{A} [data-draft]')].map((t) => t.dataset.draft)"
    )
    assert page.script(marked) == [str(draft) for draft in taken_back]
    told = f"{depth['drafts_right']} of {depth['drafts_made']}"
    assert page.text(f"{A} [data-value=drafts]") == told
    page.hover(f"{A} [data-draft]")
    page.until("hovers", "#inspector", lambda text: "another token, taken back" in text)
    page.script(SLIDE, A, {"exit_threshold": 1})
    assert page.text(f"{A} .sliders b") == "server's rule"


def test_another_rule_is_chosen_with_a_threshold_in_its_unit(page: Browser, live: Live) -> None:
    page.script(SLIDE, A, {"exit_mode": "skip", "exit_rule": "delta"})
    slider = f"document.querySelector('{A} [name=exit_threshold]')"
    assert page.script(f"return [{slider}.max, {slider}.value]") == ["2", "0"]
    page.script(SLIDE, A, {"exit_threshold": 0.6})
    ask(page, HARD)
    answer = asked_of_api(live, HARD, exit_rule="delta", exit_threshold=0.6, exit_mode="skip")
    assert [token["depth"] for token in page.script(TOKENS, A)] == answer.choices[0].depths
    assert 1 < answer.usage.depth["mean"] < LOOPS
    page.hover(f"{A} .token:nth-of-type(1)")
    page.until("hovers", "#inspector", lambda text: "left by delta, threshold 0.6" in text)


def test_a_preset_is_asked_for_by_name_and_a_conversation_goes_on(page: Browser) -> None:
    page.script(
        "window.bodies = []; const real = window.fetch;"
        "window.fetch = (url, options) => {"
        "  if (options?.body) window.bodies.push(options.body); return real(url, options); }"
    )
    page.click(f"{A} [value=fast]")
    assert page.script(f"return document.querySelector('{A} [name=exit_threshold]').value") == "0.3"
    ask(page, EASY)
    ask(page, HARD)
    first, second = (json.loads(body) for body in page.script("return window.bodies"))
    assert first["depth_preset"] == "fast"
    assert "exit_threshold" not in first
    assert [m["role"] for m in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][-1]["content"] == HARD


def test_what_the_server_refuses_is_said_in_words(page: Browser) -> None:
    page.click("#key")
    page.press("x" + ENTER)
    page.click("#question")
    page.press(EASY + ENTER)
    page.until("refuses the key", "#notice", lambda text: "refused this API key" in text)
    page.script("sessionStorage.setItem('ouro-key', arguments[0]); location.reload()", KEY)
    page.until("connects", "#model", bool)
    page.script("document.querySelector('#question').value = 'too long '.repeat(3000)")
    page.click("#send")
    said = page.until("refuses", f"{A} .error", bool)
    assert said.startswith("The server refused (400): ")
    assert "context length" in said
    page.offline(True)
    try:
        page.click("#send")
        page.until("loses the server", "#notice", lambda text: "cannot be reached" in text)
    finally:
        page.offline(False)


def test_stop_ends_an_answer(page: Browser) -> None:
    page.script(
        "const real = window.fetch; window.fetch = (url, options) => options?.body ?"
        " new Promise((_, fail) => options.signal.addEventListener("
        "'abort', () => fail(options.signal.reason))) : real(url, options)"
    )
    page.click("#question")
    page.press(EASY + ENTER)
    page.until("waits", f"{A} .question", bool)
    assert page.text("#send") == "Stop"
    page.click("#send")
    page.until("stops", f"{A} .stopped", lambda text: text == "Stopped.")
    assert page.text("#send") == "Ask"


def test_the_keyboard_alone_is_enough(page: Browser) -> None:
    page.press(TAB)
    assert page.script("return document.activeElement.className") == "skip"
    for _ in range(30):
        if page.script("return document.activeElement.id") == "question":
            break
        page.press(TAB)
    page.press(EASY)
    page.press(TAB)
    page.press(ENTER)
    page.until("answers", "#announcer", lambda text: "mean depth" in text)
    assert page.script("return document.querySelectorAll('.token').length") > 3


def test_a_narrow_window_shows_all_of_it(page: Browser) -> None:
    page.click("#compare")
    ask(page, EASY)
    page.resize(390, 800)
    try:
        assert page.script("return document.documentElement.scrollWidth") == 390
        assert page.script(SCROLLED_ABOVE_QUESTION, f"{B} [name=exit_threshold]")
    finally:
        page.resize(1280, 800)


def test_every_control_has_a_name_and_every_text_contrast(page: Browser) -> None:
    page.click("#compare")
    page.script(SLIDE, A, {"exit_threshold": 0.5})
    ask(page, HARD)
    page.devtools("Accessibility.enable")
    nodes = page.devtools("Accessibility.getFullAXTree")["nodes"]
    controls = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if node.get("role", {}).get("value")
        in {"button", "checkbox", "image", "log", "radio", "slider", "switch", "textbox"}
    ]
    assert {"button", "radio", "slider", "switch", "textbox"} <= {role for role, _ in controls}
    assert [role for role, name in controls if not name.strip()] == []
    for _ in ("light", "dark"):
        contrasts = page.script(CONTRASTS)
        assert len(contrasts) > 20
        assert [(text, round(ratio, 2)) for text, ratio in contrasts if ratio < AA] == []
        page.click("#theme")
