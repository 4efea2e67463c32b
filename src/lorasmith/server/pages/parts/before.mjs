// The pictures before an edit beside the picture after it: dragged to another one, moved in a dialog, replaced, removed.
import { address } from "../lib/api.mjs";
import { html, useRef, useState } from "../lib/html.mjs";
import { filesOfInput } from "../lib/uploads.mjs";
import { Dialog } from "./basics.mjs";

const DRAGGED = "application/x-lorasmith-control";
const THUMBNAIL = 480; // pixels: twice the width at which they are shown

/**
 * @param image the picture after, null for pictures before that belong to none
 * @param controls [{file, width, height, fixed, problem}]
 * @param version changes when files have changed places, as their addresses then stay the same
 * @param actions {pair(control, image), choose(files, image), remove(control), move(control)}; null if nothing can be changed
 */
export function Before({ dataset, image, controls, version, actions }) {
  const input = useRef(null);
  const [over, setOver] = useState(false);
  const allowed = (event) => {
    if (!image || !actions || !event.dataTransfer.types.includes(DRAGGED)) return;
    event.preventDefault();
    setOver(true);
  };
  const dropped = (event) => {
    setOver(false);
    const control = event.dataTransfer.getData(DRAGGED);
    if (!control || !image || !actions) return;
    event.preventDefault();
    actions.pair(control, image);
  };
  const chosen = (event) => {
    actions.choose(filesOfInput(event.currentTarget), image);
    event.currentTarget.value = "";
  };
  return html`<div class=${`frame before ${over ? "over" : ""}`} data-before=${image ?? undefined} onDragOver=${allowed} onDragLeave=${() => setOver(false)} onDrop=${dropped}>
    ${controls.map((one) => html`<${Control} key=${one.file} dataset=${dataset} control=${one} version=${version} actions=${actions} />`)}
    ${controls.length === 0 && html`<span class="missing">No picture before</span>`}
    ${image && actions && html`<button type="button" class="button small" aria-label=${`${controls.length ? "Replace" : "Add"} the picture before ${image}`} onClick=${() => input.current.click()}>${controls.length ? "Replace" : "Add"}</button>
      <input ref=${input} type="file" accept="image/*,.heic,.heif,.avif,.jxl" class="unseen" tabindex="-1" aria-label=${`Picture before ${image}`} onChange=${chosen} />`}
  </div>`;
}

function Control({ dataset, control, version, actions }) {
  const [unseen, setUnseen] = useState(false);
  const { file, fixed, problem } = control;
  if (fixed) return html`<span class="missing">${file}</span>`;
  const drag = (event) => event.dataTransfer.setData(DRAGGED, file);
  return html`<div class="whole" draggable=${actions ? "true" : undefined} onDragStart=${drag}>
    ${unseen ? html`<span class="missing">${problem || "No preview"}</span>`
      : html`<img src=${address(["datasets", dataset, "controls", file], { width: THUMBNAIL, v: version })} alt=${`Before: ${file}`} draggable="false" loading="lazy" onError=${() => setUnseen(true)} />`}
    ${actions && html`<button type="button" class="icon-button corner" aria-label=${`Remove the picture before, ${file}`} title="Remove" onClick=${() => actions.remove(file)}>✕</button>
      <button type="button" class="icon-button corner left" aria-label=${`Move ${file} to another picture`} title="Move to another picture" onClick=${() => actions.move(file)}>⇄</button>`}
  </div>`;
}

/** A dialog in which the picture is chosen that a picture before an edit belongs to. */
export function MoveControl({ dataset, control, images, onMove, onClose }) {
  return html`<${Dialog} title="Which picture is it before?" onClose=${onClose} wide>
    <p>${control} becomes the picture before the one that you choose. If that has one, both change places.</p>
    <ul class="thumbs">${images.map((image) => html`<li key=${image.file}><button type="button" class="picture" onClick=${() => { onClose(); onMove(control, image.file); }}>
      <img src=${address(["datasets", dataset, "images", image.file], { width: 256 })} alt="" loading="lazy" /><span>${image.file}</span></button></li>`)}</ul>
  <//>`;
}
