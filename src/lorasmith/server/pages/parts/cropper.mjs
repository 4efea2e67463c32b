// The frame by which a photo is cropped: moved and drawn by its corners, with the pointer or the arrow keys.
import { html, useRef, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { Button } from "./basics.mjs";

const LEAST = 0.05; // of each side
const STEP = 0.01;
const RATIOS = {
  free: [t`Any shape`, null],
  square: [t`Square`, 1],
  portrait: [t`Portrait, 3 : 4`, 3 / 4],
  landscape: [t`Landscape, 4 : 3`, 4 / 3],
};
const CORNERS = { "top left": [0, 0], "top right": [1, 0], "bottom left": [0, 1], "bottom right": [1, 1] };
const NAMES = {
  "top left": t`Corner top left`,
  "top right": t`Corner top right`,
  "bottom left": t`Corner bottom left`,
  "bottom right": t`Corner bottom right`,
};
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const WHOLE = { x: 0, y: 0, width: 1, height: 1 };

/**
 * @param source address of the whole photo
 * @param size of the whole photo: {width, height} in pixels
 * @param crop the part that is kept now, in shares; null for all of it
 * @param onCrop called with the part that is to be kept
 */
export function Cropper({ name, source, size, crop, onCrop, onCancel }) {
  const [box, setBox] = useState(crop ?? WHOLE);
  const [shape, setShape] = useState("free");
  const stage = useRef(null);
  const ratio = RATIOS[shape][1] && (RATIOS[shape][1] * size.height) / size.width; // of shares
  const change = (next) => setBox((before) => next(before));
  const drag = (corner) => (event) => {
    event.preventDefault();
    const { width, height } = stage.current.getBoundingClientRect();
    const [from, start] = [[event.clientX, event.clientY], box];
    const target = event.currentTarget;
    target.focus();
    target.setPointerCapture(event.pointerId);
    target.onpointermove = (moved) =>
      setBox(dragged(start, corner, (moved.clientX - from[0]) / width, (moved.clientY - from[1]) / height, ratio));
    target.onpointerup = target.onpointercancel = () => (target.onpointermove = null);
  };
  const press = (corner) => (event) => {
    const [x, y] = ARROWS[event.key] ?? [];
    if (x === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const step = event.shiftKey ? 5 * STEP : STEP;
    change((before) => dragged(before, corner, x * step, y * step, ratio));
  };
  const choose = (event) => {
    const wanted = event.currentTarget.value;
    const of = RATIOS[wanted][1] && (RATIOS[wanted][1] * size.height) / size.width;
    setShape(wanted);
    if (of) change((before) => shaped(before, of));
  };
  const share = (number) => `${(100 * number).toFixed(2)}%`;
  const place = { left: share(box.x), top: share(box.y), width: share(box.width), height: share(box.height) };
  const pixels = t`${Math.round(box.width * size.width)} × ${Math.round(box.height * size.height)} pixels`;
  return html`<div class="cropper">
    <div class="stage">
      <div class="whole" style=${{ "--ratio": size.width / size.height }} ref=${stage}>
        <img src=${source} alt=${t`All of ${name}`} draggable="false" />
        <div class="crop-shade"><div style=${place}></div></div>
        <div class="crop-frame" style=${place}>
          <button type="button" class="crop-move" aria-label="Move the frame" title="Drag, or press the arrow keys"
            onPointerDown=${drag(null)} onKeyDown=${press(null)}></button>
          ${Object.entries(CORNERS).map(
            ([corner, at]) => html`<button type="button" key=${corner}
              class=${`crop-handle ${corner.replace(" ", "-")}`} aria-label=${NAMES[corner]}
              onPointerDown=${drag(at)} onKeyDown=${press(at)}></button>`,
          )}
        </div>
      </div>
    </div>
    <div class="actions spread">
      <span class="short">
        <label for="crop-shape">
          Shape
        </label> <select id="crop-shape" value=${shape} onChange=${choose}>
          ${Object.entries(RATIOS).map(
            ([value, [title]]) => html`<option key=${value} value=${value}>${title}</option>`,
          )}
        </select>
      </span>
      <span class="faint" role="status">${pixels}</span>
      <div class="actions">
        <${Button}
            onClick=${() => {
              setShape("free");
              setBox(WHOLE);
            }}>
          Whole photo
        <//>
        <${Button} onClick=${onCancel}>Cancel<//>
        <${Button} kind="primary" busyText="Cropping…" onClick=${() => onCrop(box)}>Crop<//>
      </div>
    </div>
  </div>`;
}

const within = (number, low, high) => Math.min(Math.max(number, low), high);

/**
 * A frame whose corner, or all of which, was moved by shares of the photo; `ratio` is width by height in shares, null
 * for any.
 */
export function dragged({ x, y, width, height }, corner, byX, byY, ratio) {
  if (!corner) return { x: within(x + byX, 0, 1 - width), y: within(y + byY, 0, 1 - height), width, height };
  const [isRight, isBottom] = corner;
  const [fixedX, fixedY] = [isRight ? x : x + width, isBottom ? y : y + height]; // the corner on the other side
  const [mostX, mostY] = [isRight ? 1 - fixedX : fixedX, isBottom ? 1 - fixedY : fixedY];
  let wide = within(width + (isRight ? byX : -byX), LEAST, mostX);
  let high = within(height + (isBottom ? byY : -byY), LEAST, mostY);
  if (ratio) {
    wide = Math.min(Math.abs(byX) >= Math.abs(byY) ? wide : high * ratio, mostX, mostY * ratio);
    high = wide / ratio;
  }
  return { x: isRight ? fixedX : fixedX - wide, y: isBottom ? fixedY : fixedY - high, width: wide, height: high };
}

/** The largest frame of a ratio inside of another one, around its centre. */
function shaped({ x, y, width, height }, ratio) {
  const wide = Math.min(width, height * ratio);
  const high = wide / ratio;
  return { x: x + (width - wide) / 2, y: y + (height - high) / 2, width: wide, height: high };
}
