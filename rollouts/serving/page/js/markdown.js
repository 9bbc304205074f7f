// The one place where text becomes markup.
//
//   text -> markdown-it (raw HTML stays text) -> inert fragment -> mathematics, highlighted code -> DOMPurify -> page
//
// The last step sees the finished tree, in place: nothing is parsed again after it, so nothing can change its meaning.
/* global markdownit, DOMPurify, katex, hljs */

const LINKS = /^(?:https?|mailto):/i;
const MAX_TEX = 4000; // characters of one formula
const MAX_CODE = 40000; // characters that are still highlighted

const TEXT_TAGS = [
  "a", "blockquote", "br", "code", "del", "div", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s",
  "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
];
const PLAIN_ATTRIBUTES = ["class", "start"]; // those that hold no address: the rule for links is not for them
const RULES = {
  ALLOWED_TAGS: TEXT_TAGS,
  ALLOWED_ATTR: ["href", ...PLAIN_ATTRIBUTES],
  ADD_URI_SAFE_ATTR: PLAIN_ATTRIBUTES,
  ALLOWED_URI_REGEXP: LINKS,
  ALLOW_DATA_ATTR: false,
};
// What KaTeX draws: spans with lengths, and the curves of roots and braces.
const DRAWING_ATTRIBUTES = [
  "style", "role", "aria-label", "aria-hidden", "target", "rel", "xmlns", "width", "height", "viewBox", "preserveAspectRatio",
  "d", "x1", "x2", "y1", "y2", "stroke-width",
];
const FINAL_RULES = {
  ...RULES,
  ALLOWED_TAGS: [...TEXT_TAGS, "svg", "path", "line"],
  ALLOWED_ATTR: [...RULES.ALLOWED_ATTR, ...DRAWING_ATTRIBUTES],
  ADD_URI_SAFE_ATTR: [...PLAIN_ATTRIBUTES, ...DRAWING_ATTRIBUTES],
  IN_PLACE: true,
};

const md = markdownit({ html: false, linkify: true, maxNesting: 40 });
md.validateLink = (url) => LINKS.test(url.trim());
md.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
md.inline.ruler.before("escape", "math", inlineMath);
md.block.ruler.before("fence", "math", blockMath, { alt: ["paragraph", "blockquote", "list"] });
md.renderer.rules.math = (tokens, index) => mathMarkup(tokens[index]);
// An image would be fetched from where its writer likes: it is shown as a link that a person may follow.
md.renderer.rules.image = (tokens, index) => {
  const escape = md.utils.escapeHtml;
  const source = tokens[index].attrGet("src") ?? "";
  return `<a href="${escape(source)}">${escape(tokens[index].content || source)}</a>`;
};

/** Markdown as an element that is safe to show. */
export function renderMarkdown(text) {
  const root = document.createElement("div");
  root.className = "prose";
  root.append(DOMPurify.sanitize(md.render(text), { ...RULES, RETURN_DOM_FRAGMENT: true }));
  for (const formula of root.querySelectorAll("span.math")) drawMath(formula);
  for (const code of root.querySelectorAll("pre > code")) highlight(code);
  for (const link of root.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  DOMPurify.sanitize(root, FINAL_RULES);
  return root;
}

/** JSON text, highlighted, as an element; other text as it is. */
export function renderJson(text) {
  const pre = document.createElement("pre");
  const code = document.createElement("code");
  code.className = "language-json";
  try {
    code.textContent = JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    code.textContent = text;
  }
  pre.append(code);
  highlight(code);
  DOMPurify.sanitize(pre, FINAL_RULES);
  return pre;
}

function highlight(code) {
  const language = /language-(\S+)/.exec(code.className)?.[1] ?? "";
  code.className = "";
  if (!hljs.getLanguage(language) || code.textContent.length > MAX_CODE) return;
  code.className = `hljs language-${language.toLowerCase().replace(/[^a-z0-9+#-]/g, "")}`;
  const markup = hljs.highlight(code.textContent, { language, ignoreIllegals: true }).value;
  code.replaceChildren(
    DOMPurify.sanitize(markup, { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true }),
  );
}

function drawMath(formula) {
  const tex = formula.textContent;
  const displayMode = formula.classList.contains("display");
  formula.setAttribute("role", "math");
  formula.setAttribute("aria-label", tex);
  if (tex.length > MAX_TEX) return;
  try {
    // Drawn as nodes, with styles set one by one: the page's policy allows no style in markup.
    katex.render(tex, formula, {
      displayMode, output: "html", throwOnError: true, trust: false, strict: "ignore", maxSize: 20, maxExpand: 200,
    });
  } catch {
    formula.textContent = tex;
    formula.classList.add("broken");
  }
}

const mathMarkup = (token) =>
  `<span class="math ${token.meta.display ? "display" : "inline"}">${md.utils.escapeHtml(token.content)}</span>`;

const FENCES = [
  { open: "$$", close: "$$", display: true },
  { open: "\\[", close: "\\]", display: true },
  { open: "\\(", close: "\\)", display: false },
  { open: "$", close: "$", display: false },
];

function inlineMath(state, silent) {
  const fence = FENCES.find(({ open }) => state.src.startsWith(open, state.pos));
  if (!fence) return false;
  const start = state.pos + fence.open.length;
  const end = closing(state.src, fence.close, start, state.posMax);
  if (end < 0) return false;
  const tex = state.src.slice(start, end);
  if (!tex.trim()) return false;
  // $5 and $6: a dollar sign of money has a space inside, or a digit after it.
  if (fence.open === "$" && (/^\s|\s$/.test(tex) || /\d/.test(state.src[end + 1] ?? ""))) return false;
  if (!silent) push(state, tex, fence.display);
  state.pos = end + fence.close.length;
  return true;
}

function closing(source, close, from, limit) {
  let end = source.indexOf(close, from);
  while (end >= 0 && end < limit && close.startsWith("$") && source[end - 1] === "\\") end = source.indexOf(close, end + 1);
  return end >= 0 && end + close.length <= limit ? end : -1;
}

function blockMath(state, startLine, endLine, silent) {
  const start = state.bMarks[startLine] + state.tShift[startLine];
  const fence = FENCES.slice(0, 2).find(({ open }) => state.src.startsWith(open, start));
  if (!fence || state.sCount[startLine] - state.blkIndent >= 4) return false;
  let line = startLine;
  let lines = [state.src.slice(start + fence.open.length, state.eMarks[startLine])];
  while (!lines.at(-1).trimEnd().endsWith(fence.close)) {
    line += 1;
    if (line >= endLine || lines.at(-1).includes(fence.close)) return false; // open, or text follows: left to the inline rule
    lines.push(state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]));
  }
  const tex = lines.join("\n").trimEnd().slice(0, -fence.close.length);
  if (!tex.trim() || tex.includes(fence.close)) return false;
  if (silent) return true;
  push(state, tex, true).map = [startLine, line + 1];
  state.line = line + 1;
  return true;
}

function push(state, tex, display) {
  const token = state.push("math", "", 0);
  token.content = tex.trim();
  token.meta = { display };
  return token;
}
