// A Web Worker that computes images with onnxruntime-web. This script follows the runtime's in one Blob, and defines what the page
// may ask for. A task returns its answer, and the buffers of it that move to the page instead of being copied.
let zDim, classes, numbersToLatents, generator;

async function unpack(text) {
  const packed = new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))]);
  return new Uint8Array(await new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
}

const tasks = {
  start: async ({ info, runtime, model }) => {
    zDim = info.z_dim;
    classes = info.labels.length;
    ort.env.wasm.numThreads = 1; // more need headers that only a server can send
    ort.env.wasm.wasmBinary = await unpack(runtime.wasm);
    ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(new Blob([await unpack(runtime.mjs)], { type: "text/javascript" })) };
    numbersToLatents = await ort.InferenceSession.create(await unpack(model.latents));
    generator = await ort.InferenceSession.create(await unpack(model.generator));
    return [{}, []];
  },
  latents: async ({ numbers }) => {
    const input = new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [numbers.length]);
    const z = (await numbersToLatents.run({ numbers: input })).z.data;
    return [{ z }, [z.buffer]];
  },
  draw: async ({ z, c, n, withAttention }) => {
    const feeds = { z: new ort.Tensor("float32", z, [n, zDim]) };
    if (classes) feeds.c = new ort.Tensor("float32", c, [n, classes]);
    const results = await generator.run(feeds, withAttention ? ["images", "attention"] : ["images"]);
    // a clamped array rounds to the nearest value, halves to the even one, as torch does
    const pixels = new Uint8Array(Uint8ClampedArray.from(results.images.data, (value) => value * 127.5 + 127.5).buffer);
    const attention = withAttention ? results.attention.data : null;
    return [{ pixels, attention }, attention ? [pixels.buffer, attention.buffer] : [pixels.buffer]];
  },
};

onmessage = async ({ data }) => {
  try {
    const [answer, buffers] = await tasks[data.task](data);
    postMessage(answer, buffers);
  } catch (error) {
    postMessage({ error: String(error?.message ?? error).split("\n")[0] });
  }
};
