// One photo: the picture with the part that is trained, what is wrong with it, and its caption.
import { address } from "../lib/api.mjs";
import { html, useEffect, useId, useRef, useState } from "../lib/html.mjs";
import { bytes } from "../lib/words.mjs";
import { Elsewhere } from "./basics.mjs";

const STORE_AFTER_MS = 900;
const THUMBNAIL = 480; // pixels: twice the width at which tiles are shown

/**
 * @param {Props<{ image: Api.PictureRow }>} props
 *   `image`: a photo of the dataset, or `upload`, one on its way there
 *   `isFixed`: whether it can neither be changed nor removed
 *   `facts`: its {crop, trained} of the check; null to draw none
 *   `usesMasks`: whether the training takes masks from files
 *   `before`: its pictures before an edit, drawn beside it; null for photos that are no pairs
 *   `onOpen`: shows it large
 */
export function PhotoTile({
  dataset,
  image,
  upload,
  preview,
  caption,
  problems = [],
  facts,
  trigger,
  usesMasks,
  isFixed,
  isEdited,
  onCaption,
  onRemove,
  onOpen,
  before,
}) {
  const [unseen, setUnseen] = useState([]); // addresses that the browser could not show
  const name = image?.file ?? upload.name;
  const sources = upload
    ? [upload.preview]
    : [...(preview && !image.crop ? [preview] : []), sourceOf(dataset, image, THUMBNAIL)];
  const source = sources.find((one) => !unseen.includes(one));
  const state = upload?.state;
  const photo = html`<div class="frame">
    ${
      !source
        ? html`<span class="missing">${upload ? "No preview yet" : "No preview"}</span>`
        : html`<div class="whole">
          <img src=${source} alt=${caption || name} loading="lazy"
            onError=${() => setUnseen((all) => [...all, source])} />
          ${facts?.crop && html`<${Crop} crop=${facts.crop} />`}
        </div>`
    }
    ${onOpen && html`<button type="button" class="open" aria-label=${`Show ${name} large`} onClick=${onOpen}></button>`}
    ${state && html`<span class="sent-state">${state === "sending" ? "Sending…" : "Waiting…"}</span>`}
    ${problems.length > 0 && html`<ul class="marks">${problems.map((text) => html`<li key=${text}>${text}</li>`)}</ul>`}
    ${
      !isFixed &&
      html`<button type="button" class="icon-button corner" aria-label=${`Remove ${name}`} title="Remove"
          onClick=${onRemove}>
        ✕
      </button>`
    }
  </div>`;
  return html`<li class=${`tile ${state ?? ""}`}>
    ${before ? html`<div class="pair">${before}${photo}</div>` : photo}
    <p class="tile-name">
      <span class="clip" title=${name}>${upload?.isBefore ? `Before: ${name}` : name}</span>
      ${
        image?.width
          ? html`<span class="faint nowrap">${image.width} × ${image.height}</span>`
          : upload && html`<span class="faint nowrap">${bytes(upload.picture.size)}</span>`
      }
    </p>
    ${
      image?.mask &&
      html`<p class="said faint">
        Mask: ${image.mask}${usesMasks ? "" : " (used with “masks: files” in the settings)"}
      </p>`
    }
    ${image && isFixed && html`<p class="said faint">${caption}</p>`}
    ${
      image &&
      !isFixed &&
      html`<${Caption} name=${name} caption=${caption} trigger=${trigger} isEdited=${isEdited}
        onCaption=${onCaption} />`
    }
  </li>`;
}

/** The address of a photo, reduced; another one when it was cropped, as its name may stay. */
export const sourceOf = (dataset, image, width) =>
  address(["datasets", dataset, "images", image.file], {
    width,
    v: image.crop
      ? Object.values(image.crop)
          .map((one) => one.toFixed(4))
          .join(" ")
      : image.bytes,
  });

export function Crop({ crop }) {
  const whole = crop.width > 0.995 && crop.height > 0.995;
  if (whole) return null;
  const share = (number) => `${(100 * number).toFixed(2)}%`;
  return html`<span class="crop" title="The part that is trained"
    style=${{ left: share(crop.x), top: share(crop.y), width: share(crop.width), height: share(crop.height) }}></span>`;
}

/** Whether a caption was not stored because it is another one now than this page has shown. */
export const isStale = (failure) => failure.kind === "StaleCaptionError";

/**
 * A caption that is stored a moment after typing, and when the field is left; one that was changed elsewhere waits
 * for a choice.
 */
export function Caption({ name, caption, trigger, isEdited, onCaption, rows = 2 }) {
  const [text, setText] = useState(null); // null: as stored
  const [failed, setFailed] = useState(null); // why it was not stored
  const [other, setOther] = useState(null); // what was stored elsewhere meanwhile
  const waits = useRef(false);
  const id = useId();
  const timer = useRef(0);
  const latest = useRef(null);
  const field = useRef(null);
  useEffect(() => {
    if (!isEdited) return;
    field.current.focus({ preventScroll: true });
    field.current.scrollIntoView({ block: "center" });
  }, [isEdited]);
  const begun = useRef(null); // the caption that was there when typing began, whatever arrives meanwhile
  latest.current = text;
  if (text === null) begun.current = caption;
  const store = async () => {
    clearTimeout(timer.current);
    const typed = latest.current;
    if (typed === null || typed === begun.current || waits.current) return;
    try {
      await onCaption(typed, begun.current);
      begun.current = typed;
      setFailed(null);
      if (latest.current === typed) setText(null);
    } catch (failure) {
      waits.current = isStale(failure);
      if (waits.current) setOther((begun.current = Object.values(failure.details)[0]));
      else setFailed(failure);
    }
  };
  const choose = (mine) => {
    waits.current = false;
    setOther(null);
    if (mine) return store();
    setText(null);
  };
  useEffect(() => () => void store(), []);
  const type = (event) => {
    setText(event.currentTarget.value);
    latest.current = event.currentTarget.value;
    clearTimeout(timer.current);
    timer.current = setTimeout(store, STORE_AFTER_MS);
  };
  return html`
    <label class="unseen" for=${id}>Caption of ${name}</label>
    <textarea ref=${field} id=${id} rows=${rows} class="caption" value=${text ?? caption}
      placeholder=${trigger ? `Only “${trigger}”` : "What is in the picture?"} onInput=${type} onBlur=${store}
      aria-invalid=${failed ? "true" : undefined}></textarea>
    ${other !== null && html`<${Elsewhere} there=${other} onChoose=${choose} what="caption" />`}
    ${
      failed &&
      html`<p class="field-error" role="alert">
        This caption is not
        stored. ${failed.message} <button type="button" class="as-link" onClick=${store}>Try again</button>
      </p>`
    }
  `;
}
