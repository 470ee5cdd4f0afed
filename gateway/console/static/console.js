"use strict";
// Everything shown comes in as text and goes out as text nodes: nothing that a model, a tenant or a client names can become markup.

const find = (id) => document.getElementById(id);
const KEY = "sliceway-admin-key";
const EVERY_MS = 1000;
let timer = 0;
let playing = null;

function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = String(text);
  if (className) node.className = className;
  return node;
}

// Of a driver's id both ends tell it from others. All of it is in the title, and stands in full above the drawing of its card.
const short = (id) => id.replace(/\b(GPU|MIG)-([0-9a-f]{4})[0-9a-f-]{20,}([0-9a-f]{4})\b/gi, "$1-$2\u2026$3");

const pair = (series) => (series && series.count ? `${Math.round(series.p50 * 10000) / 10} / ${Math.round(series.p99 * 10000) / 10}` : "-");

function signedIn(yes) {
  find("sign-in").hidden = yes;
  find("board").hidden = !yes;
  find("sign-out").hidden = !yes;
}

async function look() {
  const key = sessionStorage.getItem(KEY);
  if (!key) return signedIn(false);
  try {
    const answer = await fetch("/console/state", { headers: { authorization: `Bearer ${key}` }, cache: "no-store" });
    if (answer.status === 401) {
      sessionStorage.removeItem(KEY);
      find("sign-in-error").textContent = (await answer.json()).error.message;
      find("health").textContent = "not signed in";
      return signedIn(false);
    }
    if (!answer.ok) throw new Error(`the gateway answered ${answer.status}`);
    show(await answer.json());
    signedIn(true);
  } catch (error) {
    find("health").textContent = `no connection: ${error.message}`;
  }
  timer = setTimeout(look, EVERY_MS);
}

function show(state) {
  const how = state.draining ? "stopping" : state.ready ? "serving" : "no model is ready";
  find("health").textContent = [`${how}, table generation ${state.generation}`, ...state.problems].join("; ");
  find("fleet").replaceChildren(...state.gpus.map(drawGpu));
  document.querySelector("#slices tbody").replaceChildren(...state.slices.flatMap(rows));
  find("limits").replaceChildren(...(state.throttled.length ? state.throttled.map(drawLimit) : [make("p", "Nobody: no limit is half used, and none refuses.")]));
  drawPlan(state.plan);
  drawTransition(state.transition);
  const models = [...new Set(state.slices.map((s) => s.model).filter(Boolean))].sort();
  const chosen = find("model");
  if (models.join("\n") !== [...chosen.options].map((o) => o.value).join("\n")) {
    chosen.replaceChildren(...models.map((name) => new Option(name, name)));
  }
}

function drawGpu(card) {
  const box = make("div", null, "gpu");
  box.append(make("p", card.gpu || "not on a GPU"));
  const grid = make("div", null, card.columns ? "card" : "card loose");
  if (card.columns) grid.style.gridTemplateColumns = `repeat(${card.columns}, minmax(0, 1fr))`;
  for (const one of card.slices) {
    const cell = make("div", null, `slice ${one.state}`);
    if (one.start !== null) cell.style.gridColumn = `${one.start + 1} / span ${one.width}`;
    cell.append(make("b", one.label), make("span", `${one.model || "free"}: ${one.state}`));
    if (one.tenants.length) cell.append(make("span", `for ${one.tenants.join(", ")}`));
    cell.title = [one.id, ...one.tenants].join("\n");
    grid.append(cell);
  }
  box.append(grid);
  return box;
}

function line(name, title, model, state, queue, window, className) {
  const row = make("tr", null, className);
  row.setAttribute("role", "row");
  const shown = [name, model, state, queue, window.e2e_seconds.count, pair(window.ttft_seconds), pair(window.itl_seconds), pair(window.e2e_seconds)];
  const headings = document.querySelectorAll("#slices th");
  shown.forEach((text, column) => {
    const cell = make("td", text);
    cell.setAttribute("role", "cell");
    cell.dataset.label = headings[column].textContent;
    row.append(cell);
  });
  row.firstChild.title = title;
  return row;
}

function rows(one) {
  const state = one.reason ? `${one.state}: ${one.reason}` : one.state;
  const waiting = one.queue ? one.queue.waiting_requests : "-";
  return [
    line(short(one.slice.id), one.slice.id, one.model || "-", state, waiting, one.window),
    ...Object.entries(one.tenants).map(([name, window]) => line(`\u2003${name}`, `${name} on ${one.slice.id}`, "", "", "", window, "tenant")),
  ];
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

function drawLimit(limit) {
  const box = make("div");
  const refuses = limit.throttled_seconds !== null;
  const how = refuses ? `refusing for ${Math.round(limit.throttled_seconds)} s, room again in ${Math.ceil(limit.retry_after_seconds)} s` : "room left";
  box.append(make("p", `${limit.tenant}: ${whole.format(limit.used)} of ${whole.format(limit.full)} ${limit.limit}: ${how}; ${limit.refused} refused so far`));
  const bar = make("div", null, "bar");
  const fill = make("i");
  fill.style.width = `${limit.share * 100}%`;
  bar.append(fill);
  box.append(bar);
  return box;
}

function drawPlan(plan) {
  const box = find("plan");
  if (!plan) return box.replaceChildren(make("p", "No controller runs here: this gateway serves what others start."));
  const list = make("ul");
  list.append(...plan.models.map((m) => make("li", `${m.model}: ${m.ready} of ${m.planned} replicas ready${m.demand ? `; demand: ${m.demand}` : ""}`)));
  list.append(...plan.unplaced.map((one) => make("li", `${one.replica} has no slice: ${one.message} ${one.remedy || ""}`)));
  box.replaceChildren(list);
  if (plan.refused) box.append(make("p", `The last configuration was not taken over: ${plan.refused}`));
  if (plan.repartition) box.append(make("p", `GPUs are cut anew for demand: ${plan.repartition}`));
}

function drawTransition(change) {
  const box = find("transition");
  if (!change) return box.replaceChildren(make("p", "Nothing is being changed. sliceway plan shows what would be."));
  const done = change.steps.filter((s) => s.state === "done").length;
  const list = make("ol");
  list.append(...change.steps.map((s) => make("li", `${s.what}: ${s.state}`)));
  box.replaceChildren(make("p", `${done} of ${change.steps.length} steps since ${change.started_at}`), list);
  if (change.error) box.append(make("p", `stopped: ${change.error.message} ${change.error.remedy || ""}`));
}

async function play(event) {
  event.preventDefault();
  playing = new AbortController();
  find("send").disabled = true;
  find("stop").disabled = false;
  find("answer").textContent = "";
  const began = performance.now();
  let first = 0;
  try {
    const answer = await fetch("/v1/chat/completions", {
      method: "POST",
      signal: playing.signal,
      headers: { authorization: `Bearer ${find("tenant-key").value}`, "content-type": "application/json" },
      body: JSON.stringify({ model: find("model").value, stream: true, max_tokens: 256, messages: [{ role: "user", content: find("prompt").value }] }),
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const text of deltas(answer.body)) {
      first ||= performance.now() - began;
      find("answer").append(text);
    }
    const by = answer.headers.get("x-sliceway-replica");
    find("play-note").textContent = `${by}: first token after ${Math.round(first)} ms, all after ${Math.round(performance.now() - began)} ms`;
  } catch (error) {
    find("play-note").textContent = error.name === "AbortError" ? "stopped" : error.message;
  } finally {
    playing = null;
    find("send").disabled = false;
    find("stop").disabled = true;
  }
}

async function* deltas(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.startsWith("data: ") ? event.slice(6) : "[DONE]";
      if (data === "[DONE]") continue;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new Error(parsed.error.message);
      const text = parsed.choices?.[0]?.delta?.content;
      if (text) yield text;
    }
  }
}

find("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  find("sign-in-error").textContent = "";
  sessionStorage.setItem(KEY, find("admin-key").value);
  find("admin-key").value = "";
  clearTimeout(timer);
  look();
});
find("sign-out").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  clearTimeout(timer);
  find("health").textContent = "not signed in";
  signedIn(false);
});
find("play").addEventListener("submit", play);
find("stop").addEventListener("click", () => playing && playing.abort());
look();
