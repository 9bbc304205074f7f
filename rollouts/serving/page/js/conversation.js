// What a conversation is, and everything that can be said of one without a page or a server.
//
//   conversation: id, title, named, created, updated, system, tools (JSON text), tokens, settings, models, turns
//   turn:         id, user (text), replies: one for each model that was asked
//   reply:        model, current, versions: one for each time it was generated
//   version:      steps, error, stopped
//   step:         content, reasoning, calls [{id, name, arguments, result}], tokens [{text, logprob, top}] or null, finish, usage
//
// A version has more than one step when the model called tools and went on with their results.

export const SETTINGS = [
  { name: "temperature", label: "Temperature", hint: "0 takes the likeliest token", min: 0, max: 100, step: 0.1 },
  { name: "top_p", label: "Top-p", hint: "keep the likeliest tokens up to this sum", min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", label: "Top-k", hint: "keep the k likeliest tokens", min: 0, max: 1000000, step: 1 },
  { name: "min_p", label: "Min-p", hint: "drop what is less likely than this part of the likeliest", min: 0, max: 1, step: 0.01 },
  { name: "max_tokens", label: "Max tokens", hint: "of one reply", min: 1, max: 10000000, step: 1 },
  { name: "seed", label: "Seed", hint: "the same seed gives the same reply; each regeneration adds 1", min: 0, max: 2 ** 53 - 1, step: 1 },
  { name: "repetition_penalty", label: "Repetition penalty", hint: "1 is none", min: 0.01, max: 100, step: 0.01 },
  { name: "presence_penalty", label: "Presence penalty", hint: "between −2 and 2", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", label: "Frequency penalty", hint: "between −2 and 2", min: -2, max: 2, step: 0.1 },
];
export const TOP_LOGPROBS = 5;
const UNTITLED = "New conversation";

export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** An empty conversation that takes over how the one before was set up. */
export function newConversation(models, like = null) {
  const now = Date.now();
  const kept = like ? { system: like.system, tools: like.tools, tokens: like.tokens, settings: { ...like.settings } } : {};
  return normalize({ id: newId(), created: now, updated: now, models, ...kept });
}

export const newVersion = () => ({ steps: [newStep()], error: null, stopped: false });
export const newStep = () => ({ content: "", reasoning: "", calls: [], tokens: null, finish: null, usage: null });
export const currentVersion = (reply) => reply.versions[reply.current];

export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = conversation.turns[0]?.user.trim().replace(/\s+/g, " ") ?? "";
  return first.length > 60 ? `${first.slice(0, 59)}…` : first || UNTITLED;
}

export function matches(conversation, words) {
  const wanted = words.trim().toLowerCase();
  if (!wanted) return true;
  const texts = [titleOf(conversation), conversation.system];
  for (const turn of conversation.turns) {
    texts.push(turn.user);
    for (const reply of turn.replies) for (const step of currentVersion(reply).steps) texts.push(step.content);
  }
  return texts.some((text) => text.toLowerCase().includes(wanted));
}

/** The messages that ask `model` for its reply to a turn: its own history, or the first model's where it was not asked. */
export function messagesFor(conversation, turnIndex, model, version = null) {
  const messages = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  conversation.turns.slice(0, turnIndex + 1).forEach((turn, index) => {
    messages.push({ role: "user", content: turn.user });
    if (index < turnIndex) {
      const reply = turn.replies.find((one) => one.model === model) ?? turn.replies[0];
      if (reply) messages.push(...stepMessages(currentVersion(reply).steps));
    }
  });
  return version ? [...messages, ...stepMessages(version.steps)] : messages;
}

function stepMessages(steps) {
  return steps.flatMap((step) => {
    const thought = step.reasoning ? { reasoning_content: step.reasoning } : {};
    if (!step.calls.length) return step.content || step.reasoning ? [{ role: "assistant", content: step.content, ...thought }] : [];
    const tool_calls = step.calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
    const results = step.calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: call.result ?? "" }));
    return [{ role: "assistant", content: step.content, ...thought, tool_calls }, ...results];
  });
}

/** The body of a request for one reply. Throws an Error when the tools are not a JSON list. */
export function requestBody(conversation, turnIndex, model, { version = null, attempt = 0 } = {}) {
  const settings = Object.fromEntries(Object.entries(conversation.settings).filter(([, value]) => value !== null));
  if (settings.seed !== undefined) settings.seed += attempt;
  const tools = parseTools(conversation.tools);
  return {
    model,
    messages: messagesFor(conversation, turnIndex, model, version),
    stream: true,
    stream_options: { include_usage: true },
    ...settings,
    ...(tools.length ? { tools } : {}),
    ...(conversation.tokens ? { logprobs: true, top_logprobs: TOP_LOGPROBS } : {}),
  };
}

export function parseTools(text) {
  if (!text.trim()) return [];
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`The tools are not JSON: ${error.message}`);
  }
  if (!Array.isArray(tools)) throw new Error("The tools are not a JSON list");
  return tools;
}

/** What an export holds: the conversation as it is kept, and its messages for each model as the API takes them. */
export function exported(conversation) {
  const models = [...new Set(conversation.turns.flatMap((turn) => turn.replies.map((reply) => reply.model)))];
  const last = conversation.turns.length - 1;
  const messages = {};
  for (const model of models.length ? models : conversation.models) {
    const reply = conversation.turns[last]?.replies.find((one) => one.model === model) ?? conversation.turns[last]?.replies[0];
    messages[model] = messagesFor(conversation, last, model, reply ? currentVersion(reply) : null);
  }
  return { format: "rollouts-chat", version: 1, ...conversation, title: titleOf(conversation), messages };
}

/** A conversation from an exported file, or from one that `rollouts chat` saved. Throws an Error when it is neither. */
export function imported(value) {
  if (value?.format !== "rollouts-chat") throw new Error("This file is no exported conversation");
  const turns = Array.isArray(value.turns) ? value.turns : turnsOf(object(value.messages));
  return normalize({ ...value, turns, id: newId(), named: true });
}

/** Turns from the messages that a terminal saved: {model: [message]}. */
function turnsOf(messagesByModel) {
  const turns = [];
  for (const [model, messages] of Object.entries(messagesByModel)) {
    let index = -1;
    for (const message of list(messages)) {
      if (message?.role === "user") {
        index += 1;
        turns[index] ??= { user: text(message.content), replies: [] };
        turns[index].replies.push({ model, versions: [{ steps: [] }] });
      } else if (index >= 0) {
        const { steps } = turns[index].replies.at(-1).versions[0];
        if (message?.role === "assistant") {
          const calls = list(message.tool_calls).map((call) => ({ id: call?.id, ...object(call?.function) }));
          steps.push({ content: text(message.content), reasoning: text(message.reasoning_content), calls });
        } else if (message?.role === "tool" && steps.length) {
          const call = steps.at(-1).calls.find((one) => one.id === message.tool_call_id);
          if (call) call.result = text(message.content);
        }
      }
    }
  }
  return turns;
}

/** Any value as a conversation: what was stored or imported is never trusted to have the right shape. */
export function normalize(value) {
  value = object(value);
  const settings = object(value.settings);
  return {
    id: text(value.id) || newId(),
    title: text(value.title),
    named: value.named === true,
    created: number(value.created) ?? Date.now(),
    updated: number(value.updated) ?? Date.now(),
    system: text(value.system),
    tools: text(value.tools),
    tokens: value.tokens === true,
    settings: {
      ...Object.fromEntries(SETTINGS.map(({ name }) => [name, number(settings[name])])),
      stop: Array.isArray(settings.stop) && settings.stop.length ? settings.stop.map(text).filter(Boolean) : null,
    },
    models: list(value.models).map(text).filter(Boolean),
    turns: list(value.turns).map((turn) => ({
      id: text(turn?.id) || newId(),
      user: text(turn?.user),
      replies: list(turn?.replies).map(normalizeReply),
    })),
  };
}

function normalizeReply(reply) {
  const versions = list(reply?.versions).map((version) => {
    const steps = list(version?.steps).map((step) => ({
      content: text(step?.content),
      reasoning: text(step?.reasoning),
      calls: list(step?.calls).map((call) => ({
        id: text(call?.id),
        name: text(call?.name),
        arguments: text(call?.arguments),
        result: typeof call?.result === "string" ? call.result : null,
      })),
      tokens: Array.isArray(step?.tokens) ? step.tokens.map(normalizeToken) : null,
      finish: text(step?.finish) || null,
      usage: step?.usage && typeof step.usage === "object" ? { completion_tokens: number(step.usage.completion_tokens) } : null,
    }));
    return { steps: steps.length ? steps : [newStep()], error: text(version?.error) || null, stopped: version?.stopped === true };
  });
  if (!versions.length) versions.push(newVersion());
  const current = Math.min(Math.max(Math.trunc(number(reply?.current) ?? versions.length - 1), 0), versions.length - 1);
  return { model: text(reply?.model), current, versions };
}

const normalizeToken = (token) => ({
  text: text(token?.text),
  logprob: number(token?.logprob) ?? 0,
  top: list(token?.top).map((one) => ({ text: text(one?.text), logprob: number(one?.logprob) ?? 0 })),
});

const text = (value) => (typeof value === "string" ? value : "");
const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);
const list = (value) => (Array.isArray(value) ? value : []);
const object = (value) => (value && typeof value === "object" && !Array.isArray(value) ? value : {});
