// The list of conversations.
import { matches, titleOf } from "./conversation.js";
import { byId, el, iconButton } from "./dom.js";

/** Draw the list. `actions`: open, rename (with a new title), remove. */
export function drawSidebar(conversations, current, actions) {
  const words = byId("search").value;
  const found = conversations.filter((one) => matches(one, words));
  const groups = new Map();
  for (const one of found) {
    const day = dayOf(one.updated);
    groups.set(day, [...(groups.get(day) ?? []), one]);
  }
  const nodes = [...groups].map(([day, members]) =>
    el("section", {}, el("h2", {}, day), el("ul", {}, members.map((one) => item(one, one === current, actions)))),
  );
  if (!found.length) nodes.push(el("p.nothing", {}, words.trim() ? "Nothing found" : "Nothing here yet"));
  byId("conversations").replaceChildren(...nodes);
}

function item(conversation, selected, actions) {
  const title = titleOf(conversation);
  const link = el("button.conversation", { type: "button", title, onclick: () => actions.open(conversation) }, title);
  if (selected) link.setAttribute("aria-current", "true");
  const node = el("li", {}, link);
  const rename = () => node.replaceChildren(renameField(title, (name) => actions.rename(conversation, name)));
  link.addEventListener("dblclick", rename);
  node.append(
    el("span.item-tools", {}, iconButton("pen", `Rename ${title}`, rename), iconButton("trash", `Delete ${title}`, () => actions.remove(conversation))),
  );
  return node;
}

/** A field in place of a title: Enter or leaving it keeps the text, Escape does not. */
export function renameField(title, done) {
  let finished = false;
  const finish = (name) => {
    if (finished) return;
    finished = true;
    done(name);
  };
  const field = el("input.rename", {
    value: title, "aria-label": "Title", maxLength: 200,
    onblur: () => finish(field.value.trim()),
    onkeydown: (event) => {
      if (event.key === "Enter") finish(field.value.trim());
      if (event.key === "Escape") {
        event.stopPropagation();
        finish(null);
      }
    },
  });
  requestAnimationFrame(() => {
    field.focus();
    field.select();
  });
  return field;
}

function dayOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - 86400000) return "Yesterday";
  if (time >= midnight - 6 * 86400000) return "This week";
  return "Earlier";
}
