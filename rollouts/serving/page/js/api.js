// The server's API: which models there are, and one reply as it grows.

let key = "";
try {
  key = sessionStorage.getItem("rollouts.key") ?? "";
} catch {
  // Asked for again when the page is loaded anew.
}

export function setKey(value) {
  key = value;
  try {
    sessionStorage.setItem("rollouts.key", value);
  } catch {
    // As above.
  }
}

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}), ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer; is it still running?", 0);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(body?.error?.message ?? `The server answered ${response.status}`, response.status);
}

export async function listModels() {
  const body = await (await ask("v1/models")).json();
  return body.data.map((model) => String(model.id));
}

/** Each chunk of a streamed reply. Throws ApiError, or an AbortError when `signal` is aborted. */
export async function* streamChat(body, signal) {
  const response = await ask("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let ended = false;
  while (!ended) {
    const { value, done } = await reader.read();
    buffer += value ?? "";
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (!data) continue;
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message ?? "The server failed", 500);
      yield chunk;
    }
    ended = done;
  }
  throw new ApiError("The server broke off before the reply was complete", 0);
}
