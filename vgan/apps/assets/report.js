"use strict";

// Grids over time: a slider, arrow keys, a play button.
for (const viewer of document.querySelectorAll(".viewer")) {
  const slider = viewer.querySelector("input"), button = viewer.querySelector("button");
  if (!slider) continue;
  const frames = [...viewer.querySelectorAll("img")], at = viewer.querySelector("output");
  let timer = 0;
  const show = (i) => {
    frames.forEach((frame, k) => { frame.hidden = k !== i; });
    slider.value = i;
    at.textContent = frames[i].dataset.at;
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    button.textContent = "Play";
  };
  const step = (by) => show(Math.max(0, Math.min(frames.length - 1, Number(slider.value) + by)));
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) === frames.length - 1) show(0);
    button.textContent = "Pause";
    timer = setInterval(() => {
      step(1);
      if (Number(slider.value) === frames.length - 1) stop();
    }, 350);
  });
  document.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, svg, pre, .scroll")) return;
    stop();
    step(by);
    event.preventDefault();
  });
}

// Charts: the legend follows the pointer, or the arrow keys. Numbers look as in charts.label.
const label = (value) => {
  if (value === null) return "not finite";
  const size = Math.abs(value), short = (v) => String(Number(v.toPrecision(4)));
  if (size < 1e-12) return "0";
  if (size < 1e-3 || size >= 1e9) return value.toExponential(2).replace("e+", "e").replace(/\.?0+e/, "e");
  if (size >= 1e6) return `${short(value / 1e6)}M`;
  return size >= 1e4 || (size >= 1e3 && value % 1e3 === 0) ? `${short(value / 1e3)}k` : short(value);
};
for (const chart of document.querySelectorAll(".chart")) {
  const { left, top, right, bottom, width, x, y, log, curves } = JSON.parse(chart.dataset.chart);
  const svg = chart.querySelector("svg"), cursor = svg.querySelector(".cursor"), at = chart.querySelector(".at");
  const keys = [...chart.querySelectorAll(".key")], told = [at, ...keys.map((key) => key.querySelector("output"))];
  const newest = told.map((element) => element.textContent);
  const atX = (v) => left + (v - x[0]) / (x[1] - x[0]) * (right - left);
  const atY = (v) => bottom - (log ? Math.log(v / y[0]) / Math.log(y[1] / y[0]) : (v - y[0]) / (y[1] - y[0])) * (bottom - top);
  const draw = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    cursor.append(element);
  };
  const longest = curves.reduce((a, b) => (b.x.length > a.x.length ? b : a)).x;
  const nearest = (list, v) => list.reduce((best, value, i) => (Math.abs(value - v) < Math.abs(list[best] - v) ? i : best), 0);
  let index = longest.length - 1;
  const show = (i) => {
    index = Math.max(0, Math.min(longest.length - 1, i));
    const v = longest[index];
    cursor.replaceChildren();
    draw("path", { d: `M${atX(v)} ${top}V${bottom}` });
    at.textContent = `${label(v)} kimg`;
    curves.forEach((curve, k) => {
      const outside = v < curve.x[0] - 1e-9 || v > curve.x[curve.x.length - 1] + 1e-9;
      const j = nearest(curve.x, v);
      told[k + 1].textContent = outside ? "" : label(curve.y[j]);
      if (outside || curve.y[j] === null) return;
      draw("circle", { cx: atX(curve.x[j]), cy: atY(curve.y[j]), r: 3.5, class: [...keys[k].classList].pop() });
    });
  };
  const leave = () => {
    cursor.replaceChildren();
    told.forEach((element, k) => { element.textContent = newest[k]; });
    index = longest.length - 1;
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const px = (event.clientX - box.left) / box.width * width;
    show(nearest(longest, x[0] + (px - left) / (right - left) * (x[1] - x[0])));
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    show(index + by);
    event.preventDefault();
  });
}

// The command: a copy button, also where the clipboard is closed to pages from the disk.
for (const command of document.querySelectorAll(".command")) {
  const text = command.querySelector("pre"), button = command.querySelector("button");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch {
      getSelection().selectAllChildren(text);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
