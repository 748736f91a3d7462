import { load } from "./fastldm.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["seed", "steps", "guidanceScale", "width", "height"];

let model = null;
let running = null; // the AbortController of what is being made
let current = null; // the picture that is shown

// --- the model

async function open() {
  const device = new URLSearchParams(location.search).get("device") ?? undefined;
  try {
    model = await load("./", { device, onProgress: (loaded, total) => progress(loaded / total, loading(loaded, total)) });
  } catch (error) {
    progress(null, "The model could not be loaded.");
    return fail(error);
  }
  const { info } = model;
  $("model").textContent = `${info.name}, ${info.weights}, on ${info.device === "webgpu" ? "WebGPU" : "WebAssembly"}`;
  $("threads").textContent = threads(info);
  for (const name of Object.keys(info.samplers)) $("sampler").add(new Option(name, name, false, name === info.sampler));
  for (const name of ["steps", "guidanceScale"]) $(name).placeholder = info[name];
  for (const name of ["width", "height"]) {
    const { least, most, multiple, usual } = info[name];
    Object.assign($(name), { min: least, max: most, step: multiple, placeholder: usual });
  }
  listSteps();
  $("generate").disabled = false;
  progress(null, "Describe a picture, and press Generate.");
}

function loading(loaded, total) {
  if (loaded >= total) return "The model is here and being prepared.";
  const megabytes = (bytes) => (bytes / 1e6).toFixed(0);
  return `The model is loading: ${megabytes(loaded)} of ${megabytes(total)} MB.`;
}

function threads({ device, threads }) {
  if (device === "webgpu") return "It runs on the GPU.";
  if (threads > 1) return `It runs on ${threads} threads.`;
  if (crossOriginIsolated) return "It runs on one thread.";
  return "It runs on one thread: a page has more only where its server isolates it, with the headers COOP and COEP.";
}

function listSteps() {
  const counts = model.info.samplers[$("sampler").value];
  $("step-counts").replaceChildren(...counts.map((count) => new Option(count)));
  $("steps").max = counts.at(-1);
}

// --- a picture

async function generate() {
  if (running || !model) return;
  const prompt = $("prompt").value.trim() || $("prompt").placeholder;
  const options = { sampler: $("sampler").value, negativePrompt: $("negativePrompt").value.trim(), previews: $("previews").checked };
  for (const name of NUMBERS) if ($(name).value !== "") options[name] = $(name).valueAsNumber;
  running = new AbortController();
  $("error").hidden = true;
  $("generate").disabled = true;
  $("stop").disabled = false;
  progress(0, "The first step.");
  if (matchMedia("(max-width: 720px)").matches) $("stage").scrollIntoView();
  const start = performance.now();
  try {
    for await (const step of model.generate(prompt, { ...options, signal: running.signal })) {
      progress(step.row / step.rows, `Step ${step.step} of ${step.steps}.`);
      if (step.image) draw(step.image, prompt);
      if (step.row < step.rows) continue;
      const seconds = (performance.now() - start) / 1000;
      progress(null, `Done in ${seconds.toFixed(1)} s.`);
      await keep({ prompt, ...options, steps: step.steps, seed: step.seed, image: step.image, seconds });
    }
  } catch (error) {
    if (error.name === "AbortError") progress(null, "Stopped.");
    else {
      progress(null, "");
      fail(error);
    }
    if (current) show(current);
  }
  running = null;
  $("generate").disabled = false;
  $("stop").disabled = true;
}

function draw({ data, width, height }, prompt) {
  const canvas = $("picture");
  Object.assign(canvas, { width, height, hidden: false });
  canvas.getContext("2d").putImageData(new ImageData(data, width, height), 0, 0);
  canvas.setAttribute("aria-label", prompt);
  $("empty").hidden = true;
}

async function keep(picture) {
  const blob = await new Promise((resolve) => $("picture").toBlob(resolve));
  picture.url = URL.createObjectURL(blob);
  const image = Object.assign(new Image(), { src: picture.url, alt: picture.prompt });
  picture.tile = Object.assign(document.createElement("button"), { type: "button", className: "tile", onclick: () => running || show(picture) });
  picture.tile.append(image);
  const item = document.createElement("li");
  item.append(picture.tile);
  $("made").prepend(item);
  show(picture);
}

function show(picture) {
  current?.tile.removeAttribute("aria-current");
  current = picture;
  picture.tile.setAttribute("aria-current", "true");
  draw(picture.image, picture.prompt);
  const { image, prompt, negativePrompt, seed, steps, sampler, guidanceScale = model.info.guidanceScale } = picture;
  const lines = { Prompt: prompt, Without: negativePrompt, Seed: seed, Steps: `${steps}, ${sampler}`, Guidance: guidanceScale, Size: `${image.width} × ${image.height}` };
  const filled = Object.entries(lines).filter(([, value]) => value !== "");
  $("settings").replaceChildren(...filled.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
  Object.assign($("download"), { href: picture.url, download: `${prompt.replace(/\W+/g, "-").slice(0, 40)}-${seed}.png` });
  $("about").hidden = false;
}

// --- the page

function element(tag, text) {
  return Object.assign(document.createElement(tag), { textContent: text });
}

function progress(fraction, text) {
  $("progress").hidden = fraction === null;
  if (fraction !== null) $("progress").value = fraction;
  $("status").textContent = text;
}

function fail(error) {
  $("error").textContent = error.message;
  $("error").hidden = false;
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  generate();
};
$("stop").onclick = () => running?.abort();
$("sampler").onchange = listSteps;
$("again").onclick = () => {
  $("seed").value = "";
  $("prompt").value = current.prompt;
  generate();
};
document.onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  if (event.key === "Escape") running?.abort();
};

open();
