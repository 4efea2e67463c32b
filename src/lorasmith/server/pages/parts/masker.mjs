// A mask that is painted over a photo: bright is learnt, dark is not. By the pointer, or by a brush that keys move.
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { Button } from "./basics.mjs";
import { Icon } from "./icons.mjs";

const MOST = 1024; // pixels of its longer side
const STROKES = 12; // that can be taken back
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/**
 * @param source address of the photo
 * @param mask address of the mask that it has; empty for none
 * @param onMask called with the mask as a PNG file, white where it is learnt; null if nothing is
 */
export function Masker({ name, source, mask, onMask, onCancel }) {
  const canvas = useRef(null); // black where nothing is learnt, clear elsewhere
  const image = useRef(null);
  const strokes = useRef(/** @type {ImageData[]} */ ([]));
  const [number, setNumber] = useState(0); // of strokes that can be taken back
  const [size, setSize] = useState(0.12); // of the brush, as a share of the shorter side
  const [isErasing, setErasing] = useState(false);
  const [spot, setSpot] = useState([0.5, 0.5]); // of the brush, in shares
  const [isDown, setDown] = useState(false); // whether keys that move the brush paint

  const pen = () => canvas.current.getContext("2d", { willReadFrequently: true });
  const keep = () => {
    const { width, height } = canvas.current;
    strokes.current = [...strokes.current, pen().getImageData(0, 0, width, height)].slice(-STROKES);
    setNumber(strokes.current.length);
  };
  const undo = () => {
    const last = strokes.current.pop();
    if (last) pen().putImageData(last, 0, 0);
    setNumber(strokes.current.length);
  };
  const fill = (isDark) => {
    keep();
    const { width, height } = canvas.current;
    pen().clearRect(0, 0, width, height);
    if (isDark) pen().fillRect(0, 0, width, height);
  };
  const start = async () => {
    const { naturalWidth, naturalHeight } = image.current;
    const scale = Math.min(1, MOST / Math.max(naturalWidth, naturalHeight));
    const [width, height] = [Math.round(naturalWidth * scale), Math.round(naturalHeight * scale)];
    Object.assign(canvas.current, { width, height });
    pen().fillRect(0, 0, width, height);
    if (!mask) return;
    const there = new Image();
    there.src = mask;
    await there.decode();
    pen().drawImage(there, 0, 0, width, height);
    const found = pen().getImageData(0, 0, width, height);
    for (let at = 0; at < found.data.length; at += 4) {
      found.data[at + 3] = 255 - found.data[at];
      found.data[at] = found.data[at + 1] = found.data[at + 2] = 0;
    }
    pen().putImageData(found, 0, 0);
  };
  const paint = (from, to) => {
    const { width, height } = canvas.current;
    const context = pen();
    context.globalCompositeOperation = isErasing ? "source-over" : "destination-out";
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = size * Math.min(width, height);
    context.beginPath();
    context.moveTo(from[0] * width, from[1] * height);
    context.lineTo(to[0] * width + 0.01, to[1] * height);
    context.stroke();
    context.globalCompositeOperation = "source-over";
  };
  const drag = (event) => {
    event.preventDefault();
    const box = canvas.current.getBoundingClientRect();
    const placeOf = ({ clientX, clientY }) => [(clientX - box.left) / box.width, (clientY - box.top) / box.height];
    let last = placeOf(event);
    const target = event.currentTarget;
    target.focus();
    target.setPointerCapture(event.pointerId);
    keep();
    paint(last, last);
    target.onpointermove = (moved) => {
      paint(last, (last = placeOf(moved)));
      setSpot(last);
    };
    target.onpointerup = target.onpointercancel = () => (target.onpointermove = null);
  };
  const press = (event) => {
    const arrow = ARROWS[event.key];
    const undoes = event.key === "z" && (event.ctrlKey || event.metaKey);
    if (!arrow && !undoes && (!" []xe".includes(event.key) || event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    event.stopPropagation();
    if (undoes) undo();
    else if (event.key === "[") setSize(Math.max(0.02, size / 1.25));
    else if (event.key === "]") setSize(Math.min(0.8, size * 1.25));
    else if (event.key === "e" || event.key === "x") setErasing(!isErasing);
    else if (event.key === " ") {
      if (!isDown) keep();
      if (!isDown) paint(spot, spot);
      setDown(!isDown);
    } else {
      const step = event.shiftKey ? 0.08 : 0.02;
      const next = spot.map((one, axis) => Math.min(1, Math.max(0, one + arrow[axis] * step)));
      if (isDown) paint(spot, next);
      setSpot(next);
    }
  };
  const finish = async () => {
    const { width, height } = canvas.current;
    const sent = Object.assign(document.createElement("canvas"), { width, height });
    const context = /** @type {CanvasRenderingContext2D} */ (sent.getContext("2d"));
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.drawImage(canvas.current, 0, 0);
    const isDark = pen()
      .getImageData(0, 0, width, height)
      .data.every((one, at) => at % 4 < 3 || one > 250);
    await onMask(isDark ? null : await new Promise((resolve) => sent.toBlob(resolve, "image/png")));
  };
  useEffect(() => void canvas.current.focus({ preventScroll: true }), []);
  const ratio = image.current?.naturalWidth / image.current?.naturalHeight || 1;
  const across = size * Math.min(1, 1 / ratio);
  return html`<div class="masker">
    <div class="stage">
      <div class="whole" style=${{ "--ratio": ratio }}>
        <img ref=${image} src=${source} alt=${t`All of ${name}`} draggable="false" onLoad=${start} />
        <canvas ref=${canvas} tabindex="0" role="application"
          aria-label=${
            isDown
              ? t`Brush: arrows move it, Space lifts it, brackets change its size`
              : t`Brush: arrows move it, Space lowers it, brackets change its size`
          }
          onPointerDown=${drag} onKeyDown=${press}
          onPointerMove=${(event) => {
            const box = event.currentTarget.getBoundingClientRect();
            setSpot([(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]);
          }}></canvas>
        <span class=${`brush ${isDown ? "down" : ""}`}
          style=${{ left: `${100 * spot[0]}%`, top: `${100 * spot[1]}%`, width: `${100 * across}%` }}></span>
      </div>
    </div>
    <p class="faint">Paint what is to be learnt. What stays dark is not.</p>
    <div class="actions">
      <button type="button" class="button small" aria-pressed=${isErasing ? "false" : "true"}
          onClick=${() => setErasing(false)}>
        <${Icon} name="brush" />Paint
      </button>
      <button type="button" class="button small" aria-pressed=${isErasing ? "true" : "false"}
          onClick=${() => setErasing(true)}>
        Erase
      </button>
      <label class="short">
        Brush <input type="range" min="0.02" max="0.8" step="0.01" value=${size}
          onInput=${(event) => setSize(Number(event.currentTarget.value))} />
      </label>
      <${Button} class="small" onClick=${() => fill(false)}>All<//>
      <${Button} class="small" onClick=${() => fill(true)}>Nothing<//>
      <${Button} class="small" disabled=${!number} onClick=${undo}>Undo stroke<//>
      <${Button} class="small" onClick=${onCancel}>Cancel<//>
      <${Button} class="small" kind="primary" busyText="Keeping…" onClick=${finish}>Keep the mask<//>
    </div>
  </div>`;
}
