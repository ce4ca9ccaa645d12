// Asks a language-model service about a picture: node ask.js HOST:PORT PICTURE QUESTION
"use strict";

const fs = require("node:fs");
const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const ROOT = path.join(__dirname, "..", "..");  // the .proto files name each other from here
const MAX_MESSAGE_BYTES = 64 * 1024 * 1024;  // gRPC's own default, 4 MiB, is a small picture
const DEADLINE_MS = 120_000;

function languageModel(address) {
  const definition = protoLoader.loadSync("protos/language_model.proto", {
    includeDirs: [ROOT],
    keepCase: true,
    longs: Number,
    enums: String,
    oneofs: true,
    defaults: true,  // a delta may have tokens and no text yet
  });
  const { tessera } = grpc.loadPackageDefinition(definition);
  return new tessera.v1.LanguageModel(address, grpc.credentials.createInsecure(), {
    "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
    "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
  });
}

async function ask(client, picture, question) {
  const parts = [{ image: { data: fs.readFileSync(picture) } }, { text: question }];
  const request = { messages: [{ role: "user", parts }], sampling: { temperature: 0, max_tokens: 128 } };
  const call = client.Generate(request, { deadline: Date.now() + DEADLINE_MS });
  for await (const response of call) {
    if (response.event === "started") {
      for (const { parts: [grid] } of response.started.media) {
        console.error(`${grid.width} x ${grid.height}: ${grid.columns} x ${grid.rows} tiles`);
      }
    } else if (response.event === "delta") {
      process.stdout.write(response.delta.text);
    } else if (response.event === "usage") {
      const { prompt_tokens, visual_tokens, completion_tokens } = response.usage;
      console.error(`${prompt_tokens} prompt tokens (${visual_tokens} visual), ${completion_tokens} answer tokens`);
    }
  }
  process.stdout.write("\n");
}

async function main([address, picture, ...question]) {
  if (!question.length) throw new Error("usage: node ask.js HOST:PORT PICTURE QUESTION");
  const client = languageModel(address);
  try {
    await ask(client, picture, question.join(" "));
  } finally {
    client.close();
  }
}

main(process.argv.slice(2)).catch((error) => {
  console.error(error.details || error.message);
  process.exitCode = 1;
});
