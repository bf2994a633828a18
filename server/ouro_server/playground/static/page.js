// The page: connects the server, one or two columns, and the question.

import { getDepth } from "./api.js";
import { Inspector } from "./inspector.js";
import { Pane } from "./pane.js";
import { attachTheme } from "./theme.js";
import { shade } from "./tokens.js";

const STORED_KEY = "ouro-key";
const SECOND_PRESET = "fast";
const SAMPLES = [
  "Who are you?",
  "What is 904821 + 583397?",
  "What is (((((3+4)*2)-1)*3)+2)-4 mod 5?",
  "Cups B D A C. Swap 1-2, 2-4, 1-3. Order?",
];

const $ = (id) => document.getElementById(id);
const [compare, key, question, send] = ["compare", "key", "question", "send"].map($);

let depth = null;
let panes = [];
let running = null;

/** Learn what the server does now; true if it told. The first time, the page comes to life. */
async function connect() {
  try {
    depth = await getDepth(key.value);
  } catch (error) {
    notice(error);
    return false;
  }
  notice(null);
  if (panes.length) {
    panes.forEach((pane) => pane.settings.refresh(depth));
  } else {
    $("model").textContent = `${depth.model}, ${depth.loops} loops`;
    drawLegend(depth.loops);
    panes = [new Pane($("pane"), "A", depth)];
    $("panes").replaceChildren(panes[0].root);
    setCompare();
  }
  return true;
}

function notice(error) {
  $("notice").hidden = !error;
  $("notice").textContent = error?.message ?? "";
  if (error?.needsKey) key.focus();
}

function drawLegend(loops) {
  $("legend").replaceChildren(
    ...Array.from({ length: loops }, (_, i) => {
      const item = document.createElement("li");
      item.textContent = i + 1;
      shade(item, i + 1, loops);
      return item;
    }),
  );
}

/** One column or two. Two begin with no history, since only the setting should differ. */
function setCompare() {
  if (!panes.length) return;
  if (compare.checked && panes.length === 1) {
    panes.push(new Pane($("pane"), "B", depth, SECOND_PRESET));
    $("panes").append(panes[1].root);
    panes.forEach((pane) => pane.clear());
  } else if (!compare.checked && panes.length === 2) {
    panes.pop().root.remove();
  }
  $("panes").classList.toggle("two", panes.length === 2);
}

async function ask() {
  const text = question.value.trim();
  if (!text) return question.focus();
  running = new AbortController();
  lock(true);
  // The defaults in force may have moved since the last question.
  if (await connect()) await askAll(text, running.signal);
  running = null;
  lock(false);
}

async function askAll(text, signal) {
  question.value = "";
  const results = await Promise.all(panes.map((pane) => pane.ask(text, key.value, signal)));
  const errors = results.map(({ error }) => error).filter(Boolean);
  if (errors.length === panes.length) question.value ||= text;
  if (errors.some((error) => error.needsKey)) key.focus();
  const answers = results.filter(({ error }) => !error).map(({ said }) => said);
  if (answers.length) $("announcer").textContent = answers.join(" ");
}

/** While answers stream, what they depend on stays as it is. */
function lock(on) {
  send.textContent = on ? "Stop" : "Ask";
  send.classList.toggle("stop", on);
  $("clear").disabled = on;
  compare.disabled = on;
}

function addSamples() {
  for (const text of SAMPLES) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => {
      if (running) return;
      question.value = text;
      ask();
    });
    $("samples").append(button);
  }
}

key.value = sessionStorage.getItem(STORED_KEY) ?? "";
key.addEventListener("change", () => {
  sessionStorage.setItem(STORED_KEY, key.value);
  if (!panes.length) connect();
});
compare.addEventListener("change", setCompare);
$("clear").addEventListener("click", () => {
  panes.forEach((pane) => pane.clear());
  question.focus();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else ask();
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) ask();
});

addSamples();
attachTheme($("theme"));
new Inspector($("inspector"));
connect();
