// The page: hears the server's news, keeps what was told, and shows it. Text only ever becomes text.

import { Plot } from "/plot.js";

const WINDOW_S = 300;
const FILTER_FROM = 12;
const RETRY_MS = 5000;

const $ = (id) => document.getElementById(id);
const rows = new Map(); // device -> what the table shows
let shown = null; // the device in detail
let detail = {};
let history = [];
let page = { token: null, prefix: "", broker: "", version: "" };
let broker = { connected: false, error: "connecting" };
let stream = null;
let isServerThere = true;
let lead_s = 0; // the server's clock less ours

const plots = {
  fps: new Plot("Frames inferred a second", { unit: "", least: 5 }),
  latency: new Plot("Latency, capture to result, ms", { unit: " ms", least: 5 }),
  load: new Plot("GPU and CPU, %", { unit: " %", least: 100, most: 100, digits: 0 }),
};
$("plots").append(...Object.values(plots).map((plot) => plot.element));

// ---------------------------------------------------------------------------------------------- news

function look(device) {
  stream?.close();
  shown = device;
  detail = {};
  history = [];
  stream = new EventSource(`/api/events?device=${encodeURIComponent(device ?? "")}`);
  stream.onmessage = (message) => take(JSON.parse(message.data));
  stream.onerror = () => {
    isServerThere = false;
    if (stream.readyState === EventSource.CLOSED) setTimeout(look, RETRY_MS, shown); // it was refused, not cut off
    showBroker();
  };
}

function take(told) {
  isServerThere = true;
  lead_s = told.now_s - performance.now() / 1000;
  if (told.page) takeWhole(told);
  if (told.broker) broker = told.broker;
  for (const [name, row] of Object.entries(told.devices ?? {})) row ? rows.set(name, row) : rows.delete(name);
  takeDetail(told.detail ?? {});
  $("misread").textContent = told.misread ? `${told.misread} messages were not understood.` : "";
  if (shown === null && rows.size) return look(chosen());
  show();
}

function takeWhole(told) {
  page = told.page;
  rows.clear();
  detail = {};
  history = [];
}

function takeDetail({ history: all, sample, cameras, pictures, jobs, ...rest }) {
  Object.assign(detail, rest);
  for (const [key, news] of Object.entries({ cameras, pictures, jobs })) {
    detail[key] = Object.fromEntries(
      Object.entries({ ...detail[key], ...news }).filter(([, value]) => value !== null),
    );
  }
  if (all) history = all;
  if (sample && sample.at_s !== history.at(-1)?.at_s) history.push(sample);
  history = history.filter((one) => one.at_s > now_s() - WINDOW_S - 60);
}

const now_s = () => performance.now() / 1000 + lead_s;

// The device in the address, or the first there is.
function chosen() {
  const named = new URLSearchParams(location.hash.slice(1)).get("device");
  return named || [...rows.keys()].sort()[0] || null;
}

window.addEventListener("hashchange", () => look(chosen()));
document.addEventListener("visibilitychange", () => {
  if (document.hidden) stream.close(); // nobody looks, so no pictures are asked for
  else look(shown);
});

// ---------------------------------------------------------------------------------------------- showing

function show() {
  showBroker();
  showDevices();
  showDevice();
}

function showBroker() {
  $("where").textContent = page.prefix && `${page.prefix}/# on ${page.broker}`;
  $("version").textContent = page.version && `edge_agent ${page.version}.`;
  const state = !isServerThere ? "no dashboard" : broker.connected ? "connected" : "no broker";
  setState($("broker"), state, isServerThere && broker.connected ? "good" : "bad");
  const why = !isServerThere
    ? "The dashboard's own server does not answer; is `edgectl dashboard` still running? This page tries again by itself."
    : broker.connected
      ? ""
      : `The broker is away: ${broker.error}. What is shown is from before.`;
  setText($("alarm"), why);
  $("alarm").hidden = !why;
}

function showDevices() {
  const filter = $("filter").value.toLowerCase();
  const names = [...rows.keys()].sort().filter((name) => name.toLowerCase().includes(filter));
  const body = $("devices").tBodies[0];
  keyed(body, names, (name) => deviceRow(name), (element, name) => fillDeviceRow(element, name, rows.get(name)));
  $("devices").hidden = !rows.size;
  const isMissing = shown !== null && !rows.has(shown);
  $("no-devices").hidden = rows.size > 0 && !isMissing;
  setText($("no-devices"), isMissing ? `${shown} has not said anything.` : "No device has said anything yet.");
  $("filter-label").hidden = rows.size < FILTER_FROM;
  const online = [...rows.values()].filter((row) => row.available === "online").length;
  setText($("devices-count"), rows.size ? `${online} of ${rows.size} online` : "");
}

function deviceRow(name) {
  const row = document.createElement("tr");
  const head = make("th", { scope: "row" });
  const link = make("a", { href: `#device=${encodeURIComponent(name)}` });
  link.textContent = name;
  head.append(link);
  const classes = ["", "", "number", "number", "number wide", "number", "wide", "wide", "number wide"];
  row.append(head, ...classes.map((names) => make("td", { class: names })));
  for (const index of [1, 2]) row.cells[index].append(make("span", { class: "state" }));
  return row;
}

function fillDeviceRow(element, name, row) {
  const fresh = isFresh(row);
  const [, state, health, fps, p95, gpu, cameras, model, backend, heard] = element.cells;
  name === shown ? element.setAttribute("aria-current", "true") : element.removeAttribute("aria-current");
  setState(state.firstChild, availability(row), row.available === "online" ? "good" : "off");
  setState(health.firstChild, row.health ?? "unknown", row.available === "online" ? colour(row.health) : "off");
  health.title = row.unwell ?? "";
  setText(fps, fresh ? figure(row.fps, 1) : "–");
  setText(p95, fresh ? figure(row.p95_ms, 1) : "–");
  setText(gpu, fresh ? figure(row.gpu_percent, 0) : "–");
  setText(cameras, row.cameras === null ? "–" : `${row.running} of ${row.cameras}`);
  setText(model, row.model ? `${row.model}${row.model_state === "ready" ? "" : ` (${row.model_state})`}` : "–");
  setText(backend, row.backend ?? "–");
  setText(heard, row.heard_s === null ? "–" : `${age(now_s() - row.heard_s)} ago`);
}

const availability = (row) => (row.available === "online" ? (row.state ?? "online") : (row.available ?? "unknown"));

// Whether the last statistics still say how it is.
function isFresh(row) {
  return row?.available === "online" && row.stats_s !== null && now_s() - row.stats_s < gap_s(row);
}

const gap_s = (row) => 3 * (row?.interval_s ?? 5) + 1;

function showDevice() {
  const row = rows.get(shown);
  $("device").hidden = !row;
  document.title = row ? `${shown} · edge_agent` : "edge_agent";
  if (!row) return;
  setText($("device-title"), shown);
  setState($("device-state"), availability(row), row.available === "online" ? "good" : "off");
  const status = detail.status;
  const since = status ? `since ${new Date(status.started_at).toLocaleString()}` : "";
  setText($("device-facts"), status ? `edge_agent ${status.version}, ${since}` : "");
  showCameras(row);
  showPlots(row);
  showHealth(row);
  showModel(row);
}

// ---------------------------------------------------------------------------------------------- cameras

function showCameras(row) {
  const names = [...new Set([...Object.keys(detail.status?.cameras ?? {}), ...Object.keys(detail.cameras ?? {})])].sort();
  $("no-cameras").hidden = names.length > 0;
  keyed($("cameras"), names, cameraCard, (card, name) => fillCamera(card, name, row));
}

function cameraCard(name) {
  const card = document.createElement("li");
  card.append(make("div", { class: "picture" }), make("p", { class: "camera" }), make("p", { class: "sees" }), make("p", { class: "quiet" }));
  const [picture, line] = card.children;
  picture.append(make("img", { hidden: "", decoding: "async" }), make("p", { class: "quiet" }));
  const title = document.createElement("strong");
  title.textContent = name;
  line.append(title, make("span", { class: "state" }), make("span", { class: "quiet" }));
  return card;
}

function fillCamera(card, name, row) {
  const [frame, line, sees, note] = card.children;
  const [, state, facts] = line.children;
  const status = detail.cameras?.[name];
  const picture = detail.pictures?.[name];
  fillPicture(frame, name, picture);
  const phase = status?.state ?? detail.status?.cameras?.[name] ?? "unknown";
  const stats = isFresh(row) && phase === "running" ? detail.cameras_stats?.[name] : undefined;
  setState(state, phase, row.available !== "online" ? "off" : colour(phase));
  const size = status?.width ? `${status.width}×${status.height}` : "";
  setText(facts, [size, stats ? `${figure(stats.fps, 1)} frames/s` : ""].filter(Boolean).join(", "));
  const counts = Object.entries(stats?.objects ?? {}).map(([label, count]) => `${count} ${label}`);
  setText(sees, stats ? (counts.length ? `sees ${counts.join(", ")}` : "sees nothing") : "");
  const trouble = picture?.trouble && picture.at_s !== null ? `; no newer one: ${picture.trouble}` : "";
  const why = phase !== "running" && status?.reason ? `${status.reason}: ${status.message ?? ""}` : "";
  setText(note, why || (picture?.at_s ? `picture of ${age(now_s() - picture.at_s)} ago${trouble}` : ""));
}

function fillPicture(frame, name, picture) {
  const [image, words] = frame.children;
  const known = picture?.number != null;
  image.hidden = !known;
  words.hidden = known;
  if (known && image.dataset.number !== String(picture.number)) {
    image.dataset.number = picture.number;
    image.alt = `What camera ${name} and the model see`;
    const query = new URLSearchParams({ device: shown, camera: name, number: picture.number });
    image.src = `/api/picture?${query}`;
  }
  setText(words, picture?.trouble ? `No picture: ${picture.trouble}` : "No picture yet");
}

// ---------------------------------------------------------------------------------------------- plots

function showPlots(row) {
  const at = now_s();
  const gap = gap_s(row);
  const since_s = history[0]?.at_s ?? at;
  const window_s = Math.min(WINDOW_S, Math.max(60, Math.ceil((at - since_s) / 60) * 60));
  const names = [...new Set(history.flatMap((one) => Object.keys(one.fps)))].sort();
  const series = (name, read) => ({ name, points: history.map((one) => [one.at_s, read(one) ?? null]) });
  const latencies = ["p50", "p95", "p99"].map((name) => series(name, (one) => one[`${name}_ms`]));
  const loads = [series("GPU", (one) => one.gpu_percent), series("CPU", (one) => one.cpu_percent)];
  plots.fps.draw(names.map((name) => series(name, (one) => one.fps[name])), at, window_s, gap);
  plots.latency.draw(latencies, at, window_s, gap);
  plots.load.draw(loads, at, window_s, gap);
}

// ---------------------------------------------------------------------------------------------- health

const BY_GRAVITY = ["failed", "degraded", "ok"];

function showHealth(row) {
  const health = detail.health;
  if (!health) return;
  const told = detail.health_s === null || detail.health_s === undefined
    ? `as the broker keeps it, of ${new Date(health.at).toLocaleString()}`
    : `told ${age(now_s() - detail.health_s)} ago`;
  setText($("health-told"), `${health.state}, ${told}`);
  const checks = Object.entries(health.checks);
  checks.sort(([, one], [, other]) => BY_GRAVITY.indexOf(one.state) - BY_GRAVITY.indexOf(other.state));
  keyed($("health"), checks.map(([name]) => name), checkLine, (line, name) => {
    const check = health.checks[name];
    const [state, what, since] = line.children;
    setState(state, check.state, row.available === "online" ? colour(check.state) : "off");
    setText(what.firstChild, name);
    setText(what.lastChild, ` ${check.fact}`);
    const for_s = (Date.parse(health.at) - Date.parse(check.since)) / 1000;
    const old = check.age_s >= 1 ? `, of ${age(check.age_s)} before` : "";
    setText(since, `for ${age(for_s)}${old}`);
  });
}

function checkLine() {
  const line = document.createElement("li");
  const what = make("span", { class: "fact" });
  what.append(document.createElement("strong"), document.createElement("span"));
  line.append(make("span", { class: "state" }), what, make("span", { class: "for quiet" }));
  return line;
}

// ---------------------------------------------------------------------------------------------- model

function showModel(row) {
  const model = detail.status?.model;
  const next = model?.next ? `, next: ${model.next}` : "";
  const reason = model?.reason ? `: ${model.reason}` : "";
  setText($("model-now"), model?.name
    ? `${model.name} ${model.version} (${model.task}) on ${detail.status.backend ?? "–"}, ${model.state}${reason}${next}`
    : `none${reason}${next}`);
  const rejected = model?.rejected;
  $("model-rejected").hidden = !rejected;
  setText($("model-rejected"), rejected ? `Rejected ${new Date(rejected.at).toLocaleString()}: ${rejected.message}` : "");
  $("read-only").hidden = page.token !== null;
  $("activate").hidden = page.token === null || !detail.models?.models.length;
  const busy = Object.values(detail.jobs ?? {}).some((job) => job.command === "model.activate" && !isOver(job));
  $("activate").querySelector("button").disabled = row.available !== "online" || busy || !broker.connected;
  fillModels(detail.models?.models ?? []);
  showJobs();
}

function fillModels(models) {
  const select = $("models");
  const wanted = models.map((one) => [one.id, `${one.id}${one.task ? ` (${one.task})` : ""}${one.active ? ", active" : ""}`]);
  const text = JSON.stringify(wanted);
  if (select.dataset.text === text) return; // do not close what somebody has open
  const before = select.value;
  select.dataset.text = text;
  select.replaceChildren(...wanted.map(([id, words]) => Object.assign(make("option", { value: id }), { textContent: words })));
  const active = models.find((one) => one.active)?.id;
  select.value = models.some((one) => one.id === before) ? before : (active ?? wanted[0]?.[0] ?? "");
}

const isOver = (job) => job.state === "done" || job.state === "failed";

function showJobs() {
  const ids = Object.keys(detail.jobs ?? {}).reverse();
  keyed($("jobs"), ids, jobLine, (line, id) => fillJob(line, detail.jobs[id]));
}

function jobLine() {
  const line = document.createElement("li");
  line.append(make("span", { class: "state" }), document.createElement("span"), document.createElement("progress"));
  return line;
}

function fillJob(line, job) {
  const [state, words, progress] = line.children;
  setState(state, job.state, job.state === "failed" ? "bad" : job.state === "done" ? "good" : "warn");
  const took = job.duration_ms === null ? "" : ` in ${(job.duration_ms / 1000).toFixed(1)} s`;
  const what = job.result?.model ? `: ${job.result.model.name} runs` : "";
  const phase = job.phase && !isOver(job) ? `: ${job.phase}` : "";
  const percent = job.percent === null || isOver(job) ? "" : ` ${job.percent.toFixed(0)} %`;
  const trouble = job.state === "failed" ? `: ${job.message ?? job.code}` : "";
  setText(words, ` ${job.command}${what}${phase}${percent}${took}${trouble}`);
  progress.hidden = isOver(job);
  progress.setAttribute("aria-label", job.command);
  job.percent === null ? progress.removeAttribute("value") : progress.setAttribute("value", job.percent / 100);
}

$("activate").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("refused").hidden = true;
  const body = JSON.stringify({ device: shown, model: $("models").value });
  const headers = { "Content-Type": "application/json", "X-Edge-Token": page.token };
  try {
    const answer = await fetch("/api/activate", { method: "POST", headers, body });
    if (!answer.ok) refuse((await answer.json()).error);
  } catch (error) {
    refuse(`the dashboard's server does not answer (${error.message})`);
  }
});

function refuse(why) {
  $("refused").hidden = false;
  setText($("refused"), `Not activated: ${why}`);
}

$("filter").addEventListener("input", showDevices);

// ---------------------------------------------------------------------------------------------- small things

// One child for each key, in this order; those that stay are not made anew, so that focus and pictures stay too.
function keyed(parent, keys, create, fill) {
  const before = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  keys.forEach((key, index) => {
    let child = before.get(key);
    before.delete(key);
    if (!child) {
      child = create(key);
      child.dataset.key = key;
    }
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
    fill(child, key);
  });
  for (const child of before.values()) child.remove();
}

function make(name, attributes) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function setState(element, text, name) {
  setText(element, text);
  const wanted = `state ${name}`;
  if (element.className !== wanted) element.className = wanted;
}

function colour(state) {
  if (["ok", "running", "online", "ready"].includes(state)) return "good";
  if (["degraded", "connecting", "stalled"].includes(state)) return "warn";
  if (["failed", "backoff", "offline"].includes(state)) return "bad";
  return "off";
}

const figure = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));

function age(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 120) return `${whole} s`;
  if (whole < 7200) return `${Math.round(whole / 60)} min`;
  return whole < 172800 ? `${Math.round(whole / 3600)} h` : `${Math.round(whole / 86400)} d`;
}

look(chosen());
setInterval(show, 1000);
