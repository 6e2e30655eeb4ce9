// grpc-js: a stream and calls on one channel, through a reload that gives and takes an entry, and an outage.
//
// Its steps come from the script that runs it, one line each: what the stream and a call must have told by then.
"use strict";

const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const readline = require("node:readline");

const [, , proto, socket] = process.argv;
const SECONDS = 60;
const definition = loader.loadSync(proto, { keepCase: true, longs: Number, bytes: Buffer });
const { SpiffeWorkloadAPI } = grpc.loadPackageDefinition(definition);
const client = new SpiffeWorkloadAPI(`unix://${socket}`, grpc.credentials.createInsecure());
const header = new grpc.Metadata();
header.set("workload.spiffe.io", "true");

// As sources do: a stream that ends is opened again.
let ids = "";
let told = () => {};
function watch() {
  const stream = client.FetchX509SVID({}, header);
  stream.on("data", (answer) => {
    ids = answer.svids.map((svid) => svid.spiffe_id.split("/").pop()).sort().join(",");
    told();
  });
  stream.on("error", () => setTimeout(watch, 500));
  stream.on("end", () => {});
}
watch();

function fetch() {
  const deadline = new Date(Date.now() + SECONDS * 1000);
  return new Promise((resolve, reject) => {
    client.FetchJWTSVID({ audience: ["a"] }, header, { deadline }, (error, answer) =>
      error ? reject(error) : resolve(answer.svids.length),
    );
  });
}

function until(want) {
  return new Promise((resolve, reject) => {
    const late = setTimeout(() => reject(new Error(`${ids}, not ${want}`)), SECONDS * 1000);
    told = () => {
      if (ids === want) {
        clearTimeout(late);
        resolve();
      }
    };
    told();
  });
}

(async () => {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const [step, want] = line.split(" ");
    if (step === "forget") {
      ids = "";
      continue;
    }
    await until(want);
    // What failed meanwhile is tried again, as an application would.
    let count;
    for (let tries = 0; count === undefined; tries++) {
      try {
        count = await fetch();
      } catch (error) {
        if (error.code !== grpc.status.UNAVAILABLE || tries === SECONDS) throw error;
        await new Promise((wait) => setTimeout(wait, 1000));
      }
    }
    if (count !== want.split(",").length) throw new Error(`${count} tokens for ${want}`);
    console.log(`${step}: ${want}`);
  }
  client.close();
  process.exit(0);
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
