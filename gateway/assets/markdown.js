// Markdown to DOM nodes.  Text never becomes markup: every node is made by name and filled as text, links go to
// http, https and mailto only, and a picture's address is a link, so that an answer can fetch nothing.

const LINK = /^(https?:|mailto:)/i;
const MAX_NESTING = 8;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*?)(?: +#+)? *$/;
const FENCE = /^ {0,3}(`{3,}|~{3,}) *([\w+#.-]*)[^`]*$/;
const DIVIDER = /^ *\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;

// Brings `container` up to date; blocks that are as before keep their nodes, and with them a reader's selection.
export function renderMarkdown(container, text) {
  const sources = blocks(text.split("\n"));
  const known = container.sources ?? [];
  let same = 0;
  while (same < known.length && same < sources.length && known[same] === sources[same]) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const source of sources.slice(same)) container.append(block(source.split("\n"), 0));
  container.sources = sources;
}

// The source of each top-level block.
function blocks(lines) {
  const found = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const end = blockEnd(lines, at);
    found.push(lines.slice(at, end).join("\n"));
    at = end;
  }
  return found;
}

function blockEnd(lines, start) {
  const fence = FENCE.exec(lines[start]);
  if (fence) {
    const close = lines.findIndex((line, at) => at > start && closes(line, fence[1]));
    return close < 0 ? lines.length : close + 1;
  }
  if (HEADING.test(lines[start]) || RULE.test(lines[start])) return start + 1;
  const goesOn = continuation(lines, start);
  let end = start + 1;
  while (end < lines.length && goesOn(end)) end++;
  while (!lines[end - 1].trim()) end--;
  return end;
}

function closes(line, fence) {
  const mark = line.trim();
  return mark.length >= fence.length && mark === fence[0].repeat(mark.length);
}

// Whether the line at an index belongs to the block that begins at `start`.
function continuation(lines, start) {
  if (ITEM.test(lines[start])) {
    const isItem = (at) => ITEM.test(lines[at] ?? "") || /^ {2,}\S/.test(lines[at] ?? "");
    return (at) => (lines[at].trim() ? isItem(at) || !isStart(lines[at]) && lines[at - 1].trim() : isItem(at + 1));
  }
  if (lines[start].startsWith(">")) return (at) => lines[at].startsWith(">");
  if (isTable(lines, start)) return (at) => lines[at].includes("|");
  return (at) => lines[at].trim() && !isStart(lines[at]) && !isTable(lines, at);
}

function isStart(line) {
  return HEADING.test(line) || RULE.test(line) || FENCE.test(line) || ITEM.test(line) || line.startsWith(">");
}

function isTable(lines, at) {
  const divider = lines[at + 1] ?? "";
  return lines[at].includes("|") && divider.includes("-") && divider.includes("|") && DIVIDER.test(divider);
}

function block(lines, depth) {
  const fence = FENCE.exec(lines[0]);
  if (fence) {
    const body = lines.slice(1, lines.length > 1 && closes(lines.at(-1), fence[1]) ? -1 : undefined);
    return element("pre", [element("code", [body.join("\n")])]);
  }
  const heading = HEADING.exec(lines[0]);
  if (heading) return element(`h${heading[1].length}`, inline(heading[2]));
  if (RULE.test(lines[0])) return element("hr");
  if (lines[0].startsWith(">") && depth < MAX_NESTING) {
    const inner = blocks(lines.map((line) => line.replace(/^> ?/, "")));
    return element("blockquote", inner.map((source) => block(source.split("\n"), depth + 1)));
  }
  if (ITEM.test(lines[0]) && depth < MAX_NESTING) return list(lines, depth);
  if (isTable(lines, 0)) return table(lines);
  return element("p", inlineLines(lines));
}

function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) items.push([item[3]]);
    else items.at(-1).push(line.replace(/^ {1,4}/, ""));
  }
  const isOrdered = /\d/.test(mark);
  const node = element(isOrdered ? "ol" : "ul", items.map((item) => listItem(item, depth)));
  if (isOrdered && Number.parseInt(mark) !== 1) node.start = Number.parseInt(mark);
  return node;
}

function listItem(lines, depth) {
  const end = lines.findIndex((line, at) => at > 0 && (!line.trim() || isStart(line)));
  const [head, rest] = end < 0 ? [lines, []] : [lines.slice(0, end), lines.slice(end)];
  const nested = blocks(rest).map((source) => block(source.split("\n"), depth + 1));
  return element("li", [...inlineLines(head), ...nested]);
}

function table(lines) {
  const sides = cells(lines[1]).map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : ""));
  const row = (line, name) => element("tr", cells(line).map((text, at) => {
    const cell = element(name, inline(text));
    if (sides[at]) cell.className = sides[at];
    return cell;
  }));
  const head = element("thead", [row(lines[0], "th")]);
  const body = element("tbody", lines.slice(2).map((line) => row(line, "td")));
  const box = element("div", [element("table", [head, body])]);
  box.className = "table";
  return box;
}

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());
}

// Two spaces or a backslash at a line's end break it.
function inlineLines(lines) {
  const parts = [];
  lines.forEach((line, at) => {
    const isLast = at === lines.length - 1;
    parts.push(...inline(line.trim().replace(/\\$/, isLast ? "\\" : "")));
    if (!isLast) parts.push(/( {2}|\\)$/.test(line) ? element("br") : " ");
  });
  return parts;
}

const SPANS = [
  [/^(`+)([^`]|[^`].*?[^`])\1(?!`)/, (match) => element("code", [match[2].replace(/^ (.*) $/, "$1")])],
  [/^!?\[([^\]]*)\]\(<?([^\s)>]+)>?(?: +"[^"]*")?\)/, (match, depth) => link(match[2], inline(match[1], depth + 1), match[0])],
  [/^<((?:https?:|mailto:)[^\s<>]+)>/i, (match) => link(match[1], [match[1]], match[0])],
  [/^https?:\/\/[^\s<>()[\]]*[^\s<>()[\].,;:!?'"*_]/i, (match) => link(match[0], [match[0]], match[0])],
  [/^(\*\*|__)(?=\S)(.+?\S|\S)\1/, (match, depth) => element("strong", inline(match[2], depth + 1))],
  [/^(\*)(?=[^\s*])([^*]*[^\s*])\*/, (match, depth) => element("em", inline(match[2], depth + 1))],
  [/^~~(?=\S)(.+?)~~/, (match, depth) => element("del", inline(match[1], depth + 1))],
  [/^\\([!-/:-@[-`{-~])/, (match) => match[1]],
];
const SPECIAL = /[`![<*_~\\]|https?:\/\//gi;
// A span is looked for in so much text: an answer full of opening marks must not cost the square of its length.
const MAX_SPAN_CHARS = 2000;

function inline(text, depth = 0) {
  if (depth > MAX_NESTING) return [text];
  const parts = [];
  let start = 0;
  SPECIAL.lastIndex = 0;
  for (let found; (found = SPECIAL.exec(text));) {
    const rest = text.slice(found.index, found.index + MAX_SPAN_CHARS);
    const span = spanOf(rest, depth);
    if (span) {
      parts.push(text.slice(start, found.index), span.node);
      start = found.index + span.length;
    }
    SPECIAL.lastIndex = span ? start : found.index + run(rest);
  }
  parts.push(text.slice(start));
  return parts;
}

// Marks without a partner are text, and so are those beside them.
function run(rest) {
  return /^(.)\1*/s.exec(rest)[0].length;
}

function spanOf(rest, depth) {
  for (const [pattern, make] of SPANS) {
    const match = pattern.exec(rest);
    if (match) {
      const at = SPECIAL.lastIndex;  // `make` may read spans inside this one
      const node = make(match, depth);
      SPECIAL.lastIndex = at;
      return { node, length: match[0].length };
    }
  }
  return null;
}

function link(address, parts, source) {
  if (!LINK.test(address)) return source;
  const node = element("a", parts);
  node.href = address;
  node.target = "_blank";
  node.rel = "noopener noreferrer";
  return node;
}

function element(name, children = []) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}
