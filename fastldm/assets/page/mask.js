// A picture that is painted on, by mouse, pen or finger: what is painted is made anew.

/** Draws `image` so that it fills a canvas of this size, cut where its proportions differ. */
export function cover(context, image, width, height) {
  const scale = Math.max(width / image.width, height / image.height);
  const [w, h] = [image.width * scale, image.height * scale];
  context.imageSmoothingQuality = "high";
  context.drawImage(image, (width - w) / 2, (height - h) / 2, w, h);
}

export function canvasOf(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

export class Painter {
  #canvas;
  #strokes = []; // {size, points}: in parts of the width and the height, so that they fit any size
  #stroke = null;
  #image = null;
  #changed;
  brush = 0.14; // of the width

  /** changed: called when there is a stroke more or less. */
  constructor(canvas, changed) {
    this.#canvas = canvas;
    this.#changed = changed;
    canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    canvas.addEventListener("pointermove", (event) => this.#go(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => this.#end());
  }

  get image() {
    return this.#image;
  }

  get painted() {
    return this.#strokes.length > 0;
  }

  /** An ImageBitmap, or none. */
  open(image) {
    this.#image = image;
    this.clear();
  }

  /** The size of what will be made: the picture is cut to its proportions. */
  resize(width, height) {
    const finer = Math.max(1, Math.ceil(512 / Math.max(width, height)));
    this.#canvas.width = width * finer;
    this.#canvas.height = height * finer;
    this.draw();
  }

  undo() {
    this.#strokes.pop();
    this.draw();
    this.#changed();
  }

  clear() {
    this.#strokes = [];
    this.draw();
    this.#changed();
  }

  draw() {
    const { width, height } = this.#canvas;
    const context = this.#canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (this.#image === null) return;
    cover(context, this.#image, width, height);
    const paint = canvasOf(width, height);
    const color = getComputedStyle(document.documentElement).getPropertyValue("--accent");
    this.#trace(paint.getContext("2d"), width, height, color);
    context.globalAlpha = 0.6;
    context.drawImage(paint, 0, 0);
    context.globalAlpha = 1;
  }

  /** PNGs of the picture in this size, and of the mask, transparent where it is painted; null without paint. */
  async files(width, height) {
    const picture = canvasOf(width, height);
    cover(picture.getContext("2d"), this.#image, width, height);
    if (!this.painted) return { picture: await toPng(picture), mask: null };
    const mask = canvasOf(width, height);
    const context = mask.getContext("2d");
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-out";
    this.#trace(context, width, height, "black");
    return { picture: await toPng(picture), mask: await toPng(mask) };
  }

  #trace(context, width, height, color) {
    Object.assign(context, { strokeStyle: color, fillStyle: color, lineCap: "round", lineJoin: "round" });
    for (const { size, points } of this.#strokes) {
      context.lineWidth = size * width;
      context.beginPath();
      if (points.length === 1) {
        context.arc(points[0][0] * width, points[0][1] * height, (size * width) / 2, 0, 2 * Math.PI);
        context.fill();
        continue;
      }
      for (const [x, y] of points) context.lineTo(x * width, y * height);
      context.stroke();
    }
  }

  /** Where on the picture, which may be smaller than its element. */
  #at(event) {
    const box = this.#canvas.getBoundingClientRect();
    const scale = Math.min(box.width / this.#canvas.width, box.height / this.#canvas.height);
    const [w, h] = [this.#canvas.width * scale, this.#canvas.height * scale];
    return [(event.clientX - box.left - (box.width - w) / 2) / w, (event.clientY - box.top - (box.height - h) / 2) / h];
  }

  #begin(event) {
    if (event.button !== 0 || this.#image === null) return;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#stroke = { size: this.brush, points: [this.#at(event)] };
    this.#strokes.push(this.#stroke);
    this.draw();
  }

  #go(event) {
    if (this.#stroke === null) return;
    for (const each of event.getCoalescedEvents?.() ?? [event]) this.#stroke.points.push(this.#at(each));
    this.draw();
  }

  #end() {
    if (this.#stroke === null) return;
    this.#stroke = null;
    this.#changed();
  }
}

function toPng(canvas) {
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
