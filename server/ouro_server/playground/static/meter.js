// Depth and speed of one answer while it streams.

import { shade } from "./tokens.js";

export class Meter {
  constructor(root, name, loops) {
    root.setAttribute("aria-label", `Depth and speed of answer ${name}`);
    this.loops = loops;
    this.values = new Map(
      [...root.querySelectorAll("[data-value]")].map((dd) => [dd.dataset.value, dd]),
    );
    this.histogram = root.querySelector(".histogram");
    for (let depth = 1; depth <= loops; depth += 1) {
      const bar = document.createElement("li");
      bar.append(document.createElement("span"), document.createElement("b"), String(depth));
      shade(bar, depth, loops);
      this.histogram.append(bar);
    }
    this.reset();
  }

  /** Forget the last answer. */
  reset() {
    this.counts = new Array(this.loops).fill(0);
    this.total = 0;
    this.weighted = 0;
    this.first = null;
    for (const value of this.values.values()) value.textContent = "–";
    this.#drawHistogram();
  }

  /** Count a step's tokens, which arrived at `now` (milliseconds). */
  add(tokens, now) {
    if (!tokens.length) return;
    for (const { depth } of tokens) this.counts[depth - 1] += 1;
    this.total += tokens.length;
    this.weighted += tokens.reduce((sum, { depth }) => sum + depth, 0);
    // The first step waits for the prompt, so speed is that of the tokens after it.
    this.first ??= { now, tokens: tokens.length };
    this.#set("mean", (this.weighted / this.total).toFixed(2));
    this.#set("tokens", this.total);
    const seconds = (now - this.first.now) / 1000;
    if (seconds > 0) this.#set("rate", Math.round((this.total - this.first.tokens) / seconds));
    this.#drawHistogram();
  }

  /** The server's own count of what the answer cost. */
  finish({ depth }) {
    const all = depth.loops_run + depth.loops_skipped;
    if (all) this.#set("skipped", `${Math.round((100 * depth.loops_skipped) / all)} %`);
    if (depth.drafts_made) this.#set("drafts", `${depth.drafts_right} of ${depth.drafts_made}`);
  }

  /** The answer in a sentence. */
  get summary() {
    const mean = this.values.get("mean").textContent;
    return this.total ? `${this.total} tokens, mean depth ${mean} of ${this.loops}` : "no tokens";
  }

  #set(name, value) {
    this.values.get(name).textContent = value;
  }

  #drawHistogram() {
    const most = Math.max(...this.counts, 1);
    this.counts.forEach((count, i) => {
      const bar = this.histogram.children[i];
      bar.firstChild.textContent = count || "";
      bar.style.setProperty("--share", count / most);
    });
    const told = this.counts.map((count, i) => `depth ${i + 1}: ${count}`).join(", ");
    this.histogram.setAttribute("aria-label", `Tokens by depth. ${told}`);
  }
}
