// The times of one answer: measured here while it streams, corrected by the server's own at its end.

import { node } from "./media.js";

const NAMES = { elapsed: "time", queue: "queue", encode: "encode", first: "first token", speed: "speed", tokens: "tokens" };

export class Timings {
  #start = performance.now();
  #first = 0;
  #tokens = 0;
  #timer = 0;
  #cells = {};

  constructor(hasMedia) {
    this.element = node("dl", "timings");
    this.element.setAttribute("aria-label", "Timings");
    for (const [key, name] of Object.entries(NAMES)) {
      if (key === "encode" && !hasMedia) continue;
      const cell = node("dd", "", "–");
      cell.dataset.timing = key;
      const pair = node("div");
      pair.append(node("dt", "", name), cell);
      this.element.append(pair);
      this.#cells[key] = cell;
    }
    this.#timer = setInterval(() => this.#show("elapsed", duration(performance.now() - this.#start)), 100);
  }

  note(chunk) {
    const now = performance.now();
    if (!this.#first && chunk.choices[0]?.delta.content) {
      this.#first = now;
      this.#show("first", duration(now - this.#start));
    }
    if (chunk.usage?.completion_tokens && this.#first) this.#count(chunk.usage, now - this.#first);
    const server = chunk.details?.timings_ms;
    if (!server) return;
    this.#show("queue", duration(server.queue));
    this.#show("encode", server.encode ? duration(server.encode) : "cached");
    this.#count(chunk.usage, server.decode);
  }

  end() {
    clearInterval(this.#timer);
    this.#show("elapsed", duration(performance.now() - this.#start));
  }

  #count(usage, decodeMs) {
    this.#tokens = usage.completion_tokens;
    const prompt = usage.prompt_tokens ? `${usage.prompt_tokens} + ` : "";
    this.#show("tokens", `${prompt}${this.#tokens}`);
    if (this.#tokens > 1 && decodeMs > 0) {
      const speed = (this.#tokens - 1) / (decodeMs / 1000);
      this.#show("speed", `${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tokens/s`);
    }
  }

  #show(key, text) {
    if (this.#cells[key]) this.#cells[key].textContent = text;
  }
}

function duration(ms) {
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}
