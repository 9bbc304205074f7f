// The page's wiring: what is open, what buttons and keys do.
import { listModels, setKey } from "./api.js";
import { currentVersion, exported, imported, newConversation, newId, newVersion, titleOf } from "./conversation.js";
import { byId, download, el, icon, iconButton, toast } from "./dom.js";
import { continueWithResults, generate, runsIn, stop } from "./generate.js";
import { openSettings } from "./settings.js";
import { drawSidebar, renameField } from "./sidebar.js";
import { loadAll, preference, remove, restore, save } from "./store.js";
import { drawThread, editLast, grow, updateReply } from "./thread.js";
import { followTip, hideTip } from "./tokens.js";

let models = []; // names that the server answers to
let conversations = []; // the latest first
let current = null;
let following = true; // whether the thread keeps its end in view

const mac = /Mac|iPhone|iPad/.test(navigator.platform);
const MOD = mac ? "⌘" : "Ctrl";
const SHORTCUTS = [
  ["Enter", "Send"],
  ["Shift Enter", "A new line"],
  ["Esc", "Stop the reply"],
  ["↑", "Edit the last message, when the field is empty"],
  [`${MOD} Shift O`, "New conversation"],
  [`${MOD} K`, "Search"],
  [`${MOD} B`, "Show or hide the conversations"],
  [`${MOD} ,`, "Settings"],
  [`${MOD} Shift E`, "Export"],
  ["← →", "From token to token"],
  ["?", "These shortcuts"],
];

// -- what is shown ----------------------------------------------------------------------------------------------------

function drawAll() {
  drawList();
  drawThread(current, threadActions);
  drawBar();
  followEnd(true);
}

function drawList() {
  const listed = current.turns.length ? [current, ...conversations.filter((one) => one !== current)] : conversations;
  const order = listed.filter((one) => one.turns.length).sort((a, b) => b.updated - a.updated);
  drawSidebar(order, current, { open, rename, remove: removeConversation });
}

function drawBar() {
  const title = titleOf(current);
  byId("title").replaceChildren(title);
  document.title = current.turns.length ? `${title} · rollouts` : "rollouts";
  const [first, ...others] = current.models;
  byId("models-label").textContent = first ? `${first}${others.length ? ` +${others.length}` : ""}` : "No model";
  byId("probabilities").setAttribute("aria-pressed", String(current.tokens));
  drawModels();
  drawSend();
}

function drawModels() {
  const names = [...new Set([...models, ...current.models])];
  byId("models-panel").replaceChildren(
    ...names.map((name) => {
      const box = el("input", { type: "checkbox", checked: current.models.includes(name), disabled: !models.includes(name) && !current.models.includes(name) });
      box.addEventListener("change", () => {
        current.models = names.filter((one) => (one === name ? box.checked : current.models.includes(one)));
        keep();
        drawBar();
        if (!current.turns.length) drawThread(current, threadActions);
      });
      return el("label.choice", {}, box, el("span", {}, name), !models.includes(name) && el("span.hint", {}, "not served"));
    }),
  );
}

function drawSend() {
  const button = byId("send");
  const busy = runsIn(current);
  button.replaceChildren(icon(busy ? "stop" : "up"));
  button.setAttribute("aria-label", busy ? "Stop" : "Send");
  button.title = busy ? "Stop (Esc)" : "Send (Enter)";
  button.classList.toggle("busy", busy);
  button.disabled = !busy && (!byId("message").value.trim() || !current.models.length);
}

function followEnd(now = false) {
  const thread = byId("thread");
  if (now) following = true;
  if (following) thread.scrollTop = thread.scrollHeight;
}

// -- conversations ----------------------------------------------------------------------------------------------------

function open(conversation) {
  current = conversation;
  hideTip();
  preference("last", conversation.id);
  drawAll();
  showSidebar(false);
}

function startNew() {
  open(newConversation(servedOf(current?.models ?? []), current));
  byId("message").focus();
}

/** The models that are still served, or the first one. */
function servedOf(names) {
  const kept = names.filter((name) => models.includes(name));
  return kept.length ? kept : models.slice(0, 1);
}

function keep() {
  if (!current.turns.length) return;
  if (!conversations.includes(current)) conversations.unshift(current);
  preference("last", current.id);
  save(current).catch(() => toast("The browser does not keep conversations here"));
}

function rename(conversation, name) {
  if (name !== null) {
    conversation.title = name;
    save(conversation);
  }
  drawList();
  drawBar();
}

function removeConversation(conversation) {
  stop(conversation);
  conversations = conversations.filter((one) => one !== conversation);
  remove(conversation.id);
  if (conversation === current) startNew();
  else drawList();
  toast(`Deleted “${titleOf(conversation)}”`, "Undo", () => {
    conversations.unshift(conversation);
    restore(conversation);
    open(conversation);
  });
}

function exportCurrent() {
  const name = titleOf(current).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "conversation";
  download(`${name}.json`, `${JSON.stringify(exported(current), null, 2)}\n`);
}

async function importFile(file) {
  try {
    const conversation = imported(JSON.parse(await file.text()));
    conversations.unshift(conversation);
    await save(conversation);
    open(conversation);
  } catch (error) {
    toast(error instanceof SyntaxError ? "This file is not JSON" : error.message);
  }
}

// -- messages ---------------------------------------------------------------------------------------------------------

function ask(text) {
  current.models = servedOf(current.models);
  current.turns.push({ id: newId(), user: text, replies: current.models.map((model) => ({ model, current: 0, versions: [newVersion()] })) });
  current.updated = Date.now();
  keep();
  drawAll();
  const index = current.turns.length - 1;
  for (const reply of current.turns[index].replies) run(generate, index, reply);
}

/** Run one reply of the current conversation, and draw it as it grows. */
function run(work, index, reply) {
  const conversation = current;
  let live = null;
  work(conversation, index, reply, () => {
    const version = currentVersion(reply);
    const runs = runsIn(conversation);
    if (conversation !== current) return;
    updateReply(reply, runs !== live || version.error !== null || version.stopped);
    if (runs !== live) drawSend();
    live = runs;
    requestAnimationFrame(() => followEnd());
  }).finally(() => {
    if (conversation !== current) return;
    updateReply(reply, true);
    drawSend();
    drawList();
    followEnd();
    byId("announcement").textContent = runsIn(conversation) ? "" : "The reply is complete.";
  });
}

/** Drop the turns from `count` on, and end what runs in them. */
function keepTurns(count) {
  if (current.turns.length > count) stop(current);
  current.turns.length = count;
}

const threadActions = {
  regenerate(index, reply) {
    keepTurns(index + 1);
    reply.versions.push(newVersion());
    reply.current = reply.versions.length - 1;
    drawAll();
    run(generate, index, reply);
  },
  choose(index, reply, version) {
    reply.current = version;
    keep();
    updateReply(reply, true);
  },
  send(index, reply) {
    keepTurns(index + 1);
    drawAll();
    run(continueWithResults, index, reply);
  },
  edit(index, text) {
    keepTurns(index);
    ask(text);
  },
};

function submit() {
  const field = byId("message");
  if (runsIn(current)) {
    stop(current);
    return;
  }
  const text = field.value.trim();
  if (!text) return;
  if (!models.length) {
    connect();
    return;
  }
  field.value = "";
  grow(field);
  ask(text);
}

// -- panels -----------------------------------------------------------------------------------------------------------

function showSidebar(shown) {
  const narrow = matchMedia("(max-width: 800px)").matches;
  if (narrow) {
    document.body.classList.toggle("sidebar-shown", shown);
    byId("veil").hidden = !shown;
    byId("sidebar").inert = !shown;
  } else if (shown !== false) {
    const hidden = document.body.classList.toggle("sidebar-hidden");
    byId("sidebar").inert = hidden;
  }
}

function toggleSidebar() {
  showSidebar(!document.body.classList.contains("sidebar-shown"));
}

function showShortcuts() {
  const card = byId("shortcuts");
  card.replaceChildren(
    el("header", {}, el("h2", { id: "shortcuts-heading" }, "Shortcuts"), iconButton("close", "Close", () => card.close())),
    el("dl", {}, SHORTCUTS.map(([keys, what]) => [el("dt", {}, keys.split(" ").map((key) => el("kbd", {}, key))), el("dd", {}, what)]).flat()),
  );
  card.showModal();
}

function askForKey() {
  const card = byId("key");
  if (card.open) return;
  const field = el("input", { type: "password", autocomplete: "off", "aria-label": "API key", placeholder: "API key" });
  const form = el("form", { method: "dialog" },
    el("h2", { id: "key-heading" }, "This server needs a key"),
    el("p.note", {}, "The one it was started with: --api-key or ROLLOUTS_API_KEY. It is kept until this tab is closed."),
    field, el("button.main-button", { type: "submit" }, "Connect"));
  form.addEventListener("submit", () => {
    setKey(field.value.trim());
    connect();
  });
  card.replaceChildren(form);
  card.showModal();
}

const THEMES = ["auto", "light", "dark"];

function drawTheme() {
  const theme = document.documentElement.dataset.theme;
  const button = byId("theme");
  button.replaceChildren(icon({ auto: "auto", light: "sun", dark: "moon" }[theme]));
  button.title = `Theme: ${theme}`;
  button.setAttribute("aria-label", `Theme: ${theme}`);
}

function nextTheme() {
  const root = document.documentElement;
  root.dataset.theme = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
  preference("theme", root.dataset.theme);
  drawTheme();
}

function closeMenus(except = null) {
  for (const menu of document.querySelectorAll("details.menu[open]")) if (menu !== except) menu.open = false;
}

function renameInPlace() {
  closeMenus();
  const conversation = current;
  byId("title").replaceChildren(renameField(titleOf(conversation), (name) => rename(conversation, name)));
}

// -- keys -------------------------------------------------------------------------------------------------------------

function onKey(event) {
  const mod = mac ? event.metaKey : event.ctrlKey;
  const key = event.key.toLowerCase();
  const typing = event.target.closest?.("input, textarea, select");
  const modal = document.querySelector("dialog[open]");
  const act = (work) => {
    event.preventDefault();
    work();
  };
  if (key === "escape" && !modal) {
    const menu = document.querySelector("details.menu[open]");
    if (menu) {
      closeMenus();
      menu.querySelector("summary").focus();
    } else if (document.body.classList.contains("sidebar-shown")) showSidebar(false);
    else if (runsIn(current)) stop(current);
  } else if (modal) {
    return;
  } else if (mod && event.shiftKey && key === "o") act(startNew);
  else if (mod && event.shiftKey && key === "e") act(exportCurrent);
  else if (mod && key === "k") {
    act(() => {
      if (byId("sidebar").inert) toggleSidebar();
      byId("search").focus();
    });
  } else if (mod && key === "b") act(toggleSidebar);
  else if (mod && key === ",") act(() => openSettings(current, keep));
  else if (event.key === "?" && !typing) act(showShortcuts);
}

function onMessageKey(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!runsIn(current)) submit();
  } else if (event.key === "ArrowUp" && !event.target.value && !runsIn(current)) {
    event.preventDefault();
    editLast();
  }
}

// -- start ------------------------------------------------------------------------------------------------------------

async function connect() {
  try {
    models = await listModels();
    current.models = servedOf(current.models);
    byId("problem").textContent = "";
  } catch (error) {
    if (error.status === 401) askForKey();
    else byId("problem").textContent = error.message;
  }
  drawAll();
}

function listen() {
  for (const node of document.querySelectorAll("[data-icon]")) node.replaceChildren(icon(node.dataset.icon));
  const field = byId("message");
  const on = (id, what, work) => byId(id).addEventListener(what, work);
  on("composer", "submit", (event) => (event.preventDefault(), submit()));
  on("message", "keydown", onMessageKey);
  on("message", "input", () => (grow(field), drawSend()));
  on("new", "click", startNew);
  on("search", "input", drawList);
  on("sidebar-toggle", "click", toggleSidebar);
  on("veil", "click", () => showSidebar(false));
  on("theme", "click", nextTheme);
  on("shortcuts-button", "click", showShortcuts);
  on("settings-button", "click", () => openSettings(current, keep));
  on("title", "dblclick", renameInPlace);
  on("rename", "click", renameInPlace);
  on("export", "click", () => (closeMenus(), exportCurrent()));
  on("delete", "click", () => (closeMenus(), removeConversation(current)));
  on("import", "click", () => byId("import-file").click());
  on("import-file", "change", (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) importFile(file);
  });
  on("probabilities", "click", () => {
    current.tokens = !current.tokens;
    keep();
    drawBar();
    toast(current.tokens ? "New replies show how likely each token was" : "New replies are plain text");
  });
  on("thread", "scroll", () => {
    const thread = byId("thread");
    following = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 80;
    followTip();
  });
  addEventListener("keydown", onKey);
  addEventListener("key-needed", askForKey);
  addEventListener("click", (event) => closeMenus(event.target.closest("details.menu")));
  document.body.addEventListener("dragover", (event) => event.preventDefault());
  document.body.addEventListener("drop", (event) => {
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) importFile(file);
  });
  byId("sidebar").inert = matchMedia("(max-width: 800px)").matches;
  drawTheme();
}

async function main() {
  listen();
  conversations = await loadAll().catch(() => []);
  current = conversations.find((one) => one.id === preference("last")) ?? newConversation([]);
  await connect();
  byId("message").focus({ preventScroll: true });
  document.documentElement.dataset.ready = "true";
}

main();
