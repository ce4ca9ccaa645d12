// The page: attach, ask, watch.  A conversation lives here only; nothing is stored but the API key of this tab.

import { renderMarkdown } from "./markdown.js";
import { Medium, node, objection } from "./media.js";
import { RequestFailed, completion, servedModel } from "./stream.js";
import { Timings } from "./timings.js";

const KEY = "tessera-api-key";
const NEAR_END_PX = 120;
const part = (id) => document.getElementById(id);
const [conversation, welcome, question, attached] = ["conversation", "welcome", "question", "attached"].map(part);
const [send, files, drop, access] = ["send", "files", "drop", "access"].map(part);

let messages = [];  // {role, text, media}
let waiting = [];  // media that the next question will have
let running = null;  // the AbortController of the answer that streams
let model = "";

async function connect() {
  const status = part("model");
  const key = sessionStorage.getItem(KEY);
  part("refused").hidden = true;
  try {
    model = await servedModel(key);
    status.textContent = status.title = model;
    status.className = "ready";
    access.hidden = true;
  } catch (error) {
    status.textContent = error.status === 401 ? "locked" : "not ready";
    status.title = error.message;
    status.className = "down";
    access.hidden = error.status !== 401;
    if (error.status === 401 && key) refuse("The server does not know this key.");
  }
}

function refuse(reason) {
  sessionStorage.removeItem(KEY);
  part("refused").textContent = reason;
  part("refused").hidden = false;
}

function attach(list) {
  const problems = [];
  for (const file of list) {
    const problem = objection(file);
    if (problem) problems.push(problem);
    else addWaiting(new Medium(file));
  }
  if (problems.length) tell(problems.join(" "));
  question.focus();
}

function addWaiting(medium) {
  waiting.push(medium);
  const item = node("li");
  if (medium.isPicture) {
    const image = new Image();
    image.alt = medium.file.name;
    image.src = medium.url;
    image.addEventListener("error", () => image.replaceWith(node("span", "", medium.file.name)));
    item.append(image);
  } else {
    item.append(node("span", "", medium.file.name));
  }
  const remove = node("button", "", "×");
  remove.type = "button";
  remove.setAttribute("aria-label", `Remove ${medium.file.name}`);
  remove.addEventListener("click", () => {
    waiting = waiting.filter((other) => other !== medium);
    medium.dispose();
    item.remove();
    question.focus();
  });
  item.append(remove);
  attached.append(item);
}

function ask() {
  const text = question.value.trim();
  if (running || (!text && !waiting.length)) return;
  for (const medium of waiting) medium.mostTiles = Number(part("most").value);
  const turn = { role: "user", text, media: waiting };
  waiting = [];
  attached.replaceChildren();
  question.value = "";
  resize();
  messages.push(turn);
  showQuestion(turn);
  answer();
}

function showQuestion(turn) {
  welcome.hidden = true;
  const element = node("article", "turn user");
  element.setAttribute("aria-label", "You");
  if (turn.media.length) {
    const media = node("div", turn.media.length > 1 ? "media several" : "media");
    media.append(...turn.media.map((medium) => medium.figure));
    element.append(media);
  }
  if (turn.text) element.append(node("p", "bubble", turn.text));
  conversation.append(element);
}

// Streams the answer to the conversation as it is; what went wrong stands where the answer would.
async function answer() {
  const turns = messages;  // another list once the conversation is cleared
  const media = turns.flatMap((turn) => turn.media);
  const fresh = turns.at(-1).media;
  const view = answerView(fresh.length > 0);
  setRunning(new AbortController());
  fresh.forEach((medium) => medium.frame.classList.add("reading"));
  scrollTo({ top: document.body.scrollHeight });
  let reason = "";
  try {
    const body = { model: model || undefined, messages: await Promise.all(turns.map(chatMessage)) };
    for await (const chunk of completion(body, sessionStorage.getItem(KEY), running.signal)) {
      chunk.details?.media?.forEach((parts, at) => media[at]?.show(parts));
      view.timings.note(chunk);
      view.add(chunk.choices[0]?.delta.content ?? "");
      reason = chunk.choices[0]?.finish_reason ?? reason;
    }
    view.end(reason === "length" ? "It was cut off: the model has no room for more." : "");
  } catch (error) {
    fail(view, error);
  } finally {
    fresh.forEach((medium) => medium.frame.classList.remove("reading"));
    setRunning(null);
    if (view.text) turns.push({ role: "assistant", text: view.text, media: [] });
  }
}

function fail(view, error) {
  if (error.name === "AbortError") {
    view.end("Stopped.");
    return;
  }
  view.end();
  const problem = node("p", "problem", error.message);
  problem.setAttribute("role", "alert");
  if (!view.text) {
    view.timings.element.remove();
    const retry = node("button", "quiet", "Try again");
    retry.type = "button";
    retry.addEventListener("click", () => {
      if (running) return;
      view.element.remove();
      answer();
    });
    problem.append(retry);
  }
  view.element.append(problem);
  scrollTo({ top: document.documentElement.scrollHeight });
  if (error instanceof RequestFailed && error.status === 401) connect();
}

function answerView(hasMedia) {
  const element = node("article", "turn assistant busy");
  element.setAttribute("aria-label", "Answer");
  const body = node("div", "answer");
  body.setAttribute("aria-live", "polite");
  body.setAttribute("aria-busy", "true");
  const timings = new Timings(hasMedia);
  element.append(body, timings.element);
  conversation.append(element);
  let frame = 0;
  const render = () => {
    frame = 0;
    const root = document.documentElement;
    const isAtEnd = root.scrollHeight - root.clientHeight - root.scrollTop < NEAR_END_PX;
    renderMarkdown(body, view.text);
    if (isAtEnd) scrollTo({ top: root.scrollHeight });
  };
  const view = {
    element,
    timings,
    text: "",
    add(text) {
      view.text += text;
      if (text) frame ||= requestAnimationFrame(render);
    },
    end(note = "") {
      cancelAnimationFrame(frame);
      timings.end();
      element.classList.remove("busy");
      body.setAttribute("aria-busy", "false");
      if (note) timings.element.before(node("p", "ended", note));
      render();
    },
  };
  return view;
}

async function chatMessage(message) {
  if (!message.media.length) return { role: message.role, content: message.text };
  const parts = await Promise.all(message.media.map((medium) => medium.part()));
  if (message.text) parts.push({ type: "text", text: message.text });
  return { role: message.role, content: parts };
}

function setRunning(controller) {
  running = controller;
  send.textContent = controller ? "Stop" : "Ask";
}

function clear() {
  running?.abort();
  messages.flatMap((message) => message.media).forEach((medium) => medium.dispose());
  messages = [];
  conversation.replaceChildren(welcome);
  welcome.hidden = false;
  question.focus();
}

function tell(text) {
  document.querySelector("#composer .problem")?.remove();
  const problem = node("p", "problem", text);
  problem.setAttribute("role", "alert");
  part("composer").append(problem);
  setTimeout(() => problem.remove(), 6000);
}

function resize() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

function hasFiles(event) {
  return event.dataTransfer?.types.includes("Files");
}

part("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else ask();
});
question.addEventListener("input", resize);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
document.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  attach(event.clipboardData.files);
});
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  drop.hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.hidden = true;
});
document.addEventListener("drop", (event) => {
  drop.hidden = true;
  if (!hasFiles(event)) return;
  event.preventDefault();
  attach(event.dataTransfer.files);
});
for (const id of ["attach", "choose"]) part(id).addEventListener("click", () => files.click());
files.addEventListener("change", () => {
  attach(files.files);
  files.value = "";
});
part("tiles").addEventListener("change", (event) => {
  document.body.classList.toggle("hide-tiles", !event.target.checked);
});
part("clear").addEventListener("click", clear);
access.addEventListener("submit", (event) => {
  event.preventDefault();
  const key = part("key").value.trim();
  part("key").value = "";
  if (!/^[\x21-\x7e]+$/.test(key)) {  // no header can carry it
    refuse("This is no API key.");
    return;
  }
  sessionStorage.setItem(KEY, key);
  connect();
});
connect();
question.focus();
