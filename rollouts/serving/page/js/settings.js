// The sheet on the right: system prompt, sampling and tools of the conversation at hand.
import { SETTINGS, parseTools } from "./conversation.js";
import { byId, el, iconButton } from "./dom.js";

const TOOL_EXAMPLE = `[{"type": "function", "function": {"name": "add", "description": "Add two numbers",
  "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}}}]`;

/** Open the sheet for a conversation; `changed` is called after each change. */
export function openSettings(conversation, changed) {
  const sheet = byId("settings");
  const numbers = SETTINGS.map((setting) => numberField(setting, conversation, changed));
  const system = el("textarea", {
    id: "system", rows: 4, value: conversation.system, placeholder: "How the model should behave",
    oninput: (event) => {
      conversation.system = event.target.value;
      changed();
    },
  });
  const stops = el("textarea", {
    id: "stop", rows: 2, value: (conversation.settings.stop ?? []).join("\n"), placeholder: "None", spellcheck: false,
    oninput: (event) => {
      const lines = event.target.value.split("\n").filter(Boolean);
      conversation.settings.stop = lines.length ? lines : null;
      changed();
    },
  });
  const reset = () => {
    for (const name of Object.keys(conversation.settings)) conversation.settings[name] = null;
    changed();
    openSettings(conversation, changed);
  };
  sheet.replaceChildren(
    el("form.sheet-form", { method: "dialog" },
      el("header", {}, el("h2", { id: "settings-heading" }, "Settings"), iconButton("close", "Close", () => sheet.close())),
      el("section", {}, el("label", { htmlFor: "system" }, "System prompt"), system),
      el("section", {},
        el("div.section-head", {}, el("h3", {}, "Sampling"), el("button.quiet-button", { type: "button", onclick: reset }, "Reset")),
        el("p.note", {}, "An empty field leaves the choice to the server."),
        el("div.numbers", {}, numbers),
        el("label", { htmlFor: "stop" }, "Stop strings", el("span.hint", {}, "one a line")), stops,
      ),
      toolsSection(conversation, changed),
    ),
  );
  if (!sheet.open) sheet.showModal();
  sheet.onclick = (event) => event.target === sheet && sheet.close();
}

function numberField({ name, label, hint, min, max, step }, conversation, changed) {
  const field = el("input", {
    id: `setting-${name}`, type: "number", inputMode: "decimal", min, max, step: "any", placeholder: "auto", title: hint,
    value: conversation.settings[name] ?? "",
    oninput: () => {
      const value = field.value === "" ? null : Number(field.value);
      const whole = step === 1;
      const good = value === null || (value >= min && value <= max && (!whole || Number.isInteger(value)));
      field.setCustomValidity(good && !field.validity.badInput ? "" : `${whole ? "A whole number" : "A number"} from ${min} to ${max}`);
      problem.textContent = field.validationMessage;
      if (field.validationMessage) return;
      conversation.settings[name] = value;
      changed();
    },
  });
  const problem = el("span.field-problem", { role: "alert" });
  return el("div.field", {}, el("label", { htmlFor: field.id, title: hint }, label), field, problem);
}

function toolsSection(conversation, changed) {
  const problem = el("span.field-problem", { role: "alert" });
  const field = el("textarea.mono", {
    id: "tools", rows: 4, value: conversation.tools, placeholder: TOOL_EXAMPLE, spellcheck: false,
    oninput: () => {
      conversation.tools = field.value;
      problem.textContent = "";
      try {
        parseTools(field.value);
      } catch (error) {
        problem.textContent = error.message;
      }
      changed();
    },
  });
  return el("section", {}, el("label", { htmlFor: "tools" }, "Tools", el("span.hint", {}, "a JSON list of OpenAI functions")), field, problem);
}
