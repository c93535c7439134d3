"use strict";

// The images come from the vgan-demo that serves this page.
async function openBackend(info) {
  const ask = async (path, type, body) => {
    let answer;
    try {
      answer = await fetch(path, { method: "POST", headers: { "Content-Type": type }, body });
    } catch {
      throw new Error("vgan-demo does not answer; start it again, then choose New images");
    }
    if (!answer.ok) throw new Error(await answer.text());
    return answer.arrayBuffer();
  };
  return {
    latents: async (numbers) => new Float32Array(await ask("latents", "application/json", JSON.stringify(numbers))),
    draw: async (z, c, n, withAttention) => {
      const body = new Float32Array(z.length + c.length);
      body.set(z);
      body.set(c, z.length);
      const bytes = new Uint8Array(await ask(`draw?n=${n}&attention=${Number(withAttention)}`, "application/octet-stream", body));
      const size = n * info.channels * info.height * info.width;
      return { pixels: bytes.subarray(0, size), attention: withAttention ? bytes.subarray(size) : null };
    },
  };
}
