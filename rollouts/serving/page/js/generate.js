// Asking models: what runs now, and how chunks grow a version.
import { streamChat } from "./api.js";
import { currentVersion, newStep, requestBody } from "./conversation.js";
import { save } from "./store.js";

const running = new Map(); // version -> { controller, conversation }

export const isRunning = (version) => running.has(version);
export const runsIn = (conversation) => [...running.values()].some((run) => run.conversation === conversation);

/** Stop every reply of a conversation; what has come so far stays. */
export function stop(conversation) {
  for (const run of running.values()) if (run.conversation === conversation) run.controller.abort();
}

/** Generate the last step of a reply's current version; `changed` is called whenever there is more to show. */
export async function generate(conversation, turnIndex, reply, changed) {
  const version = currentVersion(reply);
  const step = version.steps.at(-1);
  const controller = new AbortController();
  running.set(version, { controller, conversation });
  changed();
  try {
    const before = { steps: version.steps.slice(0, -1) };
    const attempt = reply.versions.indexOf(version);
    const body = requestBody(conversation, turnIndex, reply.model, { version: before, attempt });
    for await (const chunk of streamChat(body, controller.signal)) {
      take(step, chunk);
      changed();
    }
  } catch (error) {
    if (controller.signal.aborted) version.stopped = true;
    else version.error = error.message;
    if (error.status === 401) dispatchEvent(new CustomEvent("key-needed"));
  } finally {
    running.delete(version);
    conversation.updated = Date.now();
    changed();
    await save(conversation);
  }
}

/** Go on after tool calls, whose results are in the calls. */
export function continueWithResults(conversation, turnIndex, reply, changed) {
  currentVersion(reply).steps.push(newStep());
  return generate(conversation, turnIndex, reply, changed);
}

function take(step, chunk) {
  if (chunk.usage) step.usage = { completion_tokens: chunk.usage.completion_tokens };
  const choice = chunk.choices?.[0];
  if (!choice) return;
  step.content += choice.delta?.content ?? "";
  step.reasoning += choice.delta?.reasoning_content ?? "";
  for (const call of choice.delta?.tool_calls ?? []) {
    const index = call.index ?? step.calls.length;
    step.calls[index] ??= { id: "", name: "", arguments: "", result: null };
    step.calls[index].id ||= call.id ?? "";
    step.calls[index].name += call.function?.name ?? "";
    step.calls[index].arguments += call.function?.arguments ?? "";
  }
  for (const entry of choice.logprobs?.content ?? []) {
    step.tokens ??= [];
    const top = (entry.top_logprobs ?? []).map((one) => ({ text: one.token, logprob: one.logprob }));
    step.tokens.push({ text: entry.token, logprob: entry.logprob, top });
  }
  step.finish = choice.finish_reason ?? step.finish;
}
