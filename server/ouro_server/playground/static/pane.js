// One column: a depth setting, the conversation held at it, and what the last answer cost.

import { chat } from "./api.js";
import { Meter } from "./meter.js";
import { Settings } from "./settings.js";
import { tokenNodes } from "./tokens.js";

/** Likeliest tokens that are asked of every loop. */
const GUESSES = 2;

export class Pane {
  constructor(template, name, depth, preset) {
    this.name = name;
    this.depth = depth;
    this.root = template.content.firstElementChild.cloneNode(true);
    this.root.setAttribute("aria-label", `Answer ${name}`);
    this.talk = this.root.querySelector(".talk");
    this.talk.setAttribute("aria-label", `Conversation ${name}`);
    this.settings = new Settings(this.root.querySelector(".settings"), name, depth, preset);
    this.meter = new Meter(this.root.querySelector(".meter"), name, depth.loops);
    this.clear();
  }

  /** Begin a new conversation. */
  clear() {
    this.messages = [];
    this.talk.replaceChildren();
    this.meter.reset();
  }

  /**
   * Ask, and show the answer as it streams; what the server refuses is shown in words.
   *
   * Resolves to `{said, error}`: the answer in a sentence for who cannot see it, and the error.
   */
  async ask(question, key, signal) {
    this.meter.reset();
    this.messages.push({ role: "user", content: question });
    const answer = this.#begin(question);
    const asked = { loops: this.depth.loops, ...this.settings.exit };
    let content = "";
    let error = null;
    try {
      const { model } = this.depth;
      const { messages } = this;
      const depth = this.settings.fields;
      const guesses = this.depth.return_loops ? GUESSES : 0;
      for await (const step of chat({ model, messages, depth, guesses, key, signal })) {
        content += step.content;
        this.meter.add(step.tokens, performance.now());
        this.#append(answer, step.tokens, asked);
        if (step.usage) this.meter.finish(step.usage);
      }
    } catch (caught) {
      error = caught;
      this.#complain(answer, caught);
    }
    answer.setAttribute("aria-busy", "false");
    // A turn without an answer is not part of the conversation that goes on.
    if (content) this.messages.push({ role: "assistant", content });
    else if (error) this.messages.pop();
    return { said: `Answer ${this.name}: ${content}. ${this.meter.summary}.`, error };
  }

  #begin(question) {
    const asked = document.createElement("p");
    asked.className = "question";
    asked.textContent = question;
    const answer = document.createElement("div");
    answer.className = "answer";
    answer.setAttribute("role", "group");
    answer.setAttribute("aria-label", "Answer; the arrow keys walk through its tokens");
    answer.setAttribute("aria-busy", "true");
    this.talk.append(asked, answer);
    this.#toEnd();
    return answer;
  }

  #append(answer, tokens, asked) {
    for (const token of tokens) answer.append(...tokenNodes({ ...token, ...asked }));
    if (tokens.length && !answer.querySelector("[tabindex='0']")) {
      answer.querySelector(".token").tabIndex = 0;
    }
    this.#toEnd();
  }

  #complain(answer, error) {
    const words = document.createElement("p");
    if (error.name === "AbortError") {
      words.className = "stopped";
      words.textContent = "Stopped.";
    } else {
      words.className = "error";
      words.setAttribute("role", "alert");
      words.textContent = error.message;
    }
    answer.after(words);
    this.#toEnd();
  }

  #toEnd() {
    this.talk.scrollTop = this.talk.scrollHeight;
  }
}
