"""The playground's page, as its tests and its picture use it."""

from __future__ import annotations

from tests.server.browser import ENTER, Browser

ANSWERED = "return document.querySelectorAll('.answer[aria-busy=false]').length"


def ask(page: Browser, question: str) -> None:
    """Type a question and wait until every column has its whole answer."""
    wanted = page.script(ANSWERED) + page.script("return document.querySelectorAll('.pane').length")
    page.click("#question")
    page.press(question + ENTER)
    page.wait(f"answers {question!r}", lambda: page.script(ANSWERED) == wanted)
    page.until("is ready for the next question", "#send", lambda text: text == "Ask")


TOKENS = """
const tokens = document.querySelectorAll(`${arguments[0]} .answer:last-of-type .token`);
return [...tokens].map((token) => (
  {depth: Number(token.dataset.depth), colour: getComputedStyle(token).backgroundColor}));
"""
"""Argument: a pane. The depth and the colour of each token of its last answer."""

SLIDE = """
const [pane, values] = arguments;
for (const [name, value] of Object.entries(values)) {
  const slider = document.querySelector(`${pane} [name=${name}]`);
  slider.value = value;
  slider.dispatchEvent(new Event("input", {bubbles: true}));
}
"""
"""Arguments: a pane, and values by control. Moves its sliders, as a hand would."""

SCROLLED_ABOVE_QUESTION = """
const control = document.querySelector(arguments[0]);
control.scrollIntoView({block: "end"});
const question = document.querySelector("#composer").getBoundingClientRect();
return control.getBoundingClientRect().bottom <= question.top;
"""
"""Argument: a control. Whether the question leaves it in sight when it is scrolled to."""

CONTRASTS = """
const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const rgb = (colours) => {
  colours.forEach((c) => { paint.fillStyle = c; paint.fillRect(0, 0, 1, 1); });
  return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = (colour) => {
  const [r, g, b] = colour.map((v) => v / 255).map(
    (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (node) => node
  ? [...behind(node.parentElement), getComputedStyle(node).backgroundColor] : [];
const speaks = (node) => [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
const visible = (node) => node.checkVisibility() && !node.closest(".hidden, .skip");
return [...document.querySelectorAll("body *")]
  .filter((node) => visible(node) && speaks(node))
  .map((node) => {
    const under = behind(node);
    const [high, low] = [light(rgb(under)), light(rgb([...under, getComputedStyle(node).color]))]
      .sort((a, b) => b - a);
    return [node.textContent.slice(0, 40), (high + 0.05) / (low + 0.05)];
  });
"""
"""The start of every text that is shown, and its contrast to what it stands on.

Colours are compared as painted: a canvas turns any notation into RGB.
"""
