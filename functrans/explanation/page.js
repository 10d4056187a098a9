"use strict";
// Shows the records of an explanation; functrans/explanation/records.py says what stands where in them. All text is set
// as text: nothing that a user wrote is read as markup.
const records = JSON.parse(document.getElementById("records").textContent);
const { events, levels, files } = records;
const byId = (id) => document.getElementById(id);
const inside = new Map([[0, []]]);
for (const event of events) {
  inside.set(event.number, []);
  inside.get(event.parent).push(event);
}
const pulls = new Map();
for (const event of events) if (event.made_by !== null) pulls.set(event.made_by, [...(pulls.get(event.made_by) ?? []), event]);

const rows = new Map(); // by event: its list item
const filter = { operator: "", levels: new Set(), line: null, checks: false };
let chosen = null;

function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "class") made.className = value;
    else if (name === "click") made.addEventListener("click", value);
    else if (name === "hue") made.style.setProperty("--hue", value);
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const levelOf = (event) => (event.level === null ? 0 : levels[event.level].level);
const hueOf = (level) => (level === 0 ? "var(--base-line)" : `var(--level-${level}-line)`);
const isAlarming = (event) => event.way === "borrowed" || event.way === "looped";

// ---------------------------------------------------------------------------------------------------------- the tree

function headline(event) {
  const level = event.level === null ? null : levels[event.level];
  if (event.kind === "transform") return [`level ${level.level}`, event.name, level.about.join(", ")];
  if (event.kind === "walk") return [`level ${level.level}`, `walk ${event.name}`, ""];
  if (event.kind === "check") return [`level ${level.level}`, `check of ${event.name}`, ""];
  const shapes = `(${event.given})${event.returned ? ` → ${event.returned}` : ""}`;
  if (event.kind === "pull") return [`pull ${event.record.join(" ← ")}`, event.name, shapes];
  return [level === null ? "base" : `${level.level} ${level.kind}`, event.name, shapes];
}

function row(event) {
  const [tag, name, rest] = headline(event);
  const under = inside.get(event.number);
  const fold = element("span", { class: "fold" }, under.length ? "▾" : "");
  const passed = event.way === "constant" || event.way === "passed on";
  const line = element("div", { class: `row${passed ? " passed" : ""}`, hue: hueOf(levelOf(event)), "data-event": event.number },
    fold,
    element("span", { class: "tag" }, tag),
    element("span", {}, name),
    event.way ? element("span", { class: isAlarming(event) ? "way alarm" : "way" }, event.way) : null,
    element("span", { class: "shapes" }, rest),
    event.error ? element("span", { class: "error" }, event.error) : null);
  const item = element("li", {}, line);
  line.addEventListener("click", () => choose(event.number));
  if (under.length) {
    const list = branch(under, event);
    item.append(list);
    fold.addEventListener("click", (click) => {
      click.stopPropagation();
      list.hidden = !list.hidden;
      fold.textContent = list.hidden ? "▸" : "▾";
    });
  }
  rows.set(event.number, item);
  return item;
}

function branch(under, around) {
  const list = element("ul");
  let last = around && `${around.file}:${around.line}`;
  for (const event of under) {
    const here = `${event.file}:${event.line}`;
    if (event.written && event.line !== null && here !== last) {
      list.append(element("li", { class: "heading" }, element("div", { class: "row line" }, `${files[event.file].name}:${event.line}  ${event.text}`)));
    }
    if (event.written) last = here;
    list.append(row(event));
  }
  return list;
}

// --------------------------------------------------------------------------------------------------------- the source

function showSource() {
  const called = new Map();
  for (const event of events) if (event.line !== null) called.set(`${event.file}:${event.line}`, true);
  files.forEach((file, i) => {
    const lines = file.lines.map((text, j) => {
      const number = file.first + j;
      const isCalled = called.has(`${i}:${number}`);
      const line = element("div", { class: isCalled ? "code called" : "code", "data-line": `${i}:${number}` },
        element("span", { class: "number" }, String(number)), element("span", { class: "text" }, text));
      if (isCalled) line.addEventListener("click", () => onlyLine(i, number));
      return line;
    });
    byId("source").append(element("h2", {}, file.name), ...lines);
  });
}

function markSource(event) {
  for (const line of document.querySelectorAll("#source .now")) {
    line.classList.remove("now");
    const text = line.querySelector(".text");
    text.textContent = text.textContent; // without the mark
  }
  if (event === null || event.line === null) return;
  const line = document.querySelector(`#source [data-line="${event.file}:${event.line}"]`);
  if (line === null) return;
  line.classList.add("now");
  const text = line.querySelector(".text");
  if (event.columns !== null) {
    const whole = text.textContent;
    const indent = whole.length - whole.trimStart().length;
    const [from, to] = event.columns.map((column) => column + indent);
    text.replaceChildren(whole.slice(0, from), element("mark", { hue: hueOf(levelOf(event)) }, whole.slice(from, to)), whole.slice(to));
  }
  line.scrollIntoView({ block: "nearest" });
}

// ------------------------------------------------------------------------------------------------------- the filters

function fits(event) {
  if (event.kind === "check" && !filter.checks) return false;
  const about = filter.operator.toLowerCase();
  if (about && !(event.name.toLowerCase().includes(about) && !["transform", "walk"].includes(event.kind))) return false;
  if (filter.levels.size && !filter.levels.has(levelOf(event))) return false;
  return filter.line === null || (event.file === filter.line[0] && event.line === filter.line[1]);
}

function applyFilter() {
  const shown = new Set();
  const isChecking = (event) => event.kind === "check" || (event.parent && isChecking(events[event.parent - 1]));
  for (const event of events) {
    if (!fits(event) || (!filter.checks && isChecking(event))) continue;
    for (let number = event.number; number; number = events[number - 1].parent) shown.add(number); // and all around it
  }
  for (const [number, item] of rows) item.classList.toggle("hidden", !shown.has(number));
  for (const heading of document.querySelectorAll("li.heading")) {
    let next = heading.nextElementSibling;
    while (next && !next.matches(".heading") && next.matches(".hidden")) next = next.nextElementSibling;
    heading.classList.toggle("hidden", !next || next.matches(".heading"));
  }
  byId("line").hidden = filter.line === null;
  if (filter.line !== null) byId("line").textContent = `line ${filter.line[1]} ✕`;
  showStep();
}

function onlyLine(file, number) {
  const same = filter.line !== null && filter.line[0] === file && filter.line[1] === number;
  filter.line = same ? null : [file, number];
  applyFilter();
}

const isShown = (event) => !rows.get(event.number).classList.contains("hidden");

// ---------------------------------------------------------------------------------------------------------- the steps

function choose(number) {
  const event = events[number - 1];
  if (!event) return;
  for (const old of document.querySelectorAll("#tree .now")) old.classList.remove("now");
  chosen = event;
  const line = rows.get(number).firstElementChild;
  line.classList.add("now");
  for (let list = line.closest("ul"); list; list = list.parentElement.closest("ul")) list.hidden = false;
  line.scrollIntoView({ block: "nearest" });
  markSource(event);
  byId("details").replaceChildren(...details(event));
  history.replaceState(null, "", `#${number}`);
  showStep();
}

function duration(microseconds) {
  return microseconds < 10000 ? `${microseconds.toFixed(0)} µs` : `${(microseconds / 1000).toFixed(0)} ms`;
}

function step(by) {
  const shown = events.filter(isShown);
  if (!shown.length) return;
  const at = chosen === null ? -1 : shown.findIndex((event) => event.number >= chosen.number);
  const missing = at >= 0 && shown[at] !== chosen;
  let next = chosen === null ? 0 : at < 0 ? shown.length - 1 : at + by + (missing && by > 0 ? -1 : 0);
  next = Math.min(Math.max(next, 0), shown.length - 1);
  choose(shown[next].number);
}

function showStep() {
  const shown = events.filter(isShown);
  const at = chosen === null ? 0 : shown.findIndex((event) => event === chosen) + 1;
  byId("step").textContent = `step ${at || "–"} of ${shown.length}`;
}

// -------------------------------------------------------------------------------------------------------- the details

function link(event) {
  const [tag, name] = headline(event);
  return element("button", { class: "link", "data-to": event.number, click: () => choose(event.number) }, `${tag}  ${name}`);
}

function picture(number) {
  const text = records.pictures[number].map((line) => records.lines[line]).join("\n");
  const drawn = new DOMParser().parseFromString(text, "image/svg+xml"); // a script in it would not run
  return element("div", { class: "picture" }, document.importNode(drawn.documentElement, true));
}

function value(look) {
  const numbers = Object.entries(look.numbers).map(([part, text]) =>
    element("div", { class: "numbers" }, `${part === "value" ? "" : `${part}: `}${text}`));
  return element("div", { class: "value" }, element("code", {}, `${look.name}${look.name ? ": " : ""}${look.text}`),
    look.picture === null ? "" : picture(look.picture), ...numbers);
}

function pair(name, ...content) {
  return [element("dt", {}, name), element("dd", {}, ...content)];
}

function details(event) {
  const [tag, name, rest] = headline(event);
  const path = [];
  for (let at = event.parent; at; at = events[at - 1].parent) path.unshift(events[at - 1]);
  const facts = [
    ...(event.line === null ? [] : pair("called at", `${files[event.file].name}:${event.line} in ${event.function}`)),
    ...(event.kind === "transform" && levels[event.level].place ? pair("function", levels[event.level].place) : []),
    ...(event.way ? pair("taken", element("span", { class: isAlarming(event) ? "way alarm" : "" }, event.way), `: ${records.ways[event.way]}`) : []),
    ...(event.place ? pair("written at", event.place) : []),
    ...(event.record ? pair("tape", `${event.record[0]} ← ${event.record[1]}`) : []),
    ...pair("time", duration(event.nanoseconds / 1000)),
    ...pair("memory", `${event.bytes} bytes for results`),
  ];
  const back = pulls.get(event.number) ?? [];
  const down = inside.get(event.number).filter((child) => child.kind !== "check");
  const numbers = `example ${records.example}`;
  return [
    element("strong", { hue: hueOf(levelOf(event)) }, element("span", { class: "tag" }, tag), ` ${name}`),
    element("div", { class: "numbers" }, rest),
    event.error ? element("p", { class: "error" }, event.error) : null,
    element("dl", {}, ...facts),
    ...(path.length ? [element("h2", {}, "Path"), ...path.map((around) => element("div", {}, link(around)))] : []),
    ...(down.length ? [element("h2", {}, "Inside"), ...down.map((child) => element("div", {}, link(child)))] : []),
    ...(back.length ? [element("h2", {}, "Pulled back in"), ...back.map((pull) => element("div", {}, link(pull)))] : []),
    ...(event.made_by ? [element("h2", {}, "Recorded by"), element("div", {}, link(events[event.made_by - 1]))] : []),
    element("h2", {}, "Stack"), picture(event.picture),
    ...(event.takes.length ? [element("h2", {}, `Takes, ${numbers}`), ...event.takes.map(value)] : []),
    ...(event.gives.length ? [element("h2", {}, `Gives, ${numbers}`), ...event.gives.map(value)] : []),
    ...(event.source ? [element("h2", {}, "Program"), element("pre", {}, event.source)] : []),
  ].filter((part) => part !== null);
}

// ------------------------------------------------------------------------------------------------------------ set up

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

showSource();
byId("tree").append(branch(inside.get(0), null));
for (const level of [...new Set(events.map(levelOf))].sort((a, b) => a - b)) {
  const kinds = [...new Set(levels.filter((l) => l.level === level).map((l) => l.kind))].join(", ");
  const button = element("button", { "aria-pressed": "false", "data-level": level, hue: hueOf(level), title: kinds || "plain PyTorch" },
    level === 0 ? "base" : `level ${level}`);
  button.addEventListener("click", () => {
    if (!filter.levels.delete(level)) filter.levels.add(level);
    button.setAttribute("aria-pressed", String(filter.levels.has(level)));
    applyFilter();
  });
  byId("levels").append(button);
}
byId("operator").addEventListener("input", (input) => { filter.operator = input.target.value; applyFilter(); });
byId("checks").addEventListener("change", (change) => { filter.checks = change.target.checked; applyFilter(); });
byId("line").addEventListener("click", () => { filter.line = null; applyFilter(); });
byId("first").addEventListener("click", () => step(-Infinity));
byId("back").addEventListener("click", () => step(-1));
byId("forward").addEventListener("click", () => step(1));
byId("last").addEventListener("click", () => step(Infinity));
byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
document.addEventListener("keydown", (key) => {
  if (key.target.matches("input")) return;
  const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[key.key];
  if (by === undefined) return;
  key.preventDefault();
  step(by);
});
setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
applyFilter();
const toHash = () => choose(Number(location.hash.slice(1)) || (events.length ? events[0].number : 0));
window.addEventListener("hashchange", toHash);
toHash();
