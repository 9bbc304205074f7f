// One model's reply on the page: text or tokens, thoughts and tool calls folded, and what can be done with it.
import { currentVersion } from "./conversation.js";
import { copyText, el, icon, iconButton } from "./dom.js";
import { isRunning } from "./generate.js";
import { renderJson, renderMarkdown } from "./markdown.js";
import { hideTip, tokenView } from "./tokens.js";

const asText = new WeakSet(); // versions with tokens that are shown as text all the same

/** A view of a reply; `update()` draws it again, `soon()` does so after at most a moment. `actions`: regenerate, choose, send. */
export function replyView(reply, { named, actions }) {
  const body = el("div.reply-body");
  const foot = el("footer.reply-foot");
  const node = el("article.reply", { "aria-label": `Reply of ${reply.model}` }, named && el("h3.reply-model", {}, reply.model), body, foot);
  let timer = null;
  let cost = 0; // milliseconds that drawing took last time

  function update() {
    clearTimeout(timer);
    timer = null;
    const started = performance.now();
    const version = currentVersion(reply);
    const live = isRunning(version);
    const open = [...body.querySelectorAll("details")].map((one) => one.open);
    body.replaceChildren(...version.steps.flatMap((step, index) => drawStep(version, step, index === version.steps.length - 1, live)));
    [...body.querySelectorAll("details")].forEach((one, index) => (one.open = open[index] ?? one.open));
    if (version.error) body.append(el("p.problem", { role: "alert" }, version.error));
    foot.replaceChildren(...(live ? [] : footer(version)));
    node.classList.toggle("live", live);
    node.setAttribute("aria-busy", String(live));
    cost = performance.now() - started;
  }

  function soon() {
    timer ??= setTimeout(update, Math.max(40, 3 * cost));
  }

  function drawStep(version, step, last, live) {
    const parts = [];
    if (step.tokens && !asText.has(version)) {
      parts.push(tokenView(step.tokens));
    } else {
      const { thought, rest, thinking } = splitThought(step);
      if (thought) parts.push(fold("thought", thinking && live ? "Thinking …" : "Thoughts", renderMarkdown(thought)));
      if (rest.trim()) parts.push(withCopyButtons(renderMarkdown(rest)));
    }
    parts.push(...step.calls.map((call) => drawCall(call, last && !live)));
    if (last && !live && step.calls.length) parts.push(el("button.outline-button", { type: "button", onclick: () => actions.send() }, "Send results"));
    if (last && live && !parts.length) parts.push(el("p.waiting", {}, el("span.dot"), el("span.dot"), el("span.dot")));
    return parts;
  }

  function drawCall(call, open) {
    const result = open
      ? el("textarea.result", {
          rows: 2, value: call.result ?? "", placeholder: "What the tool answers", "aria-label": `Result of ${call.name}`,
          oninput: (event) => (call.result = event.target.value),
        })
      : renderJson(call.result ?? "");
    const content = [el("h4", {}, "Arguments"), renderJson(call.arguments), (open || call.result) && el("h4", {}, "Result"), (open || call.result) && result];
    return fold("call", [el("span.call-name", {}, call.name), el("span.call-brief", {}, brief(call.arguments))], ...content.filter(Boolean));
  }

  function footer(version) {
    const step = version.steps.at(-1);
    const buttons = [];
    if (reply.versions.length > 1) {
      const at = reply.current;
      const move = (label, to, shape) =>
        el("button.icon-button", { type: "button", title: label, "aria-label": label, disabled: to < 0 || to >= reply.versions.length, onclick: () => actions.choose(to) }, icon(shape));
      buttons.push(move("Earlier version", at - 1, "left"), el("span.count", {}, `${at + 1} / ${reply.versions.length}`), move("Later version", at + 1, "right"));
    }
    const text = version.steps.map((one) => one.content).filter(Boolean).join("\n\n");
    if (text) buttons.push(iconButton("copy", "Copy", () => copyText(text)));
    buttons.push(iconButton("again", "Regenerate", () => actions.regenerate()));
    if (version.steps.some((one) => one.tokens)) {
      const toggle = () => {
        hideTip();
        if (!asText.delete(version)) asText.add(version);
        update();
      };
      buttons.push(iconButton("bars", "Show tokens", toggle, { "aria-pressed": String(!asText.has(version)) }));
    }
    const notes = [];
    if (version.stopped) notes.push("stopped");
    if (step.finish === "length") notes.push("cut at the token limit");
    if (step.usage?.completion_tokens) notes.push(`${step.usage.completion_tokens} tokens`);
    return [...buttons, el("span.notes", {}, notes.join(" · "))];
  }

  update();
  return { node, update, soon };
}

/** A folded part. */
function fold(kind, title, ...content) {
  return el(`details.fold.${kind}`, {}, el("summary", {}, title), el("div.fold-body", {}, ...content));
}

function brief(text) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > 80 ? `${line.slice(0, 79)}…` : line;
}

/** What a model thought, told apart by the server or still between <think> and </think>, and the rest. */
function splitThought({ content, reasoning }) {
  if (reasoning) return { thought: reasoning, rest: content, thinking: !content };
  const match = /^\s*<think>([\s\S]*?)(<\/think>|$)/.exec(content);
  if (!match) return { thought: "", rest: content, thinking: false };
  return { thought: match[1].trim(), rest: content.slice(match[0].length), thinking: !match[2] };
}

function withCopyButtons(prose) {
  for (const pre of prose.querySelectorAll("pre")) {
    const code = pre.querySelector("code");
    const language = /language-(\S+)/.exec(code?.className ?? "")?.[1] ?? "";
    const head = el("div.code-head", {}, el("span", {}, language), iconButton("copy", "Copy code", () => copyText(code?.textContent ?? "")));
    const box = el("div.code");
    pre.replaceWith(box);
    box.append(head, pre);
  }
  for (const table of prose.querySelectorAll("table")) {
    const box = el("div.table");
    table.replaceWith(box);
    box.append(table);
  }
  return prose;
}
