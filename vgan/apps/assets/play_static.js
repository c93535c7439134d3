"use strict";

// onnxruntime-web computes the images in this browser, in a Web Worker, so that the page stays responsive. Graphs and runtime come
// as scripts that hold them as text, because a page that was opened from a disk may load scripts but fetch nothing. The worker's
// own script comes from a Blob for the same reason.
async function openBackend(info) {
  if (typeof WebAssembly !== "object") throw new Error("this browser has no WebAssembly; use a current one, or vgan-demo");
  if (typeof DecompressionStream !== "function") throw new Error("this browser is too old to unpack the model; use a current one, or vgan-demo");
  if (!globalThis.vganModel || !globalThis.vganRuntime || !globalThis.vganWorker) {
    throw new Error("model.js, runtime.js or wasm.js is missing; keep the files of this folder together");
  }
  const address = URL.createObjectURL(new Blob([globalThis.vganWorker], { type: "text/javascript" }));
  let worker;
  // The page asks for one thing at a time, so the next message is the answer. Buffers move to the worker instead of being copied.
  const ask = (task, values, buffers = []) => {
    worker.postMessage({ task, ...values }, buffers);
    return new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) => data.error === undefined ? resolve(data) : reject(new Error(data.error));
      worker.onerror = ({ message }) => reject(new Error(message ?? "its worker is blocked"));
    });
  };
  try {
    worker = new Worker(address);
    const started = ask("start", { info, runtime: globalThis.vganRuntime, model: globalThis.vganModel });
    for (const name of ["vganModel", "vganRuntime", "vganWorker"]) delete globalThis[name]; // the worker has its copy
    await started;
  } catch (error) {
    throw new Error(`the model cannot be started in this browser (${error.message}); use a current one, or vgan-demo`);
  } finally {
    URL.revokeObjectURL(address);
  }
  return {
    latents: async (numbers) => (await ask("latents", { numbers })).z,
    draw: (z, c, n, withAttention) => ask("draw", { z, c, n, withAttention }, [z.buffer, c.buffer]),
  };
}
