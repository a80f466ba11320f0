// Greedy generation by onnxruntime-node from a folder that `loraone-export onnx` wrote: token ids in, token ids out.
//
//     npm install --ignore-scripts
//     node generate.mjs FOLDER 40 46484 553 216 33 34 13855      (40 new tokens, or up to the end of the sequence)

import { readFileSync } from "node:fs";
import { join } from "node:path";
import * as ort from "onnxruntime-node";

const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

/** The token with the largest logit at the last position; of equal ones the first. */
function best(logits) {
  const [, length, vocabulary] = logits.dims;
  const last = logits.data.subarray((length - 1) * vocabulary);
  let token = 0;
  for (let i = 1; i < vocabulary; i++) if (last[i] > last[token]) token = i;
  return token;
}

/** Caches of no tokens yet. */
function emptyCaches(session, decoder) {
  const { type } = session.inputMetadata.find(({ name }) => name.startsWith("past_key_values."));
  if (type !== "float32") throw new Error(`the graph's caches are ${type}; export with another --dtype or --engine`);
  const shape = [1, decoder.num_key_value_heads, 0, decoder.head_size];
  const names = session.inputNames.filter((name) => name.startsWith("past_key_values."));
  return Object.fromEntries(names.map((name) => [name, new ort.Tensor("float32", new Float32Array(0), shape)]));
}

async function generate(folder, count, prompt) {
  const { model } = JSON.parse(readFileSync(join(folder, "genai_config.json"), "utf8"));
  const session = await ort.InferenceSession.create(join(folder, model.decoder.filename));
  const ends = [model.eos_token_id].flat();
  const made = [];
  let caches = emptyCaches(session, model.decoder);
  let next = prompt;
  let seen = 0;
  while (made.length < count && !ends.includes(made.at(-1))) {
    const inputs = { input_ids: int64(next), attention_mask: int64(Array(seen + next.length).fill(1)), ...caches };
    if (session.inputNames.includes("position_ids")) inputs.position_ids = int64(next.map((_, i) => seen + i));
    const outputs = await session.run(inputs);
    seen += next.length;
    next = [best(outputs.logits)];
    made.push(next[0]);
    caches = Object.fromEntries(
      Object.keys(caches).map((name) => [name, outputs[name.replace("past_key_values", "present")]]),
    );
  }
  return made;
}

try {
  const [folder, count, ...prompt] = process.argv.slice(2);
  if (prompt.length === 0) throw new Error("usage: node generate.mjs FOLDER COUNT TOKEN_ID...");
  console.log(JSON.stringify(await generate(folder, Number(count), prompt.map(Number))));
} catch (error) {
  console.error(`Error: ${error.message}`);
  process.exit(1);
}
