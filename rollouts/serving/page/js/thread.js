// The conversation itself: turns, each with what was asked and the replies side by side.
import { byId, copyText, el, iconButton } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { replyView } from "./reply.js";

const views = new Map(); // reply -> view, of the conversation that is shown

/** Draw a conversation anew. `actions`: regenerate, choose, send (of a turn and a reply), edit (of a turn, a text). */
export function drawThread(conversation, actions) {
  const thread = byId("thread");
  views.clear();
  if (!conversation.turns.length) {
    thread.replaceChildren(welcome(conversation));
    return;
  }
  thread.replaceChildren(...conversation.turns.map((turn, index) => drawTurn(turn, index, actions)));
}

/** Draw one reply again: at once, or soon while it streams. */
export function updateReply(reply, now = false) {
  const view = views.get(reply);
  if (!view) return;
  if (now) view.update();
  else view.soon();
}

function drawTurn(turn, index, actions) {
  const named = turn.replies.length > 1;
  const replies = turn.replies.map((reply) => {
    const own = {
      regenerate: () => actions.regenerate(index, reply),
      choose: (version) => actions.choose(index, reply, version),
      send: () => actions.send(index, reply),
    };
    const view = replyView(reply, { named, actions: own });
    views.set(reply, view);
    return view.node;
  });
  const grid = el("div.replies", {}, replies);
  grid.classList.toggle("many", named);
  return el("section.turn", {}, question(turn, index, actions), grid);
}

function question(turn, index, actions) {
  const node = el("div.question");
  const show = () => {
    const tools = el(
      "div.question-tools", {},
      iconButton("copy", "Copy", () => copyText(turn.user)),
      iconButton("pen", "Edit", edit),
    );
    node.replaceChildren(el("div.bubble", {}, renderMarkdown(turn.user)), tools);
  };
  const edit = () => {
    const field = el("textarea", { value: turn.user, rows: 3, "aria-label": "Edit the message" });
    const send = () => field.value.trim() && actions.edit(index, field.value);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        show();
      }
    });
    const buttons = el(
      "div.edit-buttons", {},
      el("button.outline-button", { type: "button", onclick: show }, "Cancel"),
      el("button.main-button", { type: "button", onclick: send }, "Send again"),
    );
    node.replaceChildren(el("div.edit", {}, field, buttons));
    grow(field);
    field.addEventListener("input", () => grow(field));
    field.focus();
  };
  node.addEventListener("edit", edit);
  show();
  return node;
}

/** Open the last message for editing. */
export function editLast() {
  const questions = byId("thread").querySelectorAll(".question");
  if (questions.length) questions[questions.length - 1].dispatchEvent(new Event("edit"));
}

/** Make a text field as tall as its text. */
export function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

function welcome(conversation) {
  const models = conversation.models.join(" and ");
  return el("div.welcome", {}, el("h2", {}, "What shall we talk about?"), el("p", {}, models ? `${models} will answer.` : "No model is chosen."));
}
