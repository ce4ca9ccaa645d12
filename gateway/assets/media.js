// Attached files: how they are shown, sent, and overlaid with what the encoder cut of them.

const SVG = "http://www.w3.org/2000/svg";
const MAX_BYTES = 100 * 2 ** 20;
const NUMBER_HEIGHT = 0.12;  // of a tile's shorter side

export class Medium {
  constructor(file) {
    this.file = file;
    this.mostTiles = 0;  // 0: as the model says
    this.url = URL.createObjectURL(file);
    this.frame = node("div", "frame");
    this.caption = node("figcaption", "", file.name);
    this.figure = node("figure");
    this.figure.append(this.frame, this.caption);
    this.frame.append(this.isPicture ? this.#image() : node("p", "name", file.name));
  }

  get isPicture() {
    return this.file.type.startsWith("image/");
  }

  #image() {
    const image = new Image();
    image.alt = this.file.name;
    image.src = this.url;
    // A browser does not show TIFF; the model sees it all the same.
    image.addEventListener("error", () => image.replaceWith(node("p", "name", this.file.name)));
    return image;
  }

  // Its content part of a chat message.
  async part() {
    this.data ??= dataUri(this.file);
    const url = await this.data;
    const most = this.mostTiles ? { max_dynamic_patch: this.mostTiles } : {};
    if (this.isPicture) return { type: "image_url", image_url: { url, ...most } };
    if (this.file.type === "application/pdf") {
      return { type: "file", file: { filename: this.file.name, file_data: url, ...most } };
    }
    return { type: "video_url", video_url: { url, ...most } };
  }

  // `parts`: how the picture, or each frame or page, was cut.
  show(parts) {
    this.frame.querySelector("svg")?.remove();
    if (this.isPicture) this.frame.append(overlay(parts[0]));
    this.caption.textContent = this.isPicture ? grid(parts[0]) : this.#summary(parts);
  }

  #summary(parts) {
    const noun = this.file.type === "application/pdf" ? "page" : "frame";
    const tiles = parts.reduce((sum, part) => sum + part.tiles, 0);
    return `${count(parts.length, noun)} · ${count(tiles, "tile")}`;
  }

  dispose() {
    URL.revokeObjectURL(this.url);
  }
}

// Why a file cannot be sent; nothing when it can.
export function objection(file) {
  const isKnown = /^(image\/(jpeg|png|webp|gif|bmp|tiff)|video\/.+|application\/pdf)$/.test(file.type);
  if (!isKnown && !/\.mkv$/i.test(file.name)) return `${file.name} is no picture, video or PDF.`;
  return file.size > MAX_BYTES ? `${file.name} is larger than 100 MiB.` : "";
}

function grid(part) {
  const size = `${part.width} × ${part.height}`;
  const cut = part.columns * part.rows > 1 ? `${part.columns} × ${part.rows} tiles` : "1 tile";
  return `${size} · ${cut}${part.thumbnail ? " + the whole picture" : ""}`;
}

// The grid is stretched over the whole picture, as the encoder stretches the picture over its grid.
function overlay(part) {
  const width = part.width / part.columns;
  const height = part.height / part.rows;
  const svg = svgNode("svg", { viewBox: `0 0 ${part.width} ${part.height}`, preserveAspectRatio: "none" });
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `cut into ${part.columns} columns and ${part.rows} rows`);
  for (let tile = 0; tile < part.columns * part.rows; tile++) {
    const x = (tile % part.columns) * width;
    const y = Math.floor(tile / part.columns) * height;
    const rect = svgNode("rect", { x, y, width, height });
    rect.append(svgNode("title", {}, `tile ${tile + 1} of ${part.tiles}`));
    svg.append(rect, ...number(tile + 1, x, y, Math.min(width, height)));
  }
  return svg;
}

function number(value, x, y, side) {
  const high = side * NUMBER_HEIGHT;
  const wide = high * (value > 9 ? 1.6 : 1.2);
  const badge = svgNode("rect", { class: "badge", x, y, width: wide, height: high * 1.2 });
  const place = { x: x + wide / 2, y: y + high * 0.62, "font-size": high };
  return [badge, svgNode("text", place, String(value))];
}

export function node(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

function svgNode(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result.replace(/^data:(?=;|application\/octet)[^;]*/, "data:video/x-matroska")));
    reader.addEventListener("error", () => reject(new Error(`${file.name} cannot be read.`)));
    reader.readAsDataURL(file);
  });
}
