// Shows how a token left the loop, for the token under the pointer or the keyboard's focus.

import { factsOf, shade, takenBack } from "./tokens.js";

const GRACE_MS = 150;
const STEPS = new Map([["ArrowRight", 1], ["ArrowDown", 1], ["ArrowLeft", -1], ["ArrowUp", -1]]);

export class Inspector {
  constructor(panel) {
    this.panel = panel;
    this.hiding = 0;
    document.addEventListener("pointerover", (event) => this.#entered(event.target));
    document.addEventListener("focusin", ({ target }) => this.#focused(target));
    document.addEventListener("keydown", (event) => this.#pressed(event));
    document.addEventListener("scroll", () => this.hide(), true);
  }

  show(token) {
    clearTimeout(this.hiding);
    this.hiding = 0;
    this.panel.replaceChildren(...describe(factsOf(token)));
    this.panel.hidden = false;
    this.#place(token.getBoundingClientRect());
  }

  hide() {
    this.panel.hidden = true;
  }

  #entered(target) {
    const token = target.closest(".token");
    if (token) return this.show(token);
    clearTimeout(this.hiding);
    if (this.panel.contains(target)) return;
    // A grace, so that the pointer can cross the gap into the panel.
    this.hiding = setTimeout(() => {
      const focused = document.activeElement?.closest(".token");
      if (focused?.matches(":focus-visible")) this.show(focused);
      else this.hide();
    }, GRACE_MS);
  }

  #focused(target) {
    if (target.matches(".token")) this.show(target);
    else this.hide();
  }

  #pressed(event) {
    if (event.key === "Escape") return this.hide();
    const token = event.target.closest?.(".token");
    if (!token) return;
    const tokens = [...token.parentElement.querySelectorAll(".token")];
    const at = tokens.indexOf(token);
    let next = token;
    if (STEPS.has(event.key)) next = tokens[at + STEPS.get(event.key)] ?? token;
    else if (event.key === "Home") next = tokens[0];
    else if (event.key === "End") next = tokens.at(-1);
    else if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    // Of an answer's tokens one is a tab stop; the arrow keys move it.
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    this.show(next);
  }

  #place(token) {
    const { width, height } = this.panel.getBoundingClientRect();
    const gap = 14;
    const left = Math.min(Math.max(token.left - 12, gap), innerWidth - width - gap);
    const below = token.bottom + gap;
    const top = below + height < innerHeight ? below : token.top - height - gap / 2;
    this.panel.style.left = `${left}px`;
    this.panel.style.top = `${Math.max(top, gap / 2)}px`;
  }
}

function describe(token) {
  const { text, probability, depth, draft, cdf, said, loops, rule, threshold } = token;
  const head = make("p", "inspected");
  head.append(make("code", "", JSON.stringify(text)));
  const facts = make("p", "", `Depth ${depth} of ${loops}`);
  if (probability !== null) facts.append(` · probability ${percent(probability)}`);
  if (draft) {
    const fate = takenBack(token) ? "another token, taken back" : "confirmed";
    facts.append(` · drafted at loop ${draft}: ${fate}`);
  }
  if (!cdf) return [head, facts, make("p", "faint", "The server sent no gate values.")];
  const gate = rule === "gate";
  const line = gate ? `line: threshold ${threshold}` : `left by ${rule}, threshold ${threshold}`;
  const words = said.length ? "What each loop would say; " : "";
  const caption = make("p", "faint", `${words}bar: the gate's chance to have left; ${line}`);
  const rows = make("ol", gate ? "cdf" : "cdf unruled");
  for (let loop = 1; loop <= loops; loop += 1) {
    rows.append(row(loop, cdf[loop - 1], said[loop - 1], token));
  }
  rows.style.setProperty("--threshold", threshold);
  return [head, facts, caption, rows];
}

/** One loop: the word it would say, and the gate's view. In lossless, loops after the exit ran too. */
function row(loop, value, guesses, { text, depth, loops, said }) {
  const item = make("li", loop === depth ? "left" : "");
  const bar = make("span", "bar");
  bar.style.setProperty("--share", value ?? 0);
  shade(bar, loop, loops);
  item.append(make("span", "loop", String(loop)));
  if (said.length) item.append(guesses ? word(guesses, text) : make("span", "word", ""));
  const known = value === undefined ? (guesses ? "after exit" : "not run") : value.toFixed(3);
  item.append(bar, make("span", "value", known));
  return item;
}

/** A loop's likeliest token with its probability; another one than the token is marked. */
function word([first, second], text) {
  const chance = percent(Math.exp(first.logprob));
  const box = make("span", first.token === text ? "word" : "word other");
  box.append(make("code", "", JSON.stringify(first.token ?? `#${first.token_id}`)));
  box.append(make("small", "", ` ${chance}`));
  if (second) {
    box.title = `then ${JSON.stringify(second.token ?? "")} ${percent(Math.exp(second.logprob))}`;
  }
  return box;
}

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}

function percent(share) {
  return `${(100 * share).toFixed(share > 0.9995 || share < 0.1 ? 2 : 1)} %`;
}
