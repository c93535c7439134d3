
const $$ = (id) => document.getElementById(id);
const info = JSON.parse($$("info").textContent);
const { height, width, channels, z_dim: zDim, labels, attention } = info;
const grid = $$("grid"), stage = $$("stage"), large = $$("large");
const STRIP = 9; // images in a saved strip
const FILM = 48; // images from one end to the other of a film
const RATE = 25; // frames a second of a film
const MOST_OPENED = 36; // images of files; as many as the largest grid
const zoom = Math.max(1, Math.floor(64 / Math.min(height, width))); // of saved grids, as vgan-sample enlarges them

document.documentElement.style.setProperty("--shape", `${width} / ${height}`); // of every image
const TOUCH = matchMedia("(pointer: coarse)").matches;

let backend = null;
let opened = []; // images of files, before the others: {number: name, label: null, z, c}
let pendingFiles = []; // to be opened
let tiles = []; // of the grid: {number, label, z, c, drawn, button, canvas, heat}
let chosen = 0; // which tile the stage shows while there is no way
let way = null; // {from, to, drawn} between two {number, label}
let mixing = false; // the next tile that is chosen is the other end of a way
let playing = 0; // the animation frame that was asked for

// --- images by number -----------------------------------------------------------------------------------------------

const known = new Map(); // number -> latent

async function latentsOf(numbers) {
  const missing = [...new Set(numbers)].filter((number) => !known.has(number));
  if (missing.length) {
    const z = await backend.latents(missing);
    missing.forEach((number, i) => known.set(number, z.slice(i * zDim, (i + 1) * zDim)));
  }
  return numbers.map((number) => known.get(number));
}

const oneHot = (label) => Float32Array.from(labels, (_, i) => Number(i === label));
const norm = (vector) => Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
const line = (a, b, t) => a.map((value, i) => (1 - t) * value + t * b[i]);

// Interpolate spherically from a to b, as slerp in vgan/inference/latents.py.
function slerp(a, b, t) {
  const [lengthA, lengthB] = [norm(a), norm(b)];
  const u = a.map((value) => value / Math.max(lengthA, 1e-12)), v = b.map((value) => value / Math.max(lengthB, 1e-12));
  const angle = 2 * Math.atan2(norm(u.map((value, i) => value - v[i])), norm(u.map((value, i) => value + v[i])));
  const sine = Math.sin(angle), length = (1 - t) * lengthA + t * lengthB;
  const [p, q] = sine < 1e-4 ? [1 - t, t] : [Math.sin((1 - t) * angle) / sine, Math.sin(t * angle) / sine];
  return u.map((value, i) => (p * value + q * v[i]) * length);
}

async function pointsOf(images) {
  const z = await latentsOf(images.filter((image) => !image.z).map(({ number }) => number));
  return images.map((image) => ({ z: image.z ?? z.shift(), c: image.c ?? oneHot(image.label) }));
}

async function pointsAlong({ from, to }, places) {
  const [a, b] = await pointsOf([from, to]);
  return places.map((t) => ({ z: slerp(a.z, b.z, t), c: line(a.c, b.c, t) }));
}

// Return {image: ImageData, weights: attention (heads, h w, h w) or null} of each point {z, c}.
async function render(points) {
  const truncation = Number($$("truncation").value), withAttention = attention !== null && $$("attention").checked, drawn = [];
  const area = height * width, heat = withAttention ? attention.heads * (attention.h * attention.w) ** 2 : 0;
  for (let start = 0; start < points.length; start += info.batch) {
    const part = points.slice(start, start + info.batch);
    const z = new Float32Array(part.length * zDim), c = new Float32Array(part.length * labels.length);
    part.forEach((point, i) => {
      z.set(point.z.map((value) => value * truncation), i * zDim);
      c.set(point.c, i * labels.length);
    });
    const { pixels, attention: weights } = await backend.draw(z, c, part.length, withAttention);
    part.forEach((_, i) => {
      const image = new ImageData(width, height), at = (k, p) => pixels[(i * channels + k) * area + p];
      for (let p = 0; p < area; p++) {
        const alpha = channels === 4 ? at(3, p) : 255; // colours are multiplied by it
        for (let k = 0; k < 3; k++) image.data[4 * p + k] = at(Math.min(k, channels - 1), p) * 255 / Math.max(1, alpha);
        image.data[4 * p + 3] = alpha;
      }
      drawn.push({ image, weights: weights ? weights.subarray(i * heat, (i + 1) * heat) : null });
    });
  }
  return drawn;
}

// --- one thing at a time, and of each kind only the latest ----------------------------------------------------------

const waiting = new Map();
let working = false;

async function request(name, job) {
  waiting.set(name, job);
  if (working || !backend) return;
  working = true;
  document.body.classList.add("busy");
  while (waiting.size) {
    const [next, task] = waiting.entries().next().value;
    waiting.delete(next);
    try {
      await task();
      $$("error").hidden = true;
    } catch (error) {
      complain(error);
    }
  }
  working = false;
  document.body.classList.remove("busy");
}

function complain(error) {
  stop();
  $$("error").textContent = error.message ?? String(error);
  $$("error").hidden = false;
  if (!tiles.length) $$("status").textContent = "";
}

// --- the grid -------------------------------------------------------------------------------------------------------

const nameOf = ({ number, label }) => `${number}${label === null ? "" : ` ${labels[label]}`}`;

function wanted() {
  const first = Number($$("first").value), label = $$("label").value, count = Number($$("count").value);
  const numbered = Array.from({ length: count }, (_, i) => ({
    number: first + i, label: labels.length ? (label === "" ? (first + i) % labels.length : Number(label)) : null, z: null, c: null,
  }));
  return [...opened, ...numbered].slice(0, count);
}

async function drawGrid() {
  const images = wanted(), drawn = await render(await pointsOf(images));
  if (images.length !== tiles.length) makeTiles(images.length);
  tiles.forEach((tile, i) => {
    Object.assign(tile, images[i], { drawn: drawn[i] });
    tile.canvas.getContext("2d").putImageData(drawn[i].image, 0, 0);
    tile.heat.hidden = true;
    tile.button.setAttribute("aria-label", `image ${nameOf(tile)}`);
    tile.caption.textContent = nameOf(tile);
  });
  choose(Math.min(chosen, tiles.length - 1));
  $$("save-grid").disabled = false;
  tell();
}

// What can be done now.
function tell() {
  const numbers = tiles.map(({ number }) => number).slice(opened.length), aim = way ? "" : nameOf(tiles[chosen]);
  $$("status").textContent = mixing ? `Select the image to mix ${aim} with`
    : numbers.length ? `Images ${numbers[0]} to ${numbers.at(-1)}` : `${tiles.length} of ${opened.length} opened`;
  $$("close-opened").hidden = !opened.length;
  $$("hint").textContent = mixing ? "Select another image, or press Esc."
    : $$("attention").checked ? `${TOUCH ? "Tap" : "Point at"} a position in an image. Bright areas are those it attends to.`
      : way ? "The slider interpolates between the two images." : TOUCH ? "Mix with ... interpolates from this image to another." : "Drag an image onto another to interpolate between them.";
}

function makeTiles(count) {
  grid.style.setProperty("--columns", Math.sqrt(count));
  tiles = Array.from({ length: count }, (_, i) => {
    const button = document.createElement("button"), frame = document.createElement("span");
    const canvas = document.createElement("canvas"), heat = document.createElement("canvas"), caption = document.createElement("span");
    button.type = "button";
    button.className = "tile";
    frame.className = "frame";
    heat.className = "heat";
    caption.className = "caption";
    size(canvas);
    frame.append(canvas, heat);
    button.append(frame, caption);
    button.addEventListener("click", (event) => take(i, event));
    button.addEventListener("keydown", (event) => walk(event, i));
    button.addEventListener("pointerdown", (event) => startDrag(event, i));
    watch(frame, heat, () => tiles[i].drawn);
    return { button, canvas, heat, caption };
  });
  grid.replaceChildren(...tiles.map(({ button }) => button));
}

function choose(i) {
  chosen = i;
  tiles.forEach(({ button }, k) => {
    button.tabIndex = k === i ? 0 : -1;
    button.setAttribute("aria-pressed", String(k === i && !way));
  });
  if (!way) present(tiles[i].drawn, nameOf(tiles[i]));
}

function take(i, event) {
  if (mixing && i !== chosen) return mix(tiles[chosen], tiles[i]);
  aim(false);
  closeWay();
  choose(i);
  tell();
  if (event.pointerType === "touch" || event.pointerType === "pen") heatAt(event, tiles[i].button.firstChild, tiles[i].heat, tiles[i].drawn);
}

function walk(event, i) {
  const columns = getComputedStyle(grid).gridTemplateColumns.split(" ").length;
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  const to = i + by;
  if (!by || to < 0 || to >= tiles.length) return;
  event.preventDefault();
  tiles[i].button.tabIndex = -1;
  tiles[to].button.tabIndex = 0;
  tiles[to].button.focus();
}

function aim(on) {
  if (on && way) closeWay();
  mixing = on;
  grid.classList.toggle("aiming", on);
  $$("mix").setAttribute("aria-pressed", String(on));
  $$("mix").textContent = on ? "Cancel" : "Mix with ...";
  if (tiles.length) tell();
}

// --- dragging an image onto another ---------------------------------------------------------------------------------

function startDrag(event, i) {
  if (event.pointerType === "touch" || event.button !== 0) return; // a finger scrolls; "Mix with ..." is for it
  const { button, canvas } = tiles[i], start = [event.clientX, event.clientY];
  let ghost = null, over = null;
  const place = ({ clientX, clientY }) => {
    const under = document.elementFromPoint(clientX, clientY)?.closest(".tile");
    return under && under !== button ? tiles.findIndex((tile) => tile.button === under) : -1;
  };
  const move = (moved) => {
    if (!ghost && Math.hypot(moved.clientX - start[0], moved.clientY - start[1]) < 6) return;
    if (!ghost) {
      ghost = document.createElement("canvas");
      ghost.className = "ghost";
      copy(canvas, ghost);
      document.body.append(ghost);
      document.body.classList.add("dragging");
    }
    ghost.style.transform = `translate(${moved.clientX - 40}px, ${moved.clientY - 40}px)`;
    over?.button.classList.remove("over");
    over = tiles[place(moved)];
    over?.button.classList.add("over");
  };
  const end = (ended) => {
    for (const [name, handler] of handlers) removeEventListener(name, handler);
    if (!ghost) return;
    ghost.remove();
    over?.button.classList.remove("over");
    document.body.classList.remove("dragging");
    addEventListener("click", swallow, { capture: true, once: true }); // the click that ends a drag selects nothing
    setTimeout(() => removeEventListener("click", swallow, { capture: true }));
    const onto = tiles[place(ended)];
    if (ended.type === "pointerup" && onto) mix(tiles[i], onto);
  };
  const swallow = (click) => click.stopPropagation();
  const handlers = [["pointermove", move], ["pointerup", end], ["pointercancel", end]];
  for (const [name, handler] of handlers) addEventListener(name, handler);
}

// --- the stage: one large image, or an interpolation ----------------------------------------------------------------

function size(canvas, times = 1) {
  canvas.width = width * times;
  canvas.height = height * times;
}

function copy(from, to) {
  to.width = from.width;
  to.height = from.height;
  to.getContext("2d").drawImage(from, 0, 0);
}

function present(drawn, name) {
  stage.hidden = false;
  size(large);
  large.getContext("2d").putImageData(drawn.image, 0, 0);
  large.setAttribute("aria-label", `image ${name}`);
  $$("large-heat").hidden = true;
  $$("caption").textContent = name;
}

function mix(from, to) {
  aim(false);
  const [a, b] = [from, to].map(({ number, label, z, c }) => ({ number, label, z, c }));
  way = { from: a, to: b, drawn: null };
  copy(from.canvas, $$("from"));
  copy(to.canvas, $$("to"));
  $$("at").value = 0.5;
  stage.classList.add("has-way");
  $$("way").hidden = false;
  choose(tiles.findIndex(({ button }) => button === from.button));
  tell();
  request("way", drawWay);
  $$("at").focus({ preventScroll: true });
}

async function drawWay() {
  if (!way) return;
  const t = Number($$("at").value), shown = way;
  const [drawn] = await render(await pointsAlong(shown, [t]));
  if (way !== shown) return;
  way.drawn = drawn;
  const share = Math.round(100 * t), names = [nameOf(way.from), nameOf(way.to)];
  present(drawn, share === 0 ? names[0] : share === 100 ? names[1] : `${100 - share}% ${names[0]}, ${share}% ${names[1]}`);
  $$("at").setAttribute("aria-valuetext", $$("caption").textContent);
}

async function drawEnds() {
  if (!way) return;
  const shown = way, drawn = await render(await pointsOf([shown.from, shown.to]));
  if (way === shown) ["from", "to"].forEach((id, i) => $$(id).getContext("2d").putImageData(drawn[i].image, 0, 0));
}

function closeWay() {
  if (!way) return;
  stop();
  way = null;
  stage.classList.remove("has-way");
  $$("way").hidden = true;
  choose(chosen);
}

// Back and forth, 3 seconds each way, as fast as images can be computed.
function play() {
  if (playing) return stop();
  $$("play").textContent = "Pause";
  const begin = performance.now() - 3000 * Number($$("at").value);
  const step = async (now) => {
    const phase = ((now - begin) / 3000) % 2;
    $$("at").value = phase < 1 ? phase : 2 - phase;
    await request("way", drawWay);
    if (playing) playing = requestAnimationFrame(step);
  };
  playing = requestAnimationFrame(step);
}

function stop() {
  cancelAnimationFrame(playing);
  playing = 0;
  $$("play").textContent = "Play";
}

// --- attention ------------------------------------------------------------------------------------------------------

const pad = document.createElement("canvas"); // one row of attention as small pixels of colour

// The colours of vgan/inference/attention_maps.py: from black through red and yellow to white, over the darkened image.
function drawHeat(canvas, drawn, row, column) {
  const { h, w } = attention, cells = h * w, head = Number($$("head").value) || 0;
  const weights = drawn.weights.subarray(head * cells * cells + (row * w + column) * cells).subarray(0, cells);
  const most = weights.reduce((a, b) => Math.max(a, b), 1e-12), colours = new ImageData(w, h);
  weights.forEach((value, i) => {
    const t = value / most;
    colours.data.set([255 * Math.min(1, 2.5 * t), 255 * Math.min(1, Math.max(0, 2.5 * t - 0.9)), 255 * Math.max(0, 4 * t - 3), 255 * 0.85 * Math.sqrt(t)], 4 * i);
  });
  [pad.width, pad.height] = [w, h];
  pad.getContext("2d").putImageData(colours, 0, 0);
  const image = document.createElement("canvas");
  size(image);
  image.getContext("2d").putImageData(drawn.image, 0, 0);
  const times = Math.max(1, Math.round(384 / width)), ink = canvas.getContext("2d");
  size(canvas, times);
  const area = [0, 0, canvas.width, canvas.height];
  ink.imageSmoothingEnabled = false;
  ink.drawImage(image, ...area);
  ink.globalCompositeOperation = "saturation"; // grey: the colours are the heat's
  ink.fillStyle = "#888";
  ink.fillRect(...area);
  ink.globalCompositeOperation = "source-over";
  ink.fillStyle = "rgb(0 0 0 / 45%)";
  ink.fillRect(...area);
  ink.imageSmoothingEnabled = true;
  ink.imageSmoothingQuality = "high";
  ink.drawImage(pad, ...area);
  ink.strokeStyle = "#5ae6ff";
  ink.lineWidth = canvas.width / 80;
  ink.strokeRect(column * canvas.width / w, row * canvas.height / h, canvas.width / w, canvas.height / h);
  canvas.hidden = false;
}

function heatAt({ clientX, clientY }, frame, canvas, drawn) {
  if (!attention || !$$("attention").checked || !drawn?.weights) return;
  const { left, top, width, height } = frame.getBoundingClientRect();
  const place = (at, size, cells) => Math.max(0, Math.min(cells - 1, Math.floor((at / size) * cells)));
  drawHeat(canvas, drawn, place(clientY - top, height, attention.h), place(clientX - left, width, attention.w));
}

function watch(frame, canvas, drawn) {
  canvas.hidden = true;
  frame.addEventListener("pointermove", (event) => event.pointerType !== "touch" && !document.body.classList.contains("dragging") && heatAt(event, frame, canvas, drawn()));
  frame.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") canvas.hidden = true; });
}

const query = [0, 0]; // row and column that the arrow keys move in the large image
function walkQuery(event) {
  const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key], { drawn } = way ?? tiles[chosen];
  if (!by || !drawn?.weights) return;
  event.preventDefault();
  [attention.h, attention.w].forEach((cells, k) => { query[k] = Math.max(0, Math.min(cells - 1, query[k] + by[k])); });
  drawHeat($$("large-heat"), drawn, ...query);
}

// --- files ----------------------------------------------------------------------------------------------------------

// Return the rows of a .npy of latents, as vgan-sample latent= reads them: z, and after it perhaps c.
function rowsOf(buffer) {
  const widths = [...new Set([zDim, zDim + labels.length])].map((width) => `(N, ${width})`).join(" or ");
  const refuse = (problem) => { throw new Error(`${problem}; must be a .npy of float32 or float64 ${widths}, as vgan-invert writes it`); };
  const bytes = new Uint8Array(buffer), isNpy = String.fromCharCode(...bytes.subarray(0, 6)) === "\x93NUMPY" && bytes.length > 12;
  const begin = bytes[6] === 1 ? 10 : 12; // versions 1 and 2 of the format
  const end = isNpy ? begin + new DataView(buffer)[begin === 10 ? "getUint16" : "getUint32"](8, true) : 0;
  if (!isNpy || end > bytes.length) refuse("not a .npy");
  const header = new TextDecoder().decode(bytes.subarray(begin, end)), kind = header.match(/'descr': '<f([48])'/)?.[1];
  const shape = header.match(/'shape': \((\d+),(?: (\d+))?\)/)?.slice(1).map((size) => size && Number(size));
  if (!kind || !shape || header.includes("'fortran_order': True")) refuse("holds another kind of array");
  const [count, width] = shape[1] ? shape : [1, shape[0]];
  if (![zDim, zDim + labels.length].includes(width)) refuse(`has rows of ${width} numbers`);
  if (count < 1 || count > MOST_OPENED) refuse(`has ${count} rows, not 1 to ${MOST_OPENED}`);
  const data = buffer.slice(end, end + Number(kind) * count * width);
  if (data.byteLength < Number(kind) * count * width) refuse("is cut short");
  const values = Float32Array.from(kind === "4" ? new Float32Array(data) : new Float64Array(data));
  if (!values.every(Number.isFinite)) refuse("has numbers that are not finite");
  return Array.from({ length: count }, (_, i) => values.slice(i * width, (i + 1) * width));
}

function open(files) {
  pendingFiles.push(...files);
  if (files.length) request("open", openPending);
}

async function openPending() {
  const images = [], files = pendingFiles;
  pendingFiles = [];
  for (const file of files) {
    const name = file.name.replace(/\.npy$/i, "");
    try {
      rowsOf(await file.arrayBuffer()).forEach((row, i, { length }) => {
        const c = row.length > zDim ? row.slice(zDim) : oneHot(labels.length ? images.length % labels.length : null);
        images.push({ number: length > 1 ? `${name} ${i}` : name, label: null, z: row.slice(0, zDim), c });
      });
    } catch (error) {
      throw new Error(`${file.name}: ${error.message}`);
    }
  }
  const isAgain = (old) => images.some(({ number, z }) => number === old.number && z.every((value, i) => value === old.z[i]));
  opened = [...images, ...opened.filter((old) => !isAgain(old))].slice(0, MOST_OPENED);
  closeWay();
  chosen = 0;
  await drawGrid();
}

function closeOpened() {
  opened = [];
  chosen = 0;
  closeWay();
  request("grid", drawGrid);
}

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name.replace(/[^A-Za-z0-9._-]+/g, "-");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// Images in rows, each pixel `times` larger.
function sheet(images, columns, times) {
  const canvas = document.createElement("canvas"), one = document.createElement("canvas"), ink = canvas.getContext("2d");
  size(one);
  canvas.width = columns * width * times;
  canvas.height = Math.ceil(images.length / columns) * height * times;
  ink.imageSmoothingEnabled = false;
  images.forEach((image, i) => {
    one.getContext("2d").putImageData(image, 0, 0);
    ink.drawImage(one, (i % columns) * width * times, Math.floor(i / columns) * height * times, width * times, height * times);
  });
  return canvas;
}

const savePng = (images, columns, times, name) => sheet(images, columns, times).toBlob((blob) => download(blob, `${name}.png`), "image/png");
const nameOfWay = () => `${nameOf(way.from)}-to-${nameOf(way.to)}`;
const steps = (count) => Array.from({ length: count }, (_, i) => i / (count - 1));
const imagesAlong = async (count) => (await render(await pointsAlong(way, steps(count)))).map(({ image }) => image);

function saveImage() {
  const at = Math.round(100 * Number($$("at").value));
  savePng([(way ?? tiles[chosen]).drawn.image], 1, 1, way ? `${nameOfWay()}-${at}` : nameOf(tiles[chosen]));
}

async function saveStrip() {
  if (way) savePng(await imagesAlong(STRIP), STRIP, zoom, nameOfWay());
}

// There and back, recorded in real time: browsers write films no other way.
async function saveFilm() {
  if (!way) return;
  const name = nameOfWay(), there = await imagesAlong(FILM), images = [...there, ...there.slice(1, -1).reverse()];
  const type = ["video/webm", "video/mp4"].find((kind) => MediaRecorder.isTypeSupported(kind)), times = Math.max(1, Math.round(256 / width));
  const canvas = sheet(images.slice(0, 1), 1, times), recorder = new MediaRecorder(canvas.captureStream(RATE), { mimeType: type });
  const parts = [], ended = new Promise((done) => { recorder.onstop = done; });
  recorder.ondataavailable = ({ data }) => parts.push(data);
  recorder.start();
  for (const image of images) {
    canvas.getContext("2d").drawImage(sheet([image], 1, times), 0, 0);
    await new Promise((done) => setTimeout(done, 1000 / RATE));
  }
  recorder.stop();
  await ended;
  download(new Blob(parts, { type }), `${name}.${type.slice(6)}`);
}

// --- the controls ---------------------------------------------------------------------------------------------------

// Draw everything that is shown again.
function redraw() {
  request("grid", drawGrid);
  if (!way) return;
  request("way", drawWay);
  request("ends", drawEnds);
}

function newImages() {
  const first = $$("first"), next = Number(first.value) + Math.max(1, Number($$("count").value) - opened.length);
  first.value = tiles.length && next <= Number(first.max) ? next : 0;
  request("grid", drawGrid);
}

function firstChanged() {
  const first = $$("first");
  if (!first.checkValidity() || first.value === "") first.value = Math.min(Number(first.max), Math.max(0, Math.floor(Number(first.value)) || 0));
  request("grid", drawGrid);
}

function attentionChanged() {
  $$("head").hidden = !$$("attention").checked || attention.heads < 2;
  large.tabIndex = $$("attention").checked ? 0 : -1;
  redraw();
}

const KEYS = {
  n: newImages, m: () => tiles.length && aim(!mixing), p: () => way && play(),
  o: () => $$("open").click(),
  a: () => { if (attention) { $$("attention").checked = !$$("attention").checked; attentionChanged(); } },
  escape: () => { if (mixing) aim(false); else { closeWay(); if (tiles.length) tell(); } },
};

function listen() {
  const on = (id, name, handler) => $$(id).addEventListener(name, handler);
  on("controls", "submit", (event) => { event.preventDefault(); newImages(); });
  on("first", "change", firstChanged);
  on("first", "keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); firstChanged(); } });
  for (const id of ["label", "count"]) on(id, "change", () => request("grid", drawGrid));
  on("truncation", "input", () => {
    $$("truncation-value").value = Number($$("truncation").value).toFixed(2);
    redraw();
  });
  on("attention", "change", attentionChanged);
  on("at", "input", () => { stop(); request("way", drawWay); });
  on("mix", "click", () => aim(!mixing));
  on("play", "click", play);
  on("close", "click", KEYS.escape);
  on("save", "click", saveImage);
  on("save-strip", "click", () => request("file", saveStrip));
  on("save-film", "click", () => request("file", saveFilm));
  on("save-grid", "click", () => savePng(tiles.map(({ drawn }) => drawn.image), Math.sqrt(tiles.length), zoom, `images-${tiles[0].number}`));
  on("open", "click", () => $$("file").click());
  on("close-opened", "click", closeOpened);
  on("file", "change", () => {
    open([...$$("file").files]);
    $$("file").value = ""; // so that the same file can be opened again
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    open([...event.dataTransfer.files]);
  });
  on("large", "keydown", walkQuery);
  on("large", "click", (event) => heatAt(event, large, $$("large-heat"), (way ?? tiles[chosen]).drawn));
  watch(large.parentElement, $$("large-heat"), () => (way ?? tiles[chosen]).drawn);
  addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input[type=number], select");
    if (!tiles.length || event.ctrlKey || event.metaKey || event.altKey || (typing && event.key !== "Escape")) return;
    KEYS[event.key.toLowerCase()]?.();
  });
}

async function begin() {
  $$("label").append(...labels.map((name, i) => new Option(name, i)));
  $$("label-box").hidden = labels.length < 2;
  $$("attention-box").hidden = attention === null;
  document.body.classList.toggle("no-attention", attention === null);
  $$("save-film").hidden = typeof MediaRecorder === "undefined";
  $$("head").append(...Array.from({ length: attention?.heads ?? 0 }, (_, i) => new Option(`head ${i + 1}`, i)));
  document.body.classList.add("busy");
  try {
    backend = await openBackend(info);
  } catch (error) {
    document.body.classList.remove("busy");
    return complain(error);
  }
  listen();
  await request("grid", drawGrid);
}

begin();
