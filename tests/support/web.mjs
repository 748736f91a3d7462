// What tests ask fastldm.js in Node: the path of the module, and a file of questions as JSON. Answers are JSON.
import { readFileSync, writeSync } from "node:fs";
import { pathToFileURL } from "node:url";

const { Generator, Tokenizer } = await import(pathToFileURL(process.argv[2]).href);
const { draws, tokenizers, texts } = JSON.parse(readFileSync(process.argv[3], "utf8"));

const numbers = draws.map(({ seed, counts }) => {
  const generator = new Generator(seed);
  return counts.map((count) => Array.from(generator.normal(count)));
});
const ids = tokenizers.map((own) => {
  const tokenizer = new Tokenizer(own);
  return texts.map((text) => tokenizer.ids(text));
});
const text = Buffer.from(JSON.stringify({ numbers, ids }));
for (let k = 0; k < text.length; ) k += writeSync(1, text, k);
