// Asks `v1/overview` every two seconds and shows the answer.  Text from the service is only ever set
// as text, never as markup.

import { LineChart, clockTime } from "./charts.js";

const POLL_MS = 2000;
const PATIENCE_MS = 10000;
const TOKEN_KEY = "xllm-admin-token";
const NONE = "–";

const byId = (id) => document.getElementById(id);

// -- formats ---------------------------------------------------------------------------------------

const milliseconds = (value) =>
  value === null ? NONE : value < 1000 ? `${+value.toPrecision(3)} ms` : `${+(value / 1000).toPrecision(3)} s`;
const count = (value) => (value === null ? NONE : `${+value.toPrecision(3)}`);
const percent = (part) => (part === null ? NONE : `${+(100 * part).toFixed(1)} %`);

function duration(seconds) {
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= 2 * length) return `${Math.floor(seconds / length)} ${unit}`;
  }
  return `${Math.max(0, Math.floor(seconds))} s`;
}

// -- elements --------------------------------------------------------------------------------------

function make(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== "") made.textContent = text;
  return made;
}

/** Change a text only if it is another one: screen readers and selections are left in peace. */
function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Make a table body hold these rows of strings; `classes` are those of the columns. */
function fill(body, rows, classes = []) {
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((texts, number) => {
    const row = body.rows[number] ?? body.insertRow();
    texts.forEach((text, column) => {
      const cell = row.cells[column] ?? row.insertCell();
      cell.className = classes[column] ?? "";
      write(cell, text);
    });
  });
}

// -- state -----------------------------------------------------------------------------------------

const history = { started_unix_s: 0, next: 0, samples: [] };
let latest = null;
let sortedBy = { key: "name", is_descending: false };
let missedSince = 0;
let isAsking = false;

/** Take the new samples over; those of an earlier service are void. */
function remember(answer) {
  if (answer.started_unix_s !== history.started_unix_s) {
    Object.assign(history, { started_unix_s: answer.started_unix_s, samples: [] });
  }
  const { columns, samples, max_samples, next } = answer.history;
  for (const values of samples) {
    history.samples.push(Object.fromEntries(columns.map((name, index) => [name, values[index]])));
  }
  history.samples.splice(0, Math.max(0, history.samples.length - max_samples));
  history.next = next;
}

// -- charts ----------------------------------------------------------------------------------------

const options = (more = {}) => ({ say: (text) => write(byId("spoken"), text), ...more });
const column = (label, name) => ({ label, value: (sample) => sample[name] });
const attainment = (sample) => (sample.slo_judged ? sample.slo_kept / sample.slo_judged : null);

const charts = [
  new LineChart(
    "Time to first token", [column("p50", "ttft_p50_ms"), column("p90", "ttft_p90_ms")], milliseconds,
    options({ target: () => latest?.slo.ttft_ms ?? null }),
  ),
  new LineChart(
    "Time per output token", [column("p50", "tpot_p50_ms"), column("p90", "tpot_p90_ms")], milliseconds,
    options({ target: () => latest?.slo.tpot_ms ?? null }),
  ),
  new LineChart("Streams that kept their SLO", [{ label: "kept", value: attainment }], percent, options({ top: 1 })),
  new LineChart(
    "Requests a second", [column("ended", "requests_per_s"), column("failed", "failed_per_s")], count, options(),
  ),
  new LineChart(
    "Requests", [column("in flight", "in_flight"), column("waiting at instances", "waiting")], count, options(),
  ),
  new LineChart("Output tokens a second", [column("tokens", "output_tokens_per_s")], count, options()),
];
byId("charts").append(...charts.map((chart) => chart.root));

function showCharts() {
  const span_s = Number(byId("range").value);
  const to_s = latest.unix_s;
  const first_s = history.samples[0]?.unix_s ?? to_s;
  const from_s = span_s ? to_s - span_s : first_s;
  for (const chart of charts) chart.show(history.samples, from_s, to_s);
}

// -- tiles and troubles ----------------------------------------------------------------------------

function showTiles() {
  const last = history.samples.at(-1) ?? {};
  const seen = history.samples.filter((sample) => sample.unix_s >= latest.unix_s - 300);
  const sum = (name) => seen.reduce((total, sample) => total + sample[name], 0);
  const judged = sum("slo_judged");
  const { instances } = latest;
  const numReady = instances.filter((one) => one.state === "ready").length;
  const tiles = [
    ["Instances ready", `${numReady}`, `of ${instances.length}`],
    ["In flight", `${instances.reduce((total, one) => total + one.in_flight, 0)}`, "requests"],
    ["Requests a second", count(last.requests_per_s ?? null), ""],
    ["TTFT p50", milliseconds(last.ttft_p50_ms ?? null), `p90 ${milliseconds(last.ttft_p90_ms ?? null)}`],
    ["TPOT p50", milliseconds(last.tpot_p50_ms ?? null), `p90 ${milliseconds(last.tpot_p90_ms ?? null)}`],
    ["SLO kept", percent(judged ? sum("slo_kept") / judged : null), "last 5 min"],
  ];
  const list = byId("tiles");
  tiles.forEach(([name, value, more], number) => {
    if (!list.children[number]) {
      const tile = make("div");
      const figure = make("dd");
      figure.append(make("span"), " ", make("small"));
      tile.append(make("dt", "", name), figure);
      list.append(tile);
    }
    const [figure, small] = list.children[number].lastChild.children;
    write(figure, value);
    write(small, more);
  });
}

const PARTS = { instance: "Instance", kv_index: "KV index of", instances: "Instances", service: "Service" };

function showTroubles() {
  const list = byId("troubles");
  const lines = latest.degraded.map(({ part, instance, why }) => {
    const who = part in PARTS ? PARTS[part] : `Registry ${part}`;
    return `${instance ? `${who} ${instance}` : who}: ${why}`;
  });
  const texts = lines.length ? lines : ["Nothing is degraded."];
  while (list.children.length > texts.length) list.lastChild.remove();
  texts.forEach((text, number) => {
    const item = list.children[number] ?? list.appendChild(make("li"));
    item.className = lines.length ? "" : "well";
    write(item, text);
  });
}

// -- instances -------------------------------------------------------------------------------------

const pair = (p50, p90) =>
  p50 === null ? NONE
  : p90 < 1000 ? `${+p50.toPrecision(3)} / ${milliseconds(p90)}`
  : `${milliseconds(p50)} / ${milliseconds(p90)}`;
const kvIndex = (states) =>
  !states.length ? NONE
  : states.every((state) => state === "live") ? "exact"
  : states.includes("degraded") ? "degraded"
  : "joining";

const hedges = ({ hedges, hedges_won }) => (hedges ? `${hedges_won} of ${hedges}` : "0");

const COLUMNS = [
  { title: "Instance", key: "name", text: (one) => one.name },
  { title: "Role", key: "role", text: (one) => one.role },
  { title: "State", key: "state", text: (one) => one.state, className: (one) => `state ${one.state}` },
  { title: "Since", key: "state_age_s", text: (one) => duration(one.state_age_s), is_number: true },
  { title: "In flight", key: "in_flight", text: (one) => `${one.in_flight}`, is_number: true },
  { title: "Running", key: "running", text: (one) => count(one.running), is_number: true },
  { title: "Waiting", key: "waiting", text: (one) => count(one.waiting), is_number: true },
  { title: "KV use", key: "kv_usage", text: (one) => percent(one.kv_usage), meter: (one) => one.kv_usage },
  { title: "TTFT", key: "ttft_p50_ms", text: (one) => pair(one.ttft_p50_ms, one.ttft_p90_ms), is_number: true },
  { title: "TPOT", key: "tpot_p50_ms", text: (one) => pair(one.tpot_p50_ms, one.tpot_p90_ms), is_number: true },
  { title: "KV index", key: "kv_index", text: (one) => kvIndex(one.kv_index) },
  { title: "Errors", key: "errors", text: (one) => `${one.errors}`, is_number: true },
  { title: "Retries", key: "retries", text: (one) => `${one.retries}`, is_number: true },
  { title: "Continued", key: "resumes", text: (one) => `${one.resumes}`, is_number: true },
  { title: "Hedges won", key: "hedges", text: (one) => hedges(one), is_number: true },
  { title: "Models", key: "models", text: (one) => one.models.join(", ") },
];
const rowOf = new Map();

function buildHead() {
  const row = byId("instances").tHead.rows[0];
  for (const { title, key, is_number } of COLUMNS) {
    const cell = make("th", is_number ? "number" : "");
    cell.scope = "col";
    const button = make("button", "", title);
    button.type = "button";
    button.addEventListener("click", () => {
      const is_same = sortedBy.key === key;
      sortedBy = { key, is_descending: is_same && !sortedBy.is_descending };
      showInstances();
    });
    cell.append(button);
    row.append(cell);
  }
}

function buildRow(one) {
  const row = make("tr");
  COLUMNS.forEach(({ is_number, meter }, index) => {
    const cell = make(index ? "td" : "th", is_number ? "number" : "");
    if (!index) cell.scope = "row";
    if (meter) {
      const bar = make("meter");
      Object.assign(bar, { min: 0, max: 1, high: 0.9, optimum: 0 });
      bar.setAttribute("aria-hidden", "true"); // the figure beside it says the same
      cell.append(bar);
    }
    cell.append(make("span"));
    row.append(cell);
  });
  rowOf.set(one.name, row);
  return row;
}

function updateRow(row, one) {
  COLUMNS.forEach(({ text, className, meter }, index) => {
    const cell = row.cells[index];
    write(cell.lastChild, text(one));
    if (className) cell.lastChild.className = className(one);
    if (meter) {
      cell.firstChild.hidden = meter(one) === null;
      cell.firstChild.value = meter(one) ?? 0;
    }
  });
  row.cells[2].title = one.reason;
}

function compare(one, other) {
  const { key, is_descending } = sortedBy;
  const [a, b] = [one[key], other[key]];
  if (a === null || b === null) return (a === null) - (b === null); // not known: last
  const order =
    typeof a === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  return (is_descending ? -order : order) || one.name.localeCompare(other.name, undefined, { numeric: true });
}

function matches(one, words) {
  const text = [one.name, one.role, one.state, kvIndex(one.kv_index), ...one.models].join(" ").toLowerCase();
  return words.every((word) => text.includes(word));
}

function showInstances() {
  const table = byId("instances");
  COLUMNS.forEach(({ key }, index) => {
    const cell = table.tHead.rows[0].cells[index];
    if (key !== sortedBy.key) cell.removeAttribute("aria-sort");
    else cell.setAttribute("aria-sort", sortedBy.is_descending ? "descending" : "ascending");
  });
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = latest.instances.filter((one) => matches(one, words)).sort(compare);
  const body = table.tBodies[0];
  const rows = shown.map((one) => {
    const row = rowOf.get(one.name) ?? buildRow(one);
    updateRow(row, one);
    return row;
  });
  const is_same = rows.length === body.rows.length && rows.every((row, index) => row === body.rows[index]);
  if (!is_same) body.replaceChildren(...rows);
  const known = new Set(latest.instances.map((one) => one.name));
  for (const name of rowOf.keys()) if (!known.has(name)) rowOf.delete(name);
  const total = latest.instances.length;
  write(byId("shown"), shown.length === total ? `${total} known` : `${shown.length} of ${total} shown`);
}

// -- routing ---------------------------------------------------------------------------------------

function showRouting() {
  const total = latest.causes.reduce((sum, one) => sum + one.count, 0);
  const causes = [...latest.causes].sort((one, other) => other.count - one.count);
  fill(
    byId("causes").tBodies[0],
    causes.map((one) => [one.policy, one.cause || "not said", `${one.count}`, percent(one.count / total)]),
    ["", "", "number", "number"],
  );
  fill(
    byId("decisions").tBodies[0],
    latest.decisions.map((one) => [
      clockTime(one.unix_s),
      one.instance,
      one.cause || one.policy,
      one.attempt > 1 ? `attempt ${one.attempt}: ${one.reason}` : one.reason,
    ]),
  );
}

// -- polling ---------------------------------------------------------------------------------------

function show() {
  const { version, policy, started_unix_s, unix_s, is_draining } = latest;
  const state = is_draining ? ", draining" : "";
  write(byId("about"), `version ${version}, policy ${policy}, up for ${duration(unix_s - started_unix_s)}${state}`);
  showTroubles();
  showTiles();
  showCharts();
  showInstances();
  showRouting();
}

function sayLink(text, is_lost) {
  write(byId("link"), text);
  byId("link").classList.toggle("lost", is_lost);
  byId("view").classList.toggle("stale", is_lost);
}

function askForToken(why) {
  byId("view").hidden = true;
  byId("ask").hidden = false;
  write(byId("wrong"), why);
  sayLink("locked", true);
  byId("token").focus();
}

async function poll() {
  if (isAsking) return;
  const token = sessionStorage.getItem(TOKEN_KEY);
  if (!token) {
    askForToken("");
    return;
  }
  isAsking = true;
  try {
    const reply = await fetch(`v1/overview?since=${history.next}`, {
      headers: { Authorization: `Bearer ${token}` },
      cache: "no-store",
      credentials: "omit",
      signal: AbortSignal.timeout(PATIENCE_MS),
    });
    if (reply.status === 401) {
      sessionStorage.removeItem(TOKEN_KEY);
      askForToken("This is not the token of the service.");
      return;
    }
    if (!reply.ok) throw new Error(`HTTP ${reply.status}`);
    latest = await reply.json();
    remember(latest);
    missedSince = 0;
    byId("ask").hidden = true;
    byId("view").hidden = false;
    show();
    sayLink("live", false);
  } catch (error) {
    missedSince ||= Date.now();
    sayLink(`no answer since ${clockTime(missedSince / 1000)} (${error.message}); trying again`, true);
  } finally {
    isAsking = false;
  }
  later();
}

let timer = 0;
function later() {
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(poll, POLL_MS);
}

/** `#token=...`, as `xllm service dashboard` prints it: kept, and taken out of the address. */
function takeTokenFromAddress() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!given) return;
  sessionStorage.setItem(TOKEN_KEY, given);
  window.history.replaceState(null, "", location.pathname);
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = byId("token").value.trim();
  byId("token").value = "";
  if (!/^[\x21-\x7e]+$/.test(given)) {
    askForToken("A token has no spaces and only ASCII characters.");
    return;
  }
  sessionStorage.setItem(TOKEN_KEY, given);
  poll();
});
byId("range").addEventListener("change", () => latest && showCharts());
byId("filter").addEventListener("input", () => latest && showInstances());
document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (!document.hidden && byId("ask").hidden) poll();
});
buildHead();
takeTokenFromAddress();
poll();
