// An image in Node, from a folder that `fastldm export --to web` wrote:
//
//     node picture.mjs ./web "a red apple" 7 apple.png                     with the folder's onnxruntime-web
//     node picture.mjs ./web "a red apple" 7 apple.png onnxruntime-node    with that package, which is faster
//
// onnxruntime-node needs nothing that its install script fetches: ONNXRUNTIME_NODE_INSTALL=skip npm install onnxruntime-node
import { writeFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { crc32, deflateSync } from "node:zlib";

const [folder, prompt, seed, output, runtime] = process.argv.slice(2);
const { load } = await import(pathToFileURL(resolve(folder, "fastldm.js")).href);
const model = await load(folder, { onnxruntime: runtime && (await import(runtime)) });
const start = performance.now();
for await (const { step, steps, image } of model.generate(prompt, { seed: Number(seed) })) {
  console.error(`step ${step} of ${steps}, ${Math.round(performance.now() - start)} ms`);
  if (image) writeFileSync(output, png(image));
}
model.close();

function png({ width, height, data }) {
  const lines = Buffer.alloc(height * (4 * width + 1)); // each begins with its filter, 0
  for (let y = 0; y < height; y++) lines.set(data.subarray(4 * width * y, 4 * width * (y + 1)), y * (4 * width + 1) + 1);
  const header = Buffer.from([0, 0, 0, 0, 0, 0, 0, 0, 8, 6, 0, 0, 0]); // 8 bits, RGBA
  header.writeUInt32BE(width, 0);
  header.writeUInt32BE(height, 4);
  const chunk = (name, content) => {
    const named = Buffer.concat([Buffer.from(name), content]);
    const number = (value) => Buffer.from([value >>> 24, value >>> 16, value >>> 8, value]);
    return Buffer.concat([number(content.length), named, number(crc32(named))]);
  };
  const signature = Buffer.from([0x89, 0x50, 0x4e, 0x47, 13, 10, 26, 10]);
  return Buffer.concat([signature, chunk("IHDR", header), chunk("IDAT", deflateSync(lines)), chunk("IEND", Buffer.alloc(0))]);
}
