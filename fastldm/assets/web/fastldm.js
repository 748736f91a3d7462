/**
 * Text to images in a browser tab or in Node, with a model that `fastldm export --to web` wrote.
 *
 *     import { load } from "./fastldm.js";
 *     const model = await load("./");
 *     for await (const step of model.generate("a red apple", { seed: 0 })) console.log(`${step.row} of ${step.rows}`);
 *
 * A seed gives the image that fastldm gives in Python. In a tab the model runs in a worker of its own, which is this
 * file too. What is wrong in a call is a TypeError or a RangeError that says what was expected.
 */

const WORKER = "fastldm";
const FORMAT = 1; // of the folder
const MAX_TEXT = 10_000; // characters of a prompt

/**
 * Open the model in the folder at `url`, by default this module's: a URL, or in Node a path too.
 *
 * device: "wasm" or "webgpu"; "auto" takes WebGPU where there is a GPU that it can use.
 * threads: of wasm, more than one only where the page is isolated (COOP and COEP headers); by default up to 4.
 * onProgress(loaded, total): bytes that have come.
 * onnxruntime: a module to run the model in this thread with, such as onnxruntime-node, in place of the folder's.
 */
export async function load(url, { device = "auto", threads, onProgress, onnxruntime } = {}) {
  if (!["auto", "wasm", "webgpu"].includes(device)) throw new RangeError(`device is ${device}: expected auto, wasm or webgpu`);
  const folder = folderOf(url);
  if (onnxruntime || typeof Worker === "undefined") return Local.open(folder, { device, threads, onProgress, onnxruntime });
  return Remote.open(folder.href, { device, threads }, onProgress);
}

/** A model in a worker. Rows are taken when they are asked for, so that leaving the loop ends the work. */
class Remote {
  #worker;
  #waiting = new Map(); // by number of the call
  #calls = 0;
  #failed = null;

  static async open(folder, options, onProgress) {
    const model = new Remote();
    model.#worker = new Worker(new URL("./fastldm.js", import.meta.url), { type: "module", name: WORKER });
    model.#worker.onmessage = ({ data }) => {
      if (data.progress) return onProgress?.(...data.progress);
      const { resolve, reject } = model.#waiting.get(data.id);
      model.#waiting.delete(data.id);
      if ("error" in data) reject(data.error);
      else resolve(data.result);
    };
    model.#worker.onerror = (event) => model.#fail(new Error(event.message || "the worker fastldm.js did not load"));
    try {
      /** What the model is: name, device, sizes, samplers and defaults. */
      model.info = await model.#call("open", folder, options);
    } catch (error) {
      model.close();
      throw error;
    }
    return model;
  }

  /** See `Local.generate`. */
  async *generate(prompt, { signal, ...options } = {}) {
    const run = this.#calls;
    await this.#call("start", run, prompt, options);
    try {
      for (;;) {
        signal?.throwIfAborted();
        const { value, done } = await this.#call("next", run);
        if (done) return;
        yield value;
      }
    } finally {
      if (!this.#failed) await this.#call("stop", run);
    }
  }

  /** End the worker, and with it what it is doing. */
  close() {
    this.#worker.terminate();
    this.#fail(new Error("the model was closed"));
  }

  #call(method, ...args) {
    if (this.#failed) return Promise.reject(this.#failed);
    const id = this.#calls++;
    this.#worker.postMessage({ id, method, args });
    return new Promise((resolve, reject) => this.#waiting.set(id, { resolve, reject }));
  }

  #fail(error) {
    this.#failed ??= error;
    for (const { reject } of this.#waiting.values()) reject(this.#failed);
    this.#waiting.clear();
  }
}

/** The worker's side. */
function serve() {
  let model;
  const runs = new Map();
  const methods = {
    async open(folder, options) {
      const onProgress = (...progress) => postMessage({ progress });
      model = await Local.open(new URL(folder), { ...options, onProgress });
      return model.info;
    },
    start: (run, prompt, options) => void runs.set(run, model.generate(prompt, options)),
    next: (run) => runs.get(run).next(),
    async stop(run) {
      await runs.get(run).return();
      runs.delete(run);
    },
  };
  addEventListener("message", async ({ data: { id, method, args } }) => {
    try {
      postMessage({ id, result: await methods[method](...args) });
    } catch (error) {
      postMessage({ id, error: error instanceof Error ? error : new Error(String(error)) });
    }
  });
}

/** A model in this thread. */
class Local {
  #ort;
  #session;
  #tokenizer;
  #samplers; // by name, tables by number of steps
  #turn = Promise.resolve(); // a session takes one call at a time

  static async open(folder, { device, threads, onProgress, onnxruntime }) {
    const own = JSON.parse(new TextDecoder().decode(await read(folder, "model.json")));
    if (own.format !== FORMAT) throw new Error(`the folder ${folder} has format ${own.format}: expected ${FORMAT}`);
    const gpu = !onnxruntime && device !== "wasm" && (await hasGPU(device, own.files));
    const engine = onnxruntime ? null : ENGINES[gpu ? "webgpu" : "wasm"];
    const names = ["model.onnx.gz", "tokenizer.json.gz", "tables.json.gz", ...(engine ? [`${engine.binary}.gz`] : [])];
    const total = names.reduce((sum, name) => sum + own.files[name], 0);
    let loaded = 0;
    const report = (count) => onProgress?.((loaded = Math.min(loaded + count, total)), total);
    const [graph, tokenizer, tables, binary] = await Promise.all(names.map(async (name) => unzip(await read(folder, name, report))));
    const model = new Local();
    const json = (bytes) => JSON.parse(new TextDecoder().decode(bytes));
    model.#tokenizer = new Tokenizer(json(tokenizer));
    model.#samplers = json(tables);
    let count = 1;
    if (engine) {
      model.#ort = await import(new URL(engine.module, folder).href);
      const { wasm } = model.#ort.env;
      wasm.wasmPaths = { mjs: new URL(engine.loader, folder).href };
      wasm.wasmBinary = binary.buffer;
      if (globalThis.crossOriginIsolated) count = threads ?? Math.min(4, navigator.hardwareConcurrency);
      wasm.numThreads = count;
    } else {
      model.#ort = onnxruntime.default ?? onnxruntime;
    }
    const providers = engine ? [gpu ? "webgpu" : "wasm"] : ["cpu"];
    const options = { executionProviders: providers, logSeverityLevel: 3 };
    if (!engine && threads) options.intraOpNumThreads = count = threads;
    model.#session = await model.#ort.InferenceSession.create(graph, options);
    const samplers = Object.fromEntries(Object.entries(model.#samplers).map(([name, own]) => [name, Object.keys(own).map(Number)]));
    model.info = { ...own, device: providers[0], threads: count, samplers };
    return model;
  }

  /**
   * The rows of a request, of which some samplers have two a step. The last has the image:
   *
   *     { row, rows, step, steps, seed, image: { width, height, data, pixels } }
   *
   * data: 8-bit RGBA, as ImageData takes it. pixels: Float32Array (3, height, width), about -1 to 1.
   * seed: a whole number from 0; by default any. steps, sampler, guidanceScale, width, height: by default the model's.
   * negativePrompt: what to avoid, read where the guidance scale is above 1. previews: an image with each row.
   * signal: an AbortSignal, which ends it before the next row; so does leaving the loop.
   */
  async *generate(prompt, { signal, ...options } = {}) {
    const { seed, table, guidance, width, height, previews, ids, negatives } = this.#complete(prompt, options);
    const { channels, factor, readsGuidance } = this.info;
    const [h, w, rows] = [height / factor, width / factor, table.timesteps.length];
    const area = h * w;
    const floats = (data, ...dims) => new this.#ort.Tensor("float32", data, dims);
    const integers = (data, ...dims) => new this.#ort.Tensor("int32", data, dims);
    const latents = (data) => floats(data, 1, channels, h, w);
    const zeros = latents(new Float32Array(channels * area));
    const noise = new Generator(seed);
    const scale = Math.fround(table.scale);
    const guided = guidance > 1 && !readsGuidance;
    let state = {
      latents: latents(noise.normal(channels * area).map((x) => scale * x)),
      anchor: zeros,
      history: floats(new Float32Array(4 * channels * area), 1, 4 * channels, h, w),
    };
    const shared = {
      input_ids: integers(ids, 1, ids.length),
      negative_ids: integers(guided ? negatives : new Int32Array(0), guided ? 1 : 0, ids.length),
      guidance: floats(new Float32Array([guided || readsGuidance ? guidance : 1]), 1, 1),
      rescale: floats(new Float32Array(1), 1),
      mask: floats(new Float32Array(area).fill(1), 1, 1, h, w),
      init: zeros,
      init_noise: zeros,
    };
    const columns = this.info.columns.length;
    for (let row = 0; row < rows; row++) {
      signal?.throwIfAborted();
      const decode = previews || row === rows - 1;
      const drawn = table.draws[row] ? noise.normal(channels * area) : zeros.data;
      const result = await this.#run(
        {
          ...state,
          ...shared,
          timesteps: floats(new Float32Array([table.timesteps[row]]), 1, 1),
          table: floats(new Float32Array(table.rows.slice(row * columns, (row + 1) * columns)), 1, 1, columns),
          noises: floats(drawn, 1, 1, channels, h, w),
          decode: integers(new Int32Array([decode ? 1 : 0]), 1),
        },
        ["latents_out", "anchor_out", "history_out", "norms", ...(decode ? ["image"] : [])],
      );
      state = { latents: result.latents_out, anchor: result.anchor_out, history: result.history_out };
      if (!Number.isFinite(result.norms.data[0])) throw new Error(`row ${row + 1} of ${rows} is not finite: take another sampler`);
      const last = table.index[rows - 1] + 1;
      const step = { row: row + 1, rows, step: table.index[row] + 1, steps: last, seed };
      yield decode ? { ...step, image: imageOf(result.image) } : step;
    }
  }

  close() {
    const session = this.#session;
    this.#turn = this.#turn.then(() => session.release());
  }

  #run(feeds, outputs) {
    const result = this.#turn.then(() => this.#session.run(feeds, outputs));
    this.#turn = result.catch(() => {});
    return result;
  }

  /** A request with defaults filled in, all of it checked. */
  #complete(prompt, options) {
    const { info } = this;
    const defaults = {
      seed: crypto.getRandomValues(new Uint32Array(1))[0],
      steps: info.steps,
      sampler: info.sampler,
      guidanceScale: info.guidanceScale,
      width: info.width.usual,
      height: info.height.usual,
      negativePrompt: "",
      previews: false,
    };
    const known = Object.keys(defaults);
    for (const name of Object.keys(options)) {
      if (!known.includes(name)) throw new TypeError(`unknown option ${name}: there are ${known.join(", ")} and signal`);
    }
    const given = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
    const { seed, steps, sampler, guidanceScale, width, height, negativePrompt, previews } = { ...defaults, ...given };
    for (const [name, text] of Object.entries({ prompt, negativePrompt, sampler })) {
      if (typeof text !== "string") throw new TypeError(`${name} is ${text}: expected a text`);
    }
    if (!Number.isSafeInteger(seed) || seed < 0) throw new RangeError(`seed is ${seed}: expected a whole number from 0`);
    if (!(guidanceScale >= 0 && guidanceScale <= 1000)) {
      throw new RangeError(`guidanceScale is ${guidanceScale}: expected a number from 0 to 1000`);
    }
    for (const [name, value] of Object.entries({ width, height })) {
      const { least, most, multiple } = info[name];
      if (!(Number.isInteger(value / multiple) && value >= least && value <= most)) {
        throw new RangeError(`${name} is ${value}: expected a multiple of ${multiple} from ${least} to ${most}`);
      }
    }
    const plain = (name) => name.toLowerCase().replace(/[^a-z0-9+]/g, "");
    const found = Object.keys(this.#samplers).find((name) => plain(name) === plain(sampler));
    if (!found) throw new RangeError(`unknown sampler ${sampler}: there are ${Object.keys(this.#samplers).join(", ")}`);
    const tables = this.#samplers[found];
    if (!Object.hasOwn(tables, steps)) {
      throw new RangeError(`steps is ${steps}: ${found} has tables for ${Object.keys(tables).join(", ")}`);
    }
    const ids = this.#tokenizer.window(prompt, "prompt");
    const negatives = this.#tokenizer.window(negativePrompt, "negativePrompt");
    return { seed, table: tables[steps], guidance: guidanceScale, width, height, previews, ids, negatives };
  }
}

/** (1, 3, H, W) in -1..1 as RGBA and as it is. */
function imageOf({ data, dims: [, , height, width] }) {
  const area = width * height;
  const bytes = new Uint8ClampedArray(4 * area).fill(255);
  for (let c = 0; c < 3; c++) for (let k = 0; k < area; k++) bytes[4 * k + c] = (data[c * area + k] / 2 + 0.5) * 255;
  return { width, height, data: bytes, pixels: new Float32Array(data) };
}

// ------------------------------------------------------------------------------------------------------------ files

const ENGINES = {
  wasm: {
    module: "ort/ort.wasm.min.mjs",
    loader: "ort/ort-wasm-simd-threaded.mjs",
    binary: "ort/ort-wasm-simd-threaded.wasm",
  },
  webgpu: {
    module: "ort/ort.jspi.min.mjs",
    loader: "ort/ort-wasm-simd-threaded.jspi.mjs",
    binary: "ort/ort-wasm-simd-threaded.jspi.wasm",
  },
};

/** Whether WebGPU is to be used. An Error where it was asked for and cannot be. */
async function hasGPU(device, files) {
  const able = typeof WebAssembly.Suspending === "function" && Object.hasOwn(files, `${ENGINES.webgpu.binary}.gz`);
  const adapter = able ? await globalThis.navigator?.gpu?.requestAdapter() : null;
  if (device === "webgpu" && !adapter) throw new Error("WebGPU was asked for, and is not to be had here: take wasm");
  return Boolean(adapter) && (device === "webgpu" || !adapter.info?.isFallbackAdapter);
}

const inNode = () => typeof process !== "undefined" && Boolean(process.versions?.node);

function folderOf(url) {
  if (url === undefined) return new URL("./", import.meta.url);
  const text = String(url).replace(/\/?$/, "/");
  if (inNode() && !/^[a-z]+:\/\//.test(text)) return process.getBuiltinModule("node:url").pathToFileURL(text);
  return new URL(text, globalThis.document?.baseURI ?? globalThis.location?.href);
}

/** The bytes of a file of the folder. report(count): that so many more have come. */
async function read(folder, name, report = () => {}) {
  const url = new URL(name, folder);
  if (url.protocol === "file:" && inNode()) {
    const bytes = await process.getBuiltinModule("node:fs").promises.readFile(url);
    report(bytes.length);
    return new Uint8Array(bytes);
  }
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} could not be read (${answer.status})`);
  const counted = new TransformStream({
    transform(chunk, controller) {
      report(chunk.length);
      controller.enqueue(chunk);
    },
  });
  return new Uint8Array(await new Response(answer.body.pipeThrough(counted)).arrayBuffer());
}

/** What was compressed with gzip, unless the server has done it on the way. */
async function unzip(bytes) {
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// ------------------------------------------------------------------------------------------------------------ noise

/** PyTorch's generator on a CPU: the 32-bit Mersenne twister (Matsumoto and Nishimura, 1998), and its normal numbers. */
export class Generator {
  #state = new Uint32Array(624);
  #next = 624;
  #spare = null; // the second of a pair

  /** seed: a whole number from 0, of which the lower 32 bits count. */
  constructor(seed) {
    const state = this.#state;
    state[0] = seed % 2 ** 32;
    for (let k = 1; k < 624; k++) state[k] = Math.imul(1812433253, state[k - 1] ^ (state[k - 1] >>> 30)) + k;
  }

  /** 32 random bits. */
  bits() {
    const state = this.#state;
    if (this.#next === 624) {
      for (let k = 0; k < 624; k++) {
        const y = (state[k] & 0x80000000) | (state[(k + 1) % 624] & 0x7fffffff);
        state[k] = state[(k + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.#next = 0;
    }
    let y = state[this.#next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  /** torch.randn(count): 16 numbers and more by Box and Muller in float32, in blocks; fewer in float64, in pairs. */
  normal(count) {
    const out = new Float32Array(count);
    if (count < 16) return out.map(() => this.#one());
    for (let k = 0; k < count; k++) out[k] = this.#uniform();
    for (let k = 0; k + 16 <= count; k += 16) block(out, k);
    if (count % 16) {
      // the last 16 anew
      for (let k = count - 16; k < count; k++) out[k] = this.#uniform();
      block(out, count - 16);
    }
    return out;
  }

  #uniform() {
    return (this.bits() & 0xffffff) / 2 ** 24;
  }

  #uniform64() {
    const high = this.bits() & 0x1fffff;
    return (high * 2 ** 32 + this.bits()) / 2 ** 53;
  }

  #one() {
    if (this.#spare !== null) {
      const spare = this.#spare;
      this.#spare = null;
      return spare;
    }
    const angle = 2 * Math.PI * this.#uniform64();
    const radius = Math.sqrt(-2 * Math.log1p(-this.#uniform64()));
    this.#spare = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  }
}

/** 16 uniform numbers as normal ones: of each pair, 8 apart, the first is the radius's and the second the angle's. */
function block(out, start) {
  for (let k = start; k < start + 8; k++) {
    const radius = Math.fround(Math.sqrt(Math.fround(-2 * Math.fround(Math.log(1 - out[k])))));
    const angle = Math.fround(Math.fround(2 * Math.PI) * out[k + 8]);
    out[k] = radius * Math.fround(Math.cos(angle));
    out[k + 8] = radius * Math.fround(Math.sin(angle));
  }
}

// ------------------------------------------------------------------------------------------------------------ words

// As fastldm/conditioning/tokenizer.py splits: into words, and those as GPT-2 does.
const WORDS = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;
const PIECES = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}+|[^\p{White_Space}\p{L}\p{N}]+/gu;

/** CLIP's byte-pair tokenizer: ids are those of fastldm's in Python. */
export class Tokenizer {
  #own;
  #ids;
  #ranks;
  #raw; // patterns of tokens that are found in the text as it is, and in the normalized one
  #normalized;
  #bytes = letters();

  constructor(own) {
    this.#own = own;
    this.#ids = new Map(Object.entries(own.vocab));
    this.#ranks = new Map(own.merges.map((pair, rank) => [pair, rank]));
    const pattern = (normalized) => {
      const tokens = own.added.filter((token) => token.normalized === normalized);
      const found = new Map(tokens.map((token) => [normalized ? normalize(token.content) : token.content, token]));
      const sources = [...found].sort(([a], [b]) => b.length - a.length).map(([text, token]) => source(text, token));
      return { pattern: sources.length ? new RegExp(`(${sources.join("|")})`, "u") : null, found };
    };
    this.#raw = pattern(false);
    this.#normalized = pattern(true);
  }

  /** Int32Array of a full window: the text between bos and eos, and padding. RangeError where it does not fit. */
  window(text, name = "text") {
    if (text.length > MAX_TEXT) throw new RangeError(`${name} has ${text.length} characters: expected at most ${MAX_TEXT}`);
    const { bos, eos, pad, length } = this.#own;
    const ids = this.ids(text);
    if (ids.length > length - 2) {
      throw new RangeError(`${name} has ${ids.length} tokens: this model reads at most ${length - 2} at a time`);
    }
    return new Int32Array(length).fill(pad).map((id, k) => (k ? (ids[k - 1] ?? (k === ids.length + 1 ? eos : id)) : bos));
  }

  /** Token ids of a text. */
  ids(text) {
    const ids = this.#split(text, this.#raw, (part) =>
      this.#split(normalize(part), this.#normalized, (rest) => {
        const words = rest.match(WORDS) ?? [];
        return words.flatMap((word) => word.match(PIECES)).flatMap((piece) => this.#merge(piece));
      }),
    );
    return this.#expanded(ids);
  }

  /** The ids of added tokens in a text, and of what is between them. */
  #split(text, { pattern, found }, between) {
    if (!pattern) return between(text);
    // what the pattern caught is at odd places
    return text.split(pattern).flatMap((part, k) => {
      if (k % 2 === 0) return part ? between(part) : [];
      return [(found.get(part) ?? found.get(part.replace(/^\p{White_Space}+|\p{White_Space}+$/gu, ""))).id];
    });
  }

  #merge(word) {
    const parts = Array.from(new TextEncoder().encode(word), (byte) => this.#bytes[byte]);
    parts[parts.length - 1] += "</w>";
    const rank = (k) => this.#ranks.get(`${parts[k]} ${parts[k + 1]}`) ?? Infinity;
    const ranks = parts.slice(1).map((_, k) => rank(k));
    for (;;) {
      let at = 0;
      for (let k = 1; k < ranks.length; k++) if (ranks[k] < ranks[at]) at = k;
      if (!(ranks[at] < Infinity)) return parts.map((part) => this.#ids.get(part) ?? this.#own.unk);
      parts.splice(at, 2, parts[at] + parts[at + 1]);
      ranks.splice(at, 1);
      if (at > 0) ranks[at - 1] = rank(at - 1);
      if (at < ranks.length) ranks[at] = rank(at);
    }
  }

  /** Tokens of textual inversion with several vectors as all of them, unless they are all there. */
  #expanded(ids) {
    const expanded = [];
    for (let k = 0; k < ids.length; ) {
      const token = [ids[k], ...(this.#own.vectors[ids[k]] ?? [])];
      expanded.push(...token);
      k += token.every((id, n) => ids[k + n] === id) ? token.length : 1;
    }
    return expanded;
  }
}

/** NFC, one blank for white space, and each character by itself in lower case, so that no sigma becomes a final one. */
function normalize(text) {
  return Array.from(text.normalize("NFC").replace(/\p{White_Space}+/gu, " "), (c) => c.toLowerCase()).join("");
}

/** The pattern of an added token. */
function source(text, token) {
  const alone = token.single_word ? ["(?<![\\p{L}\\p{N}_])", "(?![\\p{L}\\p{N}_])"] : ["", ""];
  const [before, after] = [token.lstrip, token.rstrip].map((strips) => (strips ? "\\p{White_Space}*" : ""));
  return before + alone[0] + text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&") + alone[1] + after;
}

/** The letters by which GPT-2's vocabularies name bytes: printable ones themselves, the rest from 256 on. */
function letters() {
  const printable = (k) => (k > 32 && k < 127) || (k > 160 && k < 173) || k > 173;
  let next = 256;
  return Array.from({ length: 256 }, (_, k) => String.fromCodePoint(printable(k) ? k : next++));
}

if (typeof DedicatedWorkerGlobalScope !== "undefined" && globalThis instanceof DedicatedWorkerGlobalScope && name === WORKER) serve();
