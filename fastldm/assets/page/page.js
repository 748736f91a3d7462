import { Refused, call, toBase64, toUrl } from "./api.js";
import { Painter } from "./mask.js";

const $ = (id) => document.getElementById(id);
const form = $("form");
const KEPT = "fastldm.jobs"; // this tab's jobs, the oldest first: a reload asks the server for them again
const MOST = 200; // of those

let options = null;
let items = []; // the newest first: {id, kind: "job" | "picture" | "failed", settings, tile, url, ...}
let current = null;
let comparing = null; // the first of two
let control = null; // {base64, url}
let sizeChosen = false; // by the person: another model then leaves it

const painter = new Painter($("mask"), () => {
  $("undo").disabled = $("clear").disabled = !painter.painted;
});

// --- what is asked for

const NUMBERS = ["width", "height", "n", "num_inference_steps", "guidance_scale", "seed", "class_labels", "noise_level"];
const TEXTS = ["prompt", "negative_prompt", "model", "sampler", "schedule"];

/** What the form says; fields that are empty are left out. */
function readForm() {
  const settings = {};
  const reads = readsOf($("model").value);
  for (const name of TEXTS) if (!$(name).closest("[hidden]") || name === "model") if ($(name).value.trim()) settings[name] = $(name).value.trim();
  for (const name of NUMBERS) {
    if ($(name).closest("[hidden]")) continue;
    if ($(name).validity.badInput) throw new Refused(400, { message: "This is no number.", param: name });
    if ($(name).value !== "") settings[name] = Number($(name).value);
  }
  for (const name of ["width", "height", "n"]) {
    if (!(settings[name] > 0)) throw new Refused(400, { message: "Write a number above 0.", param: name });
  }
  if (reads.image === "needed" && !painter.image) {
    throw new Refused(400, { message: "Choose the picture that this model reads.", param: "image" });
  }
  if (reads.prompt && !settings.prompt && !painter.image) {
    throw new Refused(400, { message: "Write what the picture should show.", param: "prompt" });
  }
  const adapters = Object.fromEntries(
    [...document.querySelectorAll(".adapter")]
      .filter((row) => row.querySelector("[type=checkbox]").checked)
      .map((row) => [row.dataset.name, Number(row.querySelector("[type=range]").value)]),
  );
  if (Object.keys(adapters).length) settings.adapters = adapters;
  if (painter.image && reads.strength) settings.strength = Number($("strength").value);
  if (control) {
    settings.control = $("control").value;
    settings.control_scale = Number($("control_scale").value);
  }
  return settings;
}

/** The fields of the API. */
function bodyOf({ width, height, schedule, strength, ...fields }) {
  if (fields.sampler && schedule) fields.sampler += ` ${schedule}`;
  // What enlarges a picture makes it so many times as large, whatever is asked for.
  const size = readsOf(fields.model).enlarges > 1 ? {} : { size: `${width}x${height}` };
  return { prompt: "", ...fields, ...size };
}

async function submit(settings) {
  showError(null);
  try {
    const body = bodyOf(settings);
    let record;
    if (control) body.control_image = control.base64;
    if (painter.image) {
      const times = readsOf(settings.model).enlarges;
      const sides = [settings.width, settings.height].map((side) => Math.max(1, Math.round(side / times)));
      const { picture, mask } = await painter.files(...sides);
      const data = new FormData();
      const strength = settings.strength === undefined ? {} : { strength: settings.strength };
      for (const [name, value] of Object.entries({ ...body, ...strength })) {
        if (name === "adapters") for (const [one, scale] of Object.entries(value)) data.append(`adapters[${one}]`, scale);
        else data.append(name, value);
      }
      data.append("image", picture, "image.png");
      if (mask) data.append("mask", mask, "mask.png");
      record = await call("v1/jobs/edits", { method: "POST", form: data });
    } else {
      record = await call("v1/jobs", { method: "POST", json: body });
    }
    settings.model = record.model;
    remember(record.id, settings);
    select(add({ id: record.id, kind: "job", settings, record }));
    if (matchMedia("(max-width: 720px)").matches) $("stage").scrollIntoView();
    follow(current);
  } catch (error) {
    showError(error);
  }
}

// --- jobs under way

async function follow(item) {
  for (;;) {
    try {
      item.record = await call(`v1/jobs/${item.id}${item === current ? "?preview=true" : ""}`);
    } catch (error) {
      if (error.status === 404) forget(item);
      else if (error.status === 0) {
        say("The server does not answer; trying again.");
        await sleep(1000);
        continue;
      } else fail(item, error.message);
      return;
    }
    const { status } = item.record;
    if (status === "completed") return finish(item);
    if (status === "failed") return fail(item, item.record.error.message, item.record.error.param);
    if (status === "cancelled") return forget(item);
    if (item.record.preview) item.preview = item.record.preview;
    if (items.includes(item)) show(item);
    await sleep(document.hidden ? 1000 : status === "queued" ? 400 : 150);
  }
}

function finish(item) {
  const { result } = item.record;
  const wasCurrent = item === current;
  const pictures = result.data.map((data) => ({
    id: item.id,
    kind: "picture",
    url: toUrl(data.b64_json),
    seconds: result.timings.total,
    settings: { ...item.settings, seed: data.seed, n: 1 },
  }));
  const place = items.indexOf(item);
  for (const picture of pictures) picture.tile = newTile(picture);
  item.tile.replaceWith(...pictures.map((picture) => picture.tile));
  items.splice(place, 1, ...pictures);
  if (wasCurrent) select(pictures[0]);
  if (wasCurrent) say(`Done in ${seconds(result.timings.total)}.`);
  ended();
}

function fail(item, message, field = null) {
  item.kind = "failed";
  item.message = message;
  item.tile.replaceWith((item.tile = newTile(item)));
  if (item === current) {
    select(item);
    showError(new Refused(400, { message, param: field }));
  }
  ended();
}

/** Out of the list, and of what a reload asks for. */
function forget(item) {
  const place = items.indexOf(item);
  if (place < 0) return;
  const next = items[place + 1] ?? items[place - 1] ?? null;
  item.tile.parentElement.remove();
  items.splice(place, 1);
  if (!items.some((other) => other.id === item.id)) keep(kept().filter((job) => job.id !== item.id));
  if (item.url) URL.revokeObjectURL(item.url);
  if (item === comparing) comparing = null;
  if (item === current) {
    select(next);
    say(item.kind === "job" ? "Stopped." : "");
  }
  ended();
}

async function stop() {
  const item = current?.kind === "job" ? current : items.find((other) => other.kind === "job");
  if (!item) return;
  try {
    await call(`v1/jobs/${item.id}`, { method: "DELETE" });
  } catch (error) {
    showError(error);
  }
}

function ended() {
  $("stop").disabled = !items.some((item) => item.kind === "job");
  $("no-pictures").hidden = items.length > 0;
}

// --- what a reload finds again

const kept = () => JSON.parse(sessionStorage.getItem(KEPT) ?? "[]");
const keep = (jobs) => sessionStorage.setItem(KEPT, JSON.stringify(jobs.slice(-MOST)));
const remember = (id, settings) => keep([...kept(), { id, settings }]);

function resume() {
  for (const { id, settings } of kept()) {
    const item = add({ id, kind: "job", settings, record: null });
    if (current === null || current.kind === "job") select(item);
    follow(item);
  }
}

// --- the picture, and the list

function add(item) {
  item.tile = newTile(item);
  const entry = document.createElement("li");
  entry.append(item.tile);
  $("tiles").prepend(entry);
  items.unshift(item);
  ended();
  return item;
}

function newTile(item) {
  const tile = element("button", { type: "button", className: "tile" });
  tile.setAttribute("aria-label", `${{ job: "Under way: ", failed: "Failed: " }[item.kind] ?? ""}${title(item)}`);
  tile.title = title(item);
  if (item.kind === "picture") tile.append(element("img", { src: item.url, alt: "", loading: "lazy" }));
  if (item.kind === "failed") {
    tile.classList.add("failed");
    tile.append("!");
  }
  if (item.kind === "job") tile.append(element("progress", { max: 1, value: 0 }));
  tile.addEventListener("click", () => choose(item));
  return tile;
}

function title({ settings }) {
  const seed = settings.seed === undefined ? "" : `, seed ${settings.seed}`;
  return `${settings.prompt ?? "a picture without a prompt"}${seed}`;
}

/** By the person: the second of two that are compared, or the one to look at. */
function choose(item) {
  if (comparing && item !== comparing && item.kind === "picture") showPair(comparing, item);
  else select(item);
}

function select(item) {
  current?.tile.removeAttribute("aria-current");
  current = item;
  showError(null);
  item?.tile.setAttribute("aria-current", "true");
  item?.tile.scrollIntoView?.({ block: "nearest" });
  show(item);
}

function show(item) {
  const progress = item?.kind === "job" ? (item.record?.progress ?? 0) : 0;
  item?.tile.querySelector("progress")?.setAttribute("value", progress);
  if (item !== current) return;
  const draft = item?.kind === "job" && item.preview;
  const picture = $("picture");
  picture.hidden = !(item?.url || draft);
  picture.classList.toggle("draft", Boolean(draft));
  if (item?.url) picture.src = item.url;
  else if (draft) picture.src = `data:image/png;base64,${item.preview}`;
  picture.alt = item ? title(item) : "";
  $("empty").hidden = !picture.hidden;
  $("empty").textContent =
    item?.kind === "failed" ? item.message : item ? "…" : "Describe a picture, and press Generate.";
  $("progress").hidden = item?.kind !== "job";
  $("progress").value = progress;
  $("about").hidden = item?.kind !== "picture";
  $("compare").setAttribute("aria-pressed", String(comparing !== null));
  document.title = item?.kind === "job" ? `${Math.round(100 * progress)} % · fastldm` : "fastldm";
  if (item?.kind === "job") say(underWay(item));
  if (item?.kind === "picture") {
    describe(item);
    Object.assign($("download"), { href: item.url, download: `fastldm-${item.settings.seed}.png` });
  }
}

function underWay({ record }) {
  if (record === null) return "";
  const left = record.remaining_seconds === null ? "" : `, about ${seconds(Math.max(1, record.remaining_seconds), 0)} left`;
  if (record.status === "queued") return `Number ${record.position} in line${left}`;
  return record.progress < 1 ? `At work${left}` : "Almost done";
}

const NAMES = [
  ["prompt", "Prompt"],
  ["negative_prompt", "Without"],
  ["seed", "Seed"],
  ["size", "Size"],
  ["num_inference_steps", "Steps"],
  ["guidance_scale", "Guidance"],
  ["sampler", "Sampler"],
  ["class_labels", "Class"],
  ["noise_level", "Noise"],
  ["adapters", "LoRAs"],
  ["strength", "Change"],
  ["control", "Control"],
  ["model", "Model"],
  ["time", "Time"],
];

function describe({ settings, seconds: taken }) {
  const { width, height, schedule, adapters, control_scale: weight } = settings;
  const shown = { ...settings, size: `${width} × ${height}`, time: seconds(taken) };
  if (schedule) shown.sampler = `${settings.sampler} ${schedule}`;
  if (adapters) shown.adapters = Object.entries(adapters).map(([name, scale]) => `${name} ${scale}`).join(", ");
  if (settings.control) shown.control = `${settings.control} ${weight}`;
  const defaults = modelOf(settings.model);
  shown.num_inference_steps ??= defaults?.num_inference_steps;
  shown.guidance_scale ??= defaults?.guidance_scale;
  $("settings").replaceChildren(
    ...NAMES.filter(([name]) => shown[name] !== undefined).flatMap(([name, label]) => [
      element("dt", { textContent: label }),
      element("dd", { textContent: shown[name] }),
    ]),
  );
}

function step(by) {
  const place = items.indexOf(current) + by;
  if (items[place]) choose(items[place]);
}

function showPair(left, right) {
  for (const [side, item] of [["left", left], ["right", right]]) {
    $(`pair-${side}`).src = item.url;
    $(`pair-${side}`).alt = title(item);
  }
  comparing = null;
  split();
  show(current);
  $("pair").showModal();
}

function split() {
  $("pair-right").style.clipPath = `inset(0 0 0 ${$("pair-split").value}%)`;
}

// --- what a picture is good for

const ACTIONS = {
  again: (item) => submit({ ...item.settings, seed: undefined }),
  restore: (item) => restore(item.settings),
  "start-from": async (item) => startFrom(await (await fetchBlob(item.url)), true),
  compare: (item) => {
    comparing = comparing ? null : item;
    say(comparing ? "Choose the picture to compare it with." : "");
    $("compare").setAttribute("aria-pressed", String(comparing !== null));
  },
  download: () => $("download").click(),
  forget: (item) => forget(item),
};
const LETTERS = { a: "again", u: "restore", i: "start-from", c: "compare", d: "download" };

/** The bytes of a picture that is shown; a blob's address may be read, not fetched. */
async function fetchBlob(url) {
  const image = element("img", { src: url });
  await image.decode();
  return createImageBitmap(image);
}

/** Fill in the form, and leave what is not told as the model has it. */
function restore(settings) {
  showError(null);
  const [, width, height] = /^(\d+)x(\d+)$/.exec(settings.size ?? "") ?? [];
  const all = { width, height, ...settings, n: 1 };
  const kind = /^(.*) (karras|exponential|beta)$/.exec(all.sampler ?? "");
  if (kind) Object.assign(all, { sampler: kind[1], schedule: kind[2] });
  if (all.model !== undefined && modelOf(all.model)) setModel(all.model);
  for (const name of [...TEXTS, ...NUMBERS]) {
    if (name === "model" || ((name === "width" || name === "height") && all[name] === undefined)) continue;
    $(name).value = all[name] ?? "";
    if (name === "sampler") listSchedules();
  }
  sizeChosen = true;
  for (const row of document.querySelectorAll(".adapter")) {
    const scale = all.adapters?.[row.dataset.name];
    row.querySelector("[type=checkbox]").checked = scale !== undefined;
    row.querySelector("[type=range]").value = scale ?? 1;
    row.querySelector("output").value = scale ?? 1;
  }
  if (all.strength !== undefined) $("strength").value = all.strength;
  resized();
  labels();
  say("Settings taken over.");
}

/** A picture to start from. fits: whether its size is to be that of the result, as of one that was made here. */
function startFrom(image, fits = false) {
  if (fits) {
    $("width").value = image.width;
    $("height").value = image.height;
  }
  painter.open(image);
  $("image-tools").hidden = false;
  $("image-drop").hidden = true;
  resized();
  $("mask").scrollIntoView({ block: "nearest" });
}

function noStart() {
  painter.open(null);
  $("image-tools").hidden = true;
  $("image-drop").hidden = false;
}

/** A file that was dropped on the page, pasted or chosen: one of ours tells its settings, any other is a start. */
async function open(file, onPage) {
  showError(null);
  try {
    if (onPage && file.type === "image/png") {
      const found = await call("v1/images/settings", { method: "POST", json: { image: await toBase64(file) } }).catch(
        (error) => (error.status === 400 ? null : Promise.reject(error)),
      );
      if (found) return restore(found);
    }
    startFrom(await createImageBitmap(file));
  } catch (error) {
    const message = error instanceof Refused ? error.message : `${file.name} is no picture that this browser can read.`;
    showError(new Refused(400, { message, param: "image" }));
  }
}

async function openControl(file) {
  try {
    await createImageBitmap(file);
    control = { base64: await toBase64(file), url: URL.createObjectURL(file) };
    $("control-picture").src = control.url;
    $("control-picture").hidden = $("control-remove").hidden = false;
    showError(null);
  } catch {
    showError(new Refused(400, { message: `${file.name} is no picture that this browser can read.`, param: "control_image" }));
  }
}

function noControl() {
  control = null;
  $("control-picture").hidden = $("control-remove").hidden = true;
}

// --- models

// Of a model that is not loaded yet nobody knows more than its name.
const UNKNOWN = { prompt: true, guidance: true, image: "optional", strength: true, classes: 0, noise_level: null, enlarges: 1 };

const readsOf = (name) => modelOf(name || $("model").value)?.reads ?? UNKNOWN;

const modelOf = (name) => options?.models.find((model) => model.id === name);

function setModel(name) {
  const model = modelOf(name) ?? options.models[0];
  $("model").value = model.id;
  const [width, height] = (model.size ?? "512x512").split("x");
  if (!sizeChosen) Object.assign($("width"), { value: width }) && ($("height").value = height);
  for (const side of ["width", "height"]) $(side).step = $(side).min = model.multiple ?? 8;
  const reads = readsOf(model.id);
  const shown = {
    prompt: reads.prompt,
    negative_prompt: reads.prompt && reads.guidance,
    guidance_scale: reads.guidance,
    class_labels: reads.classes > 0,
    noise_level: reads.noise_level !== null,
    strength: reads.strength,
  };
  for (const [name, there] of Object.entries(shown)) $(name).closest(".field").hidden = !there;
  $("class_labels").max = reads.classes - 1;
  $("noise_level").max = reads.noise_level ?? 0;
  $("start").hidden = reads.image === "none";
  if ($("start").hidden) noStart();
  $("empty").textContent = { needed: "Choose a picture, and press Generate." }[reads.image] ?? (reads.prompt ? "Describe a picture, and press Generate." : "Press Generate.");
  // A default beyond what the server allows would be refused.
  const most = options.limits.max_steps;
  if (model.num_inference_steps > most && !$("num_inference_steps").value) $("num_inference_steps").value = most;
  $("num_inference_steps").placeholder = model.num_inference_steps ?? "";
  $("guidance_scale").placeholder = model.guidance_scale ?? "";
  const fits = (kind) => options[kind].filter((one) => (model[kind] ?? options[kind]).includes(one));
  const chosen = new Map([...document.querySelectorAll(".adapter")].map((row) => [row.dataset.name, row]));
  $("adapter-list").replaceChildren(...fits("adapters").map((one) => chosen.get(one) ?? adapterRow(one)));
  $("adapters").hidden = !$("adapter-list").children.length;
  $("control").replaceChildren(...fits("controls").map((one) => new Option(one)));
  $("controls").hidden = !$("control").options.length;
  if ($("controls").hidden) noControl();
  $("server").textContent = [model.id, model.size?.replace("x", " × ")].filter(Boolean).join(" · ");
  resized();
}

function adapterRow(name) {
  const row = element("div", { className: "adapter" });
  row.dataset.name = name;
  const number = document.querySelectorAll(".adapter").length + Math.random().toString(36).slice(2);
  const [check, range] = [`adapter-${number}`, `weight-${number}`];
  row.append(
    element("input", { type: "checkbox", id: check }),
    element("label", { htmlFor: check, textContent: name, title: name }),
    element("input", { type: "range", id: range, min: -1, max: 2, step: 0.05, value: 1, ariaLabel: `Weight of ${name}` }),
    element("output", { htmlFor: range, value: "1" }),
  );
  row.querySelector("[type=range]").addEventListener("input", (event) => {
    row.querySelector("output").value = event.target.value;
    row.querySelector("[type=checkbox]").checked = true;
  });
  return row;
}

function listSchedules() {
  const sampler = options.samplers.find((one) => one.name === $("sampler").value);
  const before = $("schedule").value;
  $("schedule").replaceChildren(new Option("the model's own", ""), ...(sampler?.schedules ?? []).map((one) => new Option(one)));
  $("schedule").value = sampler?.schedules.includes(before) ? before : "";
  $("schedule").disabled = !sampler?.schedules.length;
}

function resized() {
  const [width, height] = [Number($("width").value), Number($("height").value)];
  if (painter.image && width > 0 && height > 0) painter.resize(width, height);
}

// --- messages

const PLACES = { size: "width", image: "image-drop", control_image: "control-drop", mask: "image-drop", adapters: "adapter-list" };

/** Beside the field that it is about; null takes all of them away. */
function showError(error) {
  for (const note of document.querySelectorAll("#form .error")) if (note.id !== "general-error") note.remove();
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
  $("general-error").hidden = true;
  if (error === null) return;
  if (!(error instanceof Refused)) throw error;
  const field = $(PLACES[error.field] ?? error.field ?? "");
  if (!field || !form.contains(field) || field.closest("[hidden]")) {
    $("general-error").textContent = error.message;
    $("general-error").hidden = false;
    return;
  }
  const note = element("p", { className: "error", id: `${field.id}-error`, role: "alert", textContent: error.message });
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", note.id);
  (field.closest(".row") ?? field.closest(".field") ?? field).after(note);
  if (field.matches("input, textarea, select")) field.focus();
  note.scrollIntoView({ block: "nearest" });
}

function say(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

function labels() {
  $("strength-value").value = `${Math.round(100 * $("strength").value)} %`;
  $("control-scale-value").value = $("control_scale").value;
}

function seconds(value, digits = 1) {
  return value < 90 ? `${value.toFixed(digits)} s` : `${Math.round(value / 60)} min`;
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function element(name, properties) {
  const made = document.createElement(name);
  const { role, ...others } = properties;
  if (role) made.setAttribute("role", role);
  if (others.htmlFor && name === "output") {
    made.setAttribute("for", others.htmlFor);
    delete others.htmlFor;
  }
  return Object.assign(made, others);
}

// --- what the person does

form.addEventListener("submit", (event) => {
  event.preventDefault();
  try {
    submit(readForm());
  } catch (error) {
    showError(error);
  }
});
$("stop").addEventListener("click", stop);
$("swap").addEventListener("click", () => {
  [$("width").value, $("height").value] = [$("height").value, $("width").value];
  sizeChosen = true;
  resized();
});
for (const side of ["width", "height"]) {
  $(side).addEventListener("input", () => {
    sizeChosen = true;
    resized();
  });
}
$("model").addEventListener("change", () => setModel($("model").value));
$("sampler").addEventListener("change", listSchedules);
for (const range of ["strength", "control_scale"]) $(range).addEventListener("input", labels);
$("brush").addEventListener("input", () => (painter.brush = $("brush").value / 100));
$("undo").addEventListener("click", () => painter.undo());
$("clear").addEventListener("click", () => painter.clear());
$("image-remove").addEventListener("click", noStart);
$("control-remove").addEventListener("click", noControl);
$("pair-split").addEventListener("input", split);
for (const [name, act] of Object.entries(ACTIONS)) {
  if (name !== "download") $(name).addEventListener("click", () => current?.kind === "picture" && act(current));
}
$("show-keys").addEventListener("click", () => $("keys").showModal());

for (const [name, take] of [["image", (file) => open(file, false)], ["control", openControl]]) {
  $(`${name}-choose`).addEventListener("click", () => $(`${name}-file`).click());
  $(`${name}-file`).addEventListener("change", (event) => {
    if (event.target.files[0]) take(event.target.files[0]);
    event.target.value = "";
  });
}

const fileOf = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));
let over = null; // the last element that a drag was over
addEventListener("dragenter", (event) => {
  over = event.target;
  document.body.classList.add("over-page");
});
addEventListener("dragleave", (event) => {
  if (event.target === over) document.body.classList.remove("over-page");
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over-page");
  const file = fileOf(event.dataTransfer);
  if (!file) return;
  if (event.target.closest?.("#controls")) openControl(file);
  else open(file, !event.target.closest?.("#form"));
});
addEventListener("paste", (event) => {
  const file = fileOf(event.clipboardData);
  if (file) open(file, false);
});

addEventListener("keydown", (event) => {
  const open = document.querySelector("dialog[open]");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !open) {
    event.preventDefault();
    form.requestSubmit();
  } else if (event.key === "Escape" && !open) {
    if (comparing) ACTIONS.compare(comparing);
    else stop();
  } else if (event.key === "z" && (event.ctrlKey || event.metaKey) && event.target === $("mask")) {
    event.preventDefault();
    painter.undo();
  }
  const typing = event.target.closest?.("textarea, select, input");
  if (open || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "arrowleft") step(-1);
  else if (key === "arrowright") step(1);
  else if (key === "?") $("keys").showModal();
  else if (key === "p") {
    event.preventDefault();
    $("prompt").focus();
  } else if (key === "[" || key === "]") {
    $("brush").value = Number($("brush").value) + (key === "]" ? 3 : -3);
    painter.brush = $("brush").value / 100;
  } else if (LETTERS[key] && current?.kind === "picture") ACTIONS[LETTERS[key]](current);
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => painter.draw());

// --- the beginning

async function start() {
  try {
    options = await call("v1/options");
  } catch (error) {
    showError(error);
    await sleep(2000);
    return start();
  }
  showError(null);
  $("model").replaceChildren(...options.models.map((model) => new Option(model.id)));
  $("model-row").hidden = options.models.length < 2;
  $("sampler").append(...options.samplers.map((one) => new Option(one.name)));
  $("n").max = options.limits.max_n;
  $("num_inference_steps").max = options.limits.max_steps;
  $("prompt").maxLength = $("negative_prompt").maxLength = options.limits.max_prompt;
  painter.brush = $("brush").value / 100;
  listSchedules();
  labels();
  setModel(options.models[0].id);
  painter.clear();
  ended();
  resume();
}

start();
