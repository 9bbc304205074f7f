// A reply as its tokens: the less likely a token was, the stronger its color; its alternatives on hover, focus or tap.
import { byId, el } from "./dom.js";

/** An element with the tokens of a step. It is one stop of the Tab key; arrow keys go from token to token. */
export function tokenView(tokens) {
  const nodes = tokens.map((token, index) => {
    const node = el("span.token", { tabIndex: index ? -1 : 0 }, visible(token.text));
    node.style.setProperty("--surprise", surprise(token.logprob).toFixed(3));
    node.dataset.index = index;
    return node;
  });
  const box = el("div.tokens", { role: "group", "aria-label": "Tokens and their probabilities" });
  nodes.forEach((node, index) => {
    box.append(node);
    if (tokens[index].text.includes("\n")) box.append(el("br"));
  });
  const of = (event) => event.target.closest(".token");
  const show = (event) => {
    const node = of(event);
    if (node) showTip(node, tokens[Number(node.dataset.index)]);
  };
  box.addEventListener("pointerover", show);
  box.addEventListener("focusin", show);
  box.addEventListener("pointerleave", hideTip);
  box.addEventListener("focusout", hideTip);
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const next = step && of(event) && nodes[Number(of(event).dataset.index) + step];
    if (event.key === "Escape") hideTip();
    if (!next) return;
    event.preventDefault();
    of(event).tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  return box;
}

/** 0 for a certain token, 1 for one of a probability of 1 % or less. */
export function surprise(logprob) {
  return Math.min(Math.max(-logprob / Math.log(100), 0), 1);
}

export function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return value >= 99.95 ? "100 %" : value >= 0.1 ? `${value.toFixed(1)} %` : "< 0.1 %";
}

/** White space of a token as signs, where it would not show. */
function visible(text) {
  if (text === "") return "∅";
  return text.replace(/\n/g, "↵").replace(/\t/g, "⇥");
}

const named = (text) => visible(text).replace(/^ | $/g, "·");

function showTip(node, token) {
  const tip = byId("token-tip");
  const rows = token.top.some((one) => one.text === token.text) ? token.top : [...token.top, token];
  tip.replaceChildren(
    ...rows.map((one) => {
      const bar = el("span.bar");
      bar.style.setProperty("--share", Math.exp(one.logprob).toFixed(4));
      const chosen = one.text === token.text;
      return el(chosen ? "div.row.chosen" : "div.row", {}, el("code", {}, named(one.text)), bar, el("span.percent", {}, percent(one.logprob)));
    }),
  );
  tip.hidden = false;
  place(node);
}

function place(node) {
  const tip = byId("token-tip");
  const at = node.getClientRects()[0] ?? node.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const left = Math.min(Math.max(at.left, 8), innerWidth - size.width - 8);
  const above = at.top - size.height - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : at.bottom + 6}px`;
}

/** When the thread scrolls: the tip stays with a focused token, which may be why it scrolls, and else goes. */
export function followTip() {
  const focused = document.activeElement;
  if (!byId("token-tip").hidden && focused?.classList.contains("token")) place(focused);
  else hideTip();
}

export function hideTip() {
  byId("token-tip").hidden = true;
}
