// The page of a server: ask for an action, look at it, and watch an episode of the tabletop.

const get = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const CAMERA_RATE = 15; // frames a second of the camera's preview
const BARS = 64; // bars in which the bins of a dimension are drawn
let info = null;
const images = {}; // camera -> Blob, or a <video> that shows the camera

// Requests

async function request(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...options.headers } });
  } catch {
    throw new Error("The server does not answer. Check that it is still running.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) askForToken();
  throw new Error(body.reason ?? `The server answered with status ${response.status}.`);
}

function askForToken() {
  get("ask").hidden = get("episodes").hidden = get("links").hidden = true;
  get("login").hidden = false;
  get("token").focus();
}

function show(error) {
  get("problem").textContent = error ? error.message : "";
  get("problem").hidden = !error;
}

// Set-up

async function connect() {
  show(null);
  if (document.body.dataset.needsToken === "true" && !sessionStorage.getItem("token")) {
    get("summary").textContent = "Not connected.";
    askForToken();
    return;
  }
  try {
    info = await (await request("info")).json();
  } catch (error) {
    get("summary").textContent = "Not connected.";
    show(error);
    return;
  }
  get("login").hidden = true;
  get("links").hidden = false;
  describePolicy();
  get("cameras").replaceChildren(...info.cameras.map((camera) => cameraField(camera.name)));
  get("keys").hidden = info.unnorm_keys.length < 2;
  get("key").replaceChildren(...info.unnorm_keys.map((key) => new Option(key, key, false, key === info.default_unnorm_key)));
  get("states").hidden = info.state_dim === null;
  get("state").required = info.state_dim !== null;
  get("state").placeholder = info.state_dim === null ? "" : `${info.state_dim} numbers`;
  get("options").hidden = get("keys").hidden && get("states").hidden;
  get("ask").hidden = false;
  get("episodes").hidden = !(await (await request("page/tabletop")).json()).is_robot;
}

function describePolicy() {
  get("model").textContent = info.model_id || "openvla-hf";
  document.title = `${info.model_id} – openvla-hf`;
  const parts = [`${info.action_dim} action dimensions`];
  if (info.action_horizon > 1) parts.push(`${info.action_horizon} actions in an answer`);
  if (info.control_frequency) parts.push(`${info.control_frequency} Hz`);
  parts.push(`gripper: ${info.gripper.open} is open, ${info.gripper.closed} is closed`);
  get("summary").textContent = parts.join(" · ");
}

function cameraField(name) {
  const field = get("camera-template").content.cloneNode(true).firstElementChild;
  const drop = field.querySelector(".drop");
  const file = field.querySelector("input");
  field.querySelector("legend").textContent = `Camera: ${name}`;
  drop.setAttribute("aria-label", `Image of the camera ${name}`);
  const take = (blob) => blob && setImage(field, name, blob);
  drop.addEventListener("click", () => file.click());
  drop.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    file.click();
  });
  drop.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take(event.dataTransfer.files[0]);
  });
  file.addEventListener("change", () => take(file.files[0]));
  field.querySelector(".live").addEventListener("click", () => toggleCamera(field, name).catch(show));
  return field;
}

function setImage(field, name, blob) {
  stopCamera(field);
  images[name] = blob;
  const picture = field.querySelector("img");
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(blob);
  picture.alt = `Image of the camera ${name}`;
  picture.hidden = false;
  field.querySelector("span").hidden = true;
}

async function toggleCamera(field, name) {
  const video = field.querySelector("video");
  if (video.srcObject) {
    stopCamera(field);
    return;
  }
  if (!navigator.mediaDevices) throw new Error("The browser offers the camera only over HTTPS or on localhost.");
  const wanted = { facingMode: "environment", frameRate: CAMERA_RATE };
  video.srcObject = await navigator.mediaDevices.getUserMedia({ video: wanted }).catch(() => {
    throw new Error("The browser gives no access to a camera.");
  });
  await video.play();
  images[name] = video;
  video.hidden = false;
  field.querySelector("img").hidden = field.querySelector("span").hidden = true;
  field.querySelector(".live").textContent = "Stop the camera";
}

function stopCamera(field) {
  const video = field.querySelector("video");
  if (!video.srcObject) return;
  video.srcObject.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
  video.hidden = true;
  field.querySelector("span").hidden = false;
  field.querySelector(".live").textContent = "Use the camera";
  for (const [name, source] of Object.entries(images)) if (source === video) delete images[name];
}

function toBlob(source) {
  if (source instanceof Blob) return source;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [source.videoWidth, source.videoHeight];
  canvas.getContext("2d").drawImage(source, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

// Actions

async function predict() {
  const form = new FormData();
  form.append("instruction", get("instruction").value);
  form.append("details", "all");
  if (!get("keys").hidden) form.append("unnorm_key", get("key").value);
  if (info.state_dim !== null) {
    const numbers = get("state").value.split(/[\s,]+/).filter(Boolean).map(Number);
    if (numbers.length !== info.state_dim || numbers.some(Number.isNaN)) {
      throw new Error(`The state must be ${info.state_dim} numbers, separated by spaces or commas.`);
    }
    form.append("state", JSON.stringify(numbers));
  }
  for (const { name } of info.cameras) {
    if (!images[name]) throw new Error(`The image of the camera ${name} is missing.`);
    form.append(name, await toBlob(images[name]), name);
  }
  const started = performance.now();
  const answer = await (await request("v1/act", { method: "POST", body: form })).json();
  showAnswer(answer, performance.now() - started);
}

function showAnswer(answer, roundTrip) {
  const names = answer.action_names ?? usualNames(answer.actions[0].length);
  const isChunk = answer.actions.length > 1;
  get("answer-title").textContent = isChunk ? `Chunk of ${answer.actions.length} actions` : "Action";
  get("actions").replaceChildren(isChunk ? curves(names, answer.actions) : actionTable(names, answer));
  const { timings } = answer;
  const parts = [
    `round trip ${roundTrip.toFixed(0)} ms`,
    `server ${timings.total_ms.toFixed(0)} ms (queue ${timings.queue_ms.toFixed(0)}, model ${timings.model_ms.toFixed(0)})`,
    `batch of ${answer.batch_size}`,
    `statistics ${answer.unnorm_key}`,
  ];
  if (answer.details) parts.push(`forward passes: ${answer.details.forward_passes}`);
  get("timing").textContent = parts.join(" · ");
  get("answer").hidden = false;
}

function usualNames(count) {
  const endEffector = ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"];
  return count === endEffector.length ? endEffector : Array.from({ length: count }, (_, index) => `a${index}`);
}

function element(name, text = "", attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function drawing(width, height, label) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("height", height);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  return svg;
}

function draw(svg, name, attributes) {
  const shape = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
  svg.append(shape);
}

function actionTable(names, answer) {
  const bins = answer.details?.bin_probabilities?.[0];
  const table = element("table");
  const head = table.createTHead().insertRow();
  for (const title of ["", "value", ...(bins ? ["probability", "all bins, low to high"] : [])]) {
    head.append(element("th", title, { scope: "col" }));
  }
  const body = table.createTBody();
  names.forEach((name, index) => {
    const row = body.insertRow();
    row.append(element("th", name, { scope: "row" }), element("td", signed(answer.actions[0][index])));
    if (!bins) return;
    row.append(element("td", `${(100 * answer.details.probabilities[0][index]).toFixed(1)}%`));
    const cell = element("td", "", { class: "bins" });
    cell.append(bars(bins[index], name));
    row.append(cell);
  });
  return table;
}

function bars(bins, name) {
  const size = Math.ceil(bins.length / BARS);
  const sums = [];
  for (let start = 0; start < bins.length; start += size) {
    sums.push(bins.slice(start, start + size).reduce((sum, one) => sum + one, 0));
  }
  const svg = drawing(sums.length, 24, `Probabilities of the bins of ${name}`);
  draw(svg, "line", { class: "axis", x1: 0, x2: sums.length, y1: 24, y2: 24 });
  const highest = Math.max(...sums);
  sums.forEach((sum, index) => {
    const height = (23 * sum) / highest;
    draw(svg, "rect", { class: "bar", x: index + 0.1, y: 24 - height, width: 0.8, height });
  });
  return svg;
}

function curves(names, actions) {
  const grid = element("div", "", { class: "curves" });
  names.forEach((name, dimension) => {
    const values = actions.map((action) => action[dimension]);
    const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)];
    const place = (value) => (high === low ? 30 : 57 - (54 * (value - low)) / (high - low));
    const svg = drawing(values.length - 1, 60, `${name} over the chunk: ${values.map(signed).join(", ")}`);
    draw(svg, "line", { class: "axis", x1: 0, x2: values.length - 1, y1: place(0), y2: place(0) });
    draw(svg, "polyline", { class: "curve", points: values.map((value, step) => `${step},${place(value)}`).join(" ") });
    const caption = element("figcaption");
    caption.append(element("b", name), element("span", `${signed(low)} to ${signed(high)}`));
    const figure = element("figure");
    figure.append(caption, svg);
    grid.append(figure);
  });
  return grid;
}

function signed(value) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(4)}`;
}

// Episodes

async function watch() {
  const response = await request(`page/episode?seed=${get("seed").valueAsNumber || 0}`);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  get("episode").hidden = false;
  for (let text = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    text += value;
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines) showStep(JSON.parse(line));
  }
  get("seed").valueAsNumber += 1;
}

function showStep(step) {
  if (step.problem) throw new Error(step.problem);
  get("scene").src = `data:image/jpeg;base64,${step.image}`;
  get("scene").alt = `The tabletop after ${step.step} steps`;
  const outcome = step.is_over ? (step.success ? " – done" : " – not done") : "";
  get("caption").textContent = `“${step.instruction}”: ${step.step} steps${outcome}`;
}

// Links

async function showLinked(link) {
  const response = await request(link.getAttribute("href"));
  const isJson = response.headers.get("Content-Type").includes("json");
  get("linked-title").textContent = link.textContent;
  get("linked-text").textContent = isJson ? JSON.stringify(await response.json(), null, 2) : await response.text();
  get("linked").showModal();
}

// Events

async function busy(button, work) {
  show(null);
  button.disabled = true;
  try {
    await work();
  } catch (error) {
    show(error);
  } finally {
    button.disabled = false;
  }
}

get("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  busy(event.submitter ?? event.target.querySelector(".primary"), predict);
});
get("watch").addEventListener("click", (event) => busy(event.target, watch));
get("links").addEventListener("click", (event) => {
  // The browser would open the link without the token.
  if (document.body.dataset.needsToken === "false" || !event.target.matches("a")) return;
  event.preventDefault();
  show(null);
  showLinked(event.target).catch(show);
});
get("close").addEventListener("click", () => get("linked").close());
get("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", get("token").value);
  connect();
});
connect();
