"use strict";

// onnxruntime-web computes the images in this browser. Graphs and runtime come as scripts that hold gzipped base64, because a page
// that was opened from a disk may load scripts but fetch nothing.
async function openBackend(info) {
  if (typeof WebAssembly !== "object") throw new Error("this browser has no WebAssembly; use a current one, or vgan-demo");
  if (typeof DecompressionStream !== "function") throw new Error("this browser is too old to unpack the model; use a current one, or vgan-demo");
  if (!globalThis.vganModel || !globalThis.vganRuntime || !globalThis.ort) {
    throw new Error("model.js, runtime.js or wasm.js is missing; keep the files of this folder together");
  }
  const unpack = async (text) => {
    const packed = new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))]);
    return new Uint8Array(await new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
  };
  const { ort, vganModel, vganRuntime } = globalThis;
  let numbersToLatents, generator;
  try {
    ort.env.wasm.numThreads = 1; // more need headers that only a server can send
    ort.env.wasm.wasmBinary = await unpack(vganRuntime.wasm);
    ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(new Blob([await unpack(vganRuntime.mjs)], { type: "text/javascript" })) };
    numbersToLatents = await ort.InferenceSession.create(await unpack(vganModel.latents));
    generator = await ort.InferenceSession.create(await unpack(vganModel.generator));
  } catch (error) {
    throw new Error(`the model cannot be started in this browser (${String(error.message ?? error).split("\n")[0]}); use a current one, or vgan-demo`);
  }
  delete globalThis.vganModel; // the text is not needed again
  delete globalThis.vganRuntime;
  return {
    latents: async (numbers) => {
      const input = new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [numbers.length]);
      return (await numbersToLatents.run({ numbers: input })).z.data;
    },
    draw: async (z, c, n, withAttention) => {
      const feeds = { z: new ort.Tensor("float32", z, [n, info.z_dim]) };
      if (info.labels.length) feeds.c = new ort.Tensor("float32", c, [n, info.labels.length]);
      await new Promise((done) => setTimeout(done)); // computing blocks the page: handle input first
      const { images, attention } = await generator.run(feeds, withAttention ? ["images", "attention"] : ["images"]);
      // a clamped array rounds to the nearest value, halves to the even one, as torch does
      const pixels = new Uint8Array(Uint8ClampedArray.from(images.data, (value) => value * 127.5 + 127.5).buffer);
      return { pixels, attention: attention ? attention.data : null };
    },
  };
}
