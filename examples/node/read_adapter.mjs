// Print the layers of an adapter file. Needs Node.js and nothing else; written from docs/format.md.
//
//     node read_adapter.mjs adapters.safetensors

import { readFileSync } from "node:fs";

const PREFIX = "base_model.model.";

/** Header metadata, and a function that gives a tensor as {shape, values} with its rows one after the other. */
function open(path) {
  const bytes = readFileSync(path);
  const length = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString("utf8", 8, 8 + length));
  const tensor = (name) => {
    const { dtype, shape, data_offsets: [start, end] } = header[name];
    if (dtype !== "F32") throw new Error(`${name} is ${dtype}; this program reads F32`);
    const values = new Float32Array((end - start) / 4);
    for (let i = 0; i < values.length; i++) values[i] = bytes.readFloatLE(8 + length + start + 4 * i);
    return { shape, values };
  };
  return { metadata: header.__metadata__ ?? {}, tensor };
}

/** ‖B·A‖ = √tr((BᵀB)(AAᵀ)), from two r × r products instead of the (out, in) one. */
function productNorm(A, B) {
  const [rank, into] = A.shape;
  const [out] = B.shape;
  let sum = 0;
  for (let i = 0; i < rank; i++) {
    for (let j = 0; j < rank; j++) {
      let ofA = 0;
      let ofB = 0;
      for (let k = 0; k < into; k++) ofA += A.values[i * into + k] * A.values[j * into + k];
      for (let k = 0; k < out; k++) ofB += B.values[k * rank + i] * B.values[k * rank + j];
      sum += ofA * ofB;
    }
  }
  return Math.sqrt(sum);
}

function layers(path) {
  const { metadata, tensor } = open(path);
  if (metadata.format_version !== "1") {
    throw new Error(`${path} has format version ${metadata.format_version}; this program reads 1`);
  }
  const { layers, scale } = JSON.parse(metadata.loraone);
  return Object.entries(layers).map(([name, layer]) => {
    const A = tensor(`${PREFIX}${name}.lora_A.weight`);
    const B = tensor(`${PREFIX}${name}.lora_B.weight`);
    return {
      layer: name,
      shape: layer.shape.join(" × "),
      rank: A.shape[0],
      scale: Number(scale.toPrecision(5)),
      energy: `${(100 * layer.captured_energy).toFixed(1)} %`,
      "‖s·B·A‖": Number((scale * productNorm(A, B)).toPrecision(5)),
    };
  });
}

function print(rows) {
  const names = Object.keys(rows[0]);
  const table = [names, ...rows.map((row) => names.map((name) => String(row[name])))];
  const widths = names.map((_, column) => Math.max(...table.map((row) => row[column].length)));
  for (const row of table) console.log(row.map((cell, column) => cell.padEnd(widths[column])).join("  ").trimEnd());
}

try {
  if (process.argv.length !== 3) throw new Error("give one file: node read_adapter.mjs adapters.safetensors");
  print(layers(process.argv[2]));
} catch (error) {
  console.error(`Error: ${error.message}`);
  process.exit(1);
}
