// What tests ask a folder for the web in Node: the folder, and a file of requests as JSON. Answers are JSON.
import { readFileSync, writeSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, requests] = process.argv.slice(2);
const { load } = await import(pathToFileURL(resolve(folder, "fastldm.js")).href);
const model = await load(folder);
const answers = [];
for (const { prompt, options } of JSON.parse(readFileSync(requests, "utf8"))) {
  const answer = { rows: [], steps: [], previews: 0 };
  try {
    for await (const { row, rows, step, image } of model.generate(prompt, { previews: true, ...options })) {
      answer.rows.push(row);
      answer.total = rows;
      if (answer.steps.at(-1) !== step) answer.steps.push(step);
      if (image) answer.previews++;
      if (row === rows) answer.pixels = Array.from(image.pixels);
    }
  } catch (error) {
    answer.error = error.message;
  }
  answers.push(answer);
}
const text = Buffer.from(JSON.stringify(answers));
for (let k = 0; k < text.length; ) k += writeSync(1, text, k);
