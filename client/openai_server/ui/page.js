// The chat page of `gllm openai --ui`. What a model or a server says becomes text nodes, never HTML.
// The key and the conversation are in this page's memory alone.
"use strict";

const STRIP_MS = 1000;
const COUNTED = "gllm:generation_tokens_total";
const SAMPLE = /^(gllm:\w+)\{(.*)\} (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

const at = (id) => document.getElementById(id);
let messages = [];
let running = null; // the AbortController of the answer under way
let last = null; // {model, time, tokens}: the counter when the strip was last drawn

function add(parent, tag, kind, text = "") {
  const element = document.createElement(tag);
  element.className = kind;
  element.append(text);
  parent.append(element);
  return element;
}

function ask(path, options = {}) {
  const headers = {};
  if (options.body) headers["content-type"] = "application/json";
  const key = at("key").value.trim();
  if (key) headers.authorization = `Bearer ${key}`;
  return fetch(path, { ...options, headers, cache: "no-store" });
}

// The sentence of an answer that is an error.
async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `status ${response.status}`;
  }
}

// ------------------------------------------------------------ the conversation

// The data of each server-sent event.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ")) yield line.slice("data: ".length);
    }
  }
}

// An article for one answer; its thoughts, folded, stand above its text.
class Answer {
  constructor() {
    this.article = add(at("chat"), "article", "assistant");
    this.content = "";
    this.began = performance.now();
  }

  think(text) {
    if (!this.thoughts) {
      const details = add(this.article, "details", "");
      add(details, "summary", "", "Thoughts");
      this.thoughts = add(details, "div", "thoughts").appendChild(new Text());
    }
    this.thoughts.appendData(text);
  }

  say(text) {
    this.text ??= add(this.article, "div", "text").appendChild(new Text());
    this.text.appendData(text);
    this.content += text;
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    const choice = chunk.choices[0];
    if (choice?.delta.reasoning) this.think(choice.delta.reasoning);
    if (choice?.delta.content) this.say(choice.delta.content);
    this.reason = choice?.finish_reason ?? this.reason;
    this.usage = chunk.usage ?? this.usage;
  }

  note(text, kind = "note") {
    add(this.article, "div", kind, text);
  }

  summarize() {
    const seconds = (performance.now() - this.began) / 1000;
    const count = this.usage?.completion_tokens ?? 0;
    const cut = this.reason === "length" ? ", cut off at the limit of tokens" : "";
    this.note(`${count} tokens in ${seconds.toFixed(1)} s${cut}`);
  }
}

async function answer() {
  const conversation = messages; // a new chat may begin meanwhile
  const written = new Answer();
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  try {
    const body = JSON.stringify({
      model: at("model").value || undefined,
      messages: conversation,
      stream: true,
      stream_options: { include_usage: true },
    });
    const response = await ask("v1/chat/completions", { method: "POST", body, signal: running.signal });
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const data of events(response.body)) {
      if (data === "[DONE]") break;
      const follows = atEnd();
      written.take(JSON.parse(data));
      if (follows) toEnd();
    }
    written.summarize();
  } catch (error) {
    if (error.name === "AbortError") written.note("stopped");
    else written.note(error.message, "error");
  }
  // A turn without an answer is not repeated to the model.
  if (written.content) conversation.push({ role: "assistant", content: written.content });
  else conversation.pop();
  running = null;
  at("send").disabled = false;
  at("stop").disabled = true;
  toEnd();
}

function atEnd() {
  const chat = at("chat");
  return chat.scrollHeight - chat.scrollTop - chat.clientHeight < 40;
}

function toEnd() {
  at("chat").scrollTop = at("chat").scrollHeight;
}

function send() {
  const text = at("prompt").value;
  if (running || !text.trim()) return;
  at("prompt").value = "";
  messages.push({ role: "user", content: text });
  add(add(at("chat"), "article", "user"), "div", "text", text);
  toEnd();
  answer();
}

function begin() {
  running?.abort();
  messages = [];
  at("chat").replaceChildren();
  at("prompt").focus();
}

// ------------------------------------------------------------ models and their load

async function listModels() {
  try {
    const response = await ask("v1/models");
    if (!response.ok) throw new Error(await problemOf(response));
    const { data } = await response.json();
    const chosen = at("model").value;
    at("model").replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === chosen)));
    at("problem").textContent = data.length ? "" : "no model is ready";
  } catch (error) {
    at("problem").textContent = error.message;
  }
}

// A model's samples by name; those that differ in other labels are added up.
function samples(page, model) {
  const found = {};
  for (const line of page.split("\n")) {
    const match = SAMPLE.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries([...match[2].matchAll(LABEL)].map(([, name, value]) => [name, value]));
    if (labels.model === model) found[match[1]] = (found[match[1]] ?? 0) + Number(match[3]);
  }
  return found;
}

function draw(page, model) {
  const found = samples(page, model);
  const time = performance.now();
  const tokens = found[COUNTED];
  const whole = (value) => (value === undefined ? "–" : String(Math.round(value)));
  const seconds = last?.model === model ? (time - last.time) / 1000 : 0;
  at("rate").value = seconds ? whole(Math.max(0, tokens - last.tokens) / seconds) : "–";
  at("running").value = whole(found["gllm:num_requests_running"]);
  at("waiting").value = whole(found["gllm:num_requests_waiting"]);
  const used = found["gllm:kv_cache_usage"];
  at("cache").value = used === undefined ? "–" : `${(100 * used).toFixed(1)}%`;
  last = tokens === undefined ? null : { model, time, tokens };
}

async function watch() {
  for (;;) {
    if (!document.hidden) {
      try {
        if (!at("model").value) await listModels();
        const model = at("model").value;
        const response = model ? await ask("metrics") : null;
        if (response?.ok) draw(await response.text(), model);
      } catch {
        last = null; // the server is away; the next round tries again
      }
    }
    await new Promise((done) => setTimeout(done, STRIP_MS));
  }
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", begin);
at("key").addEventListener("change", listModels);
at("model").addEventListener("focus", listModels);
watch();
