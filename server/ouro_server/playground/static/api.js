// The server's API: what its loops are, and answers as they stream.

const ROOT = new URL("../", import.meta.url);
const LOST = "The connection was lost before the answer was complete.";
const UNREACHABLE = "The server cannot be reached. Is it still running?";

/** What went wrong, in words. `needsKey`: the server wants another API key. */
export class ServerError extends Error {
  constructor(message, needsKey = false) {
    super(message);
    this.needsKey = needsKey;
  }
}

/** `GET /v1/depth`: loops, defaults and presets of the served model. */
export async function getDepth(key) {
  const response = await request("v1/depth", key, {});
  return response.json();
}

/**
 * Streams one chat answer as steps `{tokens, content, usage}`.
 *
 * A token is `{text, probability, depth, draft, cdf, said}`; `draft` is the loop it was drafted at,
 * 0 if it was not; `cdf` is null if the server sent none; `said` has, of every loop that ran, its
 * likeliest tokens, `guesses` of them, as `{token, logprob}`. `usage` is set on the last step. Throws
 * ServerError, and an AbortError once `signal` is aborted.
 */
export async function* chat({ model, messages, depth, guesses, key, signal }) {
  const body = {
    model,
    messages,
    ...depth,
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
    logprobs: true,
    return_depths: true,
    return_drafts: true,
    return_exit_cdf: true,
    ...(guesses && { return_loops: guesses }),
  };
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const event of readEvents(response.body)) {
    if (event.error) throw new ServerError(inWords(event.error));
    const [choice] = event.choices;
    yield {
      tokens: choice ? tokensOf(choice) : [],
      content: choice?.delta.content ?? "",
      usage: event.usage ?? null,
    };
  }
}

/** The tokens of a stream chunk. A parser may hold their text back, but never their logprobs. */
function tokensOf({ depths = [], drafts, exit_cdf: cdfs, loops, logprobs }) {
  const entries = logprobs?.content ?? [];
  return depths.map((depth, i) => ({
    text: entries[i]?.token ?? "",
    probability: entries[i] ? Math.exp(entries[i].logprob) : null,
    depth,
    draft: drafts?.[i] ?? 0,
    cdf: cdfs?.[i] ?? null,
    said: loops?.[i] ?? [],
  }));
}

/** The JSON of each server-sent event until `[DONE]`; a stream that ends before that is an error. */
async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new ServerError(LOST);
    });
    if (done) throw new ServerError(LOST);
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function request(path, key, options) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(new URL(path, ROOT), { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(UNREACHABLE);
  }
  if (response.ok) return response;
  if (response.status === 401) {
    const refused = "The server refused this API key. Type another one at the top of the page.";
    const wanted = "The server asks for an API key. Type it at the top of the page.";
    throw new ServerError(key ? refused : wanted, true);
  }
  const { error, detail } = await response.json().catch(() => ({}));
  const said = inWords(error ?? detail) || response.statusText || "no reason given";
  throw new ServerError(`The server refused (${response.status}): ${said}`);
}

function inWords(error) {
  return typeof error === "string" ? error : (error?.message ?? "");
}
