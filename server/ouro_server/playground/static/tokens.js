// A generated token as an element: coloured by its depth, with the depth as a digit below it.

const SPECIAL = /^<[|/]?\w[^\s]*>$/;
const facts = new WeakMap();

/**
 * What is known of a token element: what `api.js` says of it, and `{loops, rule, threshold}`: of the
 * model, and what the token left by.
 */
export function factsOf(element) {
  return facts.get(element);
}

/** Whether another token was drafted in this one's place, which the last loop took back. */
export function takenBack({ draft, depth }) {
  return draft > 0 && draft !== depth;
}

/** Where depth lies between 1 and `loops`, as the colour scale wants it: 0 to 1. */
export function shade(element, depth, loops) {
  element.style.setProperty("--d", loops > 1 ? (depth - 1) / (loops - 1) : 1);
}

/** The nodes of one token: white space around it stays plain text, so that lines break there. */
export function tokenNodes(token) {
  const [before, shown, after] = split(token.text);
  const element = document.createElement("span");
  element.className = "token";
  element.textContent = shown;
  element.dataset.depth = token.depth;
  if (takenBack(token)) element.dataset.draft = token.draft;
  element.tabIndex = -1;
  element.setAttribute("role", "button");
  element.setAttribute("aria-label", label(token));
  element.setAttribute("aria-describedby", "inspector");
  if (SPECIAL.test(token.text) || !token.text.includes(shown)) element.classList.add("mark");
  shade(element, token.depth, token.loops);
  facts.set(element, token);
  return [before, element, after];
}

/** What stands before a token, in it and after it. What has no shape of its own gets one. */
function split(text) {
  if (SPECIAL.test(text)) return ["", "end", ""];
  const shown = text.trim();
  if (shown) {
    const start = text.indexOf(shown);
    return [text.slice(0, start), shown, text.slice(start + shown.length)];
  }
  if (text.includes("\n")) return ["", "↵", text];
  return ["", text || "·", ""];
}

function label(token) {
  const { text, draft, depth, loops } = token;
  const before = takenBack(token) ? `, a draft of loop ${draft} taken back` : "";
  return `${text.trim() || JSON.stringify(text)}, depth ${depth} of ${loops}${before}`;
}
