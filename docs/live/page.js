// The live page: an editor over minilora's functions, and runs of Python in a worker.
import { createEditor } from "./editor/index.js";
import "./editor/prism/languages/python.js";

const $ = (id) => document.getElementById(`live-${id}`);
const facts = JSON.parse($("facts").textContent);
const here = (name) => new URL(name, import.meta.url).href;

// --- files, checked by their hash and kept in the browser's cache ---------------------------------

// The cache may be missing, full, or forbidden in a private window: then files are fetched anew.
const cached = async (use) => {
  try {
    return await use(await caches.open("minilora-live"));
  } catch {
    return undefined;
  }
};

/** The content of a compressed file; undefined where it is damaged. */
async function unpacked(bytes, sha256) {
  try {
    if (bytes[0] === 0x1f && bytes[1] === 0x8b) {  // else a server has done it already
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    }
  } catch {
    return undefined;
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("") === sha256 ? bytes : undefined;
}

/** A part's content, from the cache or the site; `tell` is called with the bytes that have come. */
async function part({ file, bytes, sha256 }, tell = () => {}, signal) {
  const url = here(file);
  const kept = await cached(async (cache) => {
    const found = await cache.match(url);
    return found && unpacked(new Uint8Array(await found.arrayBuffer()), sha256);
  });
  if (kept) return tell(bytes), kept;
  const response = await fetch(url, { signal });
  if (!response.ok) throw new Error(`${file} cannot be fetched (${response.status})`);
  const pieces = [];
  let come = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    pieces.push(value);
    tell(Math.min(come += value.length, bytes));
  }
  const packed = new Uint8Array(await new Blob(pieces).arrayBuffer());
  const content = await unpacked(packed, sha256);
  if (!content) throw new Error(`${file} came damaged; press the button again`);
  await cached((cache) => cache.put(url, new Response(packed)));
  return content;
}

/** Remove what earlier versions of the page have kept. */
const forget = () => cached(async (cache) => {
  const current = new Set([facts.texts, ...Object.values(facts.parts)].map(({ file }) => here(file)));
  for (const { url } of await cache.keys()) if (!current.has(url)) await cache.delete(url);
});

const loaded = {};

/** The parts of these names, Python compiled, with the progress in bytes while they load. */
async function load(names, signal) {
  const missing = names.filter((name) => !loaded[name]);
  const total = missing.reduce((sum, name) => sum + facts.parts[name].bytes, 0);
  const come = {};
  const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
  const tell = (name) => (bytes) => {
    come[name] = bytes;
    const sum = Object.values(come).reduce((a, b) => a + b, 0);
    $("progress").hidden = false;
    $("progress").value = sum / total;
    status(`Loading: ${megabytes(sum)} of ${megabytes(total)} MB`);
  };
  await Promise.all(missing.map(async (name) => {
    const content = await part(facts.parts[name], tell(name), signal);
    loaded[name] = name === "python" ? await WebAssembly.compile(content) : content;
  }));
  $("progress").hidden = true;
  forget();
}

// --- runs: each a fresh interpreter in a worker of its own ----------------------------------------

let running;
let kept = [];  // losses of the run before

async function run(action) {
  if (running) return;
  const began = performance.now();
  const stop = new AbortController();
  running = { stop, heard: [] };
  for (const name of ["check", "table", "train"]) $(name).disabled = true;
  $("stop").disabled = false;
  clear();
  try {
    const order = { action, entry: $("entry").value, ...(action === "train" ? settings() : {}) };
    await load(["python", "library", "minilora", ...(action === "train" ? ["base"] : [])], stop.signal);
    status("Running …");
    const files = { "minilora.zip": loaded.minilora, "order.json": JSON.stringify(order), "edit.py": editor.value };
    if (action === "train") files["base.npz"] = loaded.base;
    const { failure, memory } = await inWorker({ module: loaded.python, library: loaded.library, files }, stop.signal);
    if (failure) {
      const deep = /stack|recursion/i.test(failure);
      verdict("wrong", deep ? "Python stopped: calls went too deep; a function that calls itself?" : `Python stopped: ${failure}`);
    }
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    status(`Done in ${seconds} s; Python took ${Math.round(memory / 1e6)} MB of memory.`);
  } catch (error) {
    if (stop.signal.aborted) status("Stopped.");
    else verdict("wrong", `${error.message ?? error}.`), status("Not run.");
  }
  $("progress").hidden = true;
  for (const name of ["check", "table", "train"]) $(name).disabled = false;
  $("stop").disabled = true;
  running = undefined;
}

/** Resolves with the worker's last message; a signal ends the worker, whatever it does. */
function inWorker(message, signal) {
  const worker = new Worker(here(`worker.js?${facts["worker.js"]}`), { type: "module" });
  return new Promise((resolve, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason));
    worker.onerror = (event) => reject(new Error(event.message || "The worker cannot start"));
    worker.onmessage = ({ data }) => {
      if (data.kind === "done") resolve(data);
      else if (data.kind === "printed") say(data.line);
      else heard(JSON.parse(data.line));
    };
    worker.postMessage(message);
  }).finally(() => worker.terminate());
}

function settings() {
  const targets = [...document.querySelectorAll("[name=live-target]:checked")].map((box) => box.value);
  const wanted = { steps: Number($("steps").value), rank: Number($("rank").value), lr: Number($("rate").value) };
  if (!targets.length) throw new Error("No target is chosen");
  for (const name of ["steps", "rank", "rate"]) {
    if (!$(name).checkValidity()) throw new Error(`${$(name).labels[0].textContent.trim()}: ${$(name).validationMessage}`);
  }
  return { ...wanted, targets, text: $("text").value, edited: $("edited").checked };
}

// --- what a run says ------------------------------------------------------------------------------

const MARKS = { right: "✓ Right", wrong: "✗ Not right", empty: "… Not written yet" };
let losses, heldOut;

function clear() {
  losses = [];
  heldOut = [];
  for (const name of ["verdict", "said", "rows", "figure"]) $(name).hidden = true;
  $("said").textContent = "";
  $("rows").tBodies[0].replaceChildren();
  $("texts").replaceChildren();
}

const status = (text) => { $("status").textContent = text; };

function verdict(kind, text = "") {
  $("verdict").hidden = false;
  $("verdict").className = `live-${kind}`;
  $("verdict").textContent = MARKS[kind];
  if (text) say(text);
}

function say(text) {
  $("said").hidden = false;
  $("said").textContent += `${text}\n`;
}

function heard(message) {
  running.heard.push(message);
  if (message.kind === "verdict") {
    verdict(message.right ? "right" : message.empty ? "empty" : "wrong", message.text);
    $("verdict").textContent += `: ${message.points} of ${message.max_points} points`;
  } else if (message.kind === "error") {
    verdict("wrong", message.text);
  } else if (message.kind === "row") {
    const row = $("rows").tBodies[0].insertRow();
    if (!message.right) row.className = "live-wrong";
    const cells = [message.name, message.error.toExponential(1), message.right ? "right" : "✗ wrong"];
    for (const text of cells) row.insertCell().textContent = text;
    $("rows").hidden = false;
  } else if (message.kind === "loss") {
    losses.push([message.step, message.loss]);
    if (message.held_out !== null) heldOut.push([message.step, message.held_out]);
    draw();
    status(`Step ${message.step}: ${message.loss.toFixed(3)} nats per byte`);
  } else if (message.kind === "text") {
    const [head, text] = [document.createElement("h3"), document.createElement("pre")];
    head.textContent = `The model ${message.label} training`;
    text.textContent = message.text;
    text.tabIndex = 0;
    $("texts").append(head, text);
  } else if (message.kind === "trained") {
    heldOut = message.held_out;
    draw();
    kept = losses;
    const [first, last] = [heldOut[0][1], heldOut.at(-1)[1]].map((loss) => loss.toFixed(3));
    say(`On held-out text ${first} → ${last} nats per byte.`);
    for (const [name, count] of Object.entries(message.calls)) {
      say(count ? `Your ${name} was called ${count} times.` : `Training never calls ${name}.`);
    }
  }
}

/** The losses as a drawing of 640 by 260 units, with its axes. */
function draw() {
  $("figure").hidden = false;
  const all = [...losses, ...heldOut, ...kept].map(([, loss]) => loss);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const steps = Math.max(Number($("steps").value), ...losses.map(([step]) => step));
  const at = ([step, loss]) => [46 + 580 * step / steps, 225 - 205 * (loss - low) / (high - low || 1)];
  const line = (points, name) => `<polyline class="${name}" points="${points.map((p) => at(p).join()).join(" ")}"/>`;
  const label = (x, y, text, anchor) => `<text x="${x}" y="${y}" text-anchor="${anchor}">${text}</text>`;
  $("plot").innerHTML = `<path d="M46 10V225H630"/>`
    + label(40, 24, high.toFixed(2), "end") + label(40, 228, low.toFixed(2), "end")
    + label(46, 245, 0, "middle") + label(626, 245, `step ${steps}`, "end")
    + line(kept, "live-before") + line(losses, "live-line")
    + heldOut.map(at).map(([x, y]) => `<circle cx="${x}" cy="${y}" r="4.5"/>`).join("");
  $("plot").dataset.losses = JSON.stringify({ losses, held_out: heldOut });
  $("plot").setAttribute("aria-label", `Loss by step, at last ${losses.at(-1)?.[1].toFixed(3)} nats per byte`);
}

// --- the editor -----------------------------------------------------------------------------------

let editor, texts;
const key = (entry) => `minilora-live:${entry}`;

/** The browser's storage may be forbidden: then the text is lost with the tab. */
const stored = (use) => {
  try {
    return use(localStorage);
  } catch {
    return null;
  }
};

function show(entry) {
  const option = document.getElementById(entry);
  $("entry").value = entry;
  $("derivation").href = option.dataset.page;
  editor.setOptions({ value: stored((s) => s.getItem(key(entry))) ?? texts[entry] });
  clear();
}

function save() {
  const entry = $("entry").value, text = editor.value;
  stored((s) => text === texts[entry] ? s.removeItem(key(entry)) : s.setItem(key(entry), text));
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([editor.value], { type: "text/x-python" }));
  link.download = document.getElementById($("entry").value).dataset.file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** What Enter and Tab do: loaded when the editor is first used. */
async function indent() {
  const [{ defaultCommands }] = await Promise.all([
    import("./editor/extensions/commands/index.js"),
    import("./editor/languages/python.js"),
  ]);
  editor.addExtensions(defaultCommands());
}

function fromAddress() {
  const wanted = decodeURIComponent(location.hash.slice(1));
  return wanted in texts ? wanted : "lora_backward";
}

// Exceptions in WebAssembly's present form, without which the binary cannot be compiled.
const EXCEPTIONS = new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 1, 105, 0]);

function reason() {
  if (!window.isSecureContext) return "This page must come over https: only then does a browser check its files.";
  if (!globalThis.WebAssembly?.validate(EXCEPTIONS) || !globalThis.DecompressionStream) {
    return "This browser cannot run Python 3.15: a Chrome, Edge or Firefox of 2025 or later can. "
      + "Everything here also works on the command line: minilora course.";
  }
  return "";
}

async function start() {
  const why = reason();
  if (why) {
    for (const name of ["check", "table", "train"]) $(name).disabled = true;
    status(why);
  }
  texts = JSON.parse(new TextDecoder().decode(await part(facts.texts)));
  editor = createEditor($("editor"), { language: "python", tabSize: 4, insertSpaces: true, value: "" });
  editor.textarea.addEventListener("focus", indent, { once: true });
  editor.textarea.setAttribute("aria-label", "Your code");
  editor.on("update", save);
  show(fromAddress());
  $("entry").onchange = () => { history.replaceState(null, "", `#${$("entry").value}`); show($("entry").value); };
  addEventListener("hashchange", () => show(fromAddress()));
  addEventListener("pagehide", () => running?.stop.abort());
  $("reset").onclick = () => { editor.setOptions({ value: texts[$("entry").value] }); clear(); };
  $("download").onclick = download;
  for (const action of ["check", "table", "train"]) $(action).onclick = () => run(action);
  $("stop").onclick = () => running?.stop.abort();
  document.getElementById("live").onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !why) event.preventDefault(), run("check");
  };
  document.getElementById("live").dataset.ready = "";
}

start().catch((error) => status(`The page cannot start: ${error.message ?? error}`));
