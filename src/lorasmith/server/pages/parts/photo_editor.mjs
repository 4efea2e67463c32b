// One photo, large, beside its caption, its tags, and what is remarked about it; and its crop.
import { address } from "../lib/api.mjs";
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { bytes } from "../lib/words.mjs";
import { Button, Dialog, Problem } from "./basics.mjs";
import { Cropper } from "./cropper.mjs";
import { Caption, Crop, sourceOf } from "./photo_tile.mjs";
import { Chips } from "./tags.mjs";

const LARGE = 1600; // pixels

/**
 * @param {Props<{ images: Api.PictureRow[] }>} props
 *   `images`: the photos to go through
 *   `file`: the one that is shown
 *   `actions`: its {caption(image, text, seen), tags(image, text), crop(image, crop), remove(image), show(file)};
 *     those that change are null where nothing can be changed
 *   `known`: tags of all captions
 *   `undo`: what `actions.undo` takes back, of `doneTo`; undefined for nothing
 */
export function PhotoEditor({
  dataset,
  images,
  file,
  captionOf,
  facts,
  problemsOf,
  trigger,
  known,
  undo,
  actions,
  onClose,
}) {
  const at = images.findIndex((one) => one.file === file);
  const image = images[at];
  const [isCropping, setCropping] = useState(false);
  const [isWriting, setWriting] = useState(false);
  const [error, setError] = useState(null);
  useEffect(() => {
    setCropping(false);
    setError(null);
  }, [file]);
  useEffect(() => {
    if (!image) onClose(); // it was removed, here or elsewhere
  }, [image]);
  const press = useRef(null);
  useEffect(() => {
    const pressed = (event) => press.current?.(event); // wherever the focus is
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, []);
  if (!image) return null;
  const go = (step) => {
    const next = images[at + step];
    if (!next) return;
    setWriting(document.activeElement?.tagName === "TEXTAREA");
    actions.show(next.file);
  };
  press.current = (event) => {
    const step = {
      PageDown: 1,
      PageUp: -1,
      ...(event.target.closest?.("input, textarea, select, .cropper") ? {} : { ArrowRight: 1, ArrowLeft: -1 }),
    }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey || isCropping) return;
    event.preventDefault();
    go(step);
  };
  const remove = async () => {
    const next = images[at + 1] ?? images[at - 1];
    if (next) actions.show(next.file);
    else onClose();
    await actions.remove(image);
  };
  const crop = async (box) => {
    try {
      await actions.crop(image, box);
      setCropping(false);
    } catch (failure) {
      setError(failure);
    }
  };
  const whole = image.crop
    ? {
        width: Math.round((image.width ?? 0) / image.crop.width),
        height: Math.round((image.height ?? 0) / image.crop.height),
      }
    : image;
  const { trained, tokens } = facts[image.file] ?? {};
  const caption = captionOf(image);
  return html`<${Dialog} title=${image.file} onClose=${onClose} wide="photo-dialog">
    <div class="photo-editor">
      <div class="photo-large">
        ${
          isCropping
            ? html`<${Cropper} name=${image.file} size=${whole} crop=${image.crop} onCrop=${crop}
              onCancel=${() => setCropping(false)}
              source=${address(["datasets", dataset, "images", image.file], { width: LARGE, original: "true" })} />`
            : html`<div class="stage">
              <div class="whole">
                <img key=${image.file} src=${sourceOf(dataset, image, LARGE)} alt=${caption || image.file} />
                ${facts[image.file]?.crop && html`<${Crop} crop=${facts[image.file].crop} />`}
              </div>
            </div>`
        }
        <${Problem} error=${error} />
        ${
          !isCropping &&
          html`<p class="faint photo-facts">
            ${image.width ? `${image.width} × ${image.height}` : ""}
            ${trained ? ` · trained at ${trained[0]} × ${trained[1]}` : ""}
            ${image.bytes ? ` · ${bytes(image.bytes)}` : ""}${image.crop ? " · cropped" : ""}
          </p>`
        }
      </div>
      <div class="photo-words">
        ${
          problemsOf(image).length > 0 &&
          html`<ul class="problems" aria-label="Remarks">
            ${problemsOf(image).map((text) => html`<li key=${text}>${text}</li>`)}
          </ul>`
        }
        <h3>Caption${tokens ? html` <span class="faint">${tokens} tokens</span>` : ""}</h3>
        ${
          actions.caption
            ? html`
              <${Caption} key=${image.file} name=${image.file} caption=${caption} trigger=${trigger} rows=${7}
                isEdited=${isWriting} onCaption=${(text, seen) => actions.caption(image, text, seen)} />
              <${Chips} key=${`tags ${image.file}`} name=${image.file} caption=${caption} known=${known}
                onCaption=${(text) => actions.tags(image, text)} />
            `
            : html`<p>${caption || "No caption"}</p>`
        }
      </div>
    </div>
    <div class="actions spread photo-bar">
      <div class="actions">
        <${Button} disabled=${at === 0 || isCropping} onClick=${() => go(-1)} aria-label="Previous photo">←<//>
        <span class="faint nowrap">${at + 1} of ${images.length}</span>
        <${Button} disabled=${at === images.length - 1 || isCropping} onClick=${() => go(1)}
            aria-label="Next photo">
          →
        <//>
      </div>
      ${
        actions.remove &&
        !isCropping &&
        html`<div class="actions">
          ${
            undo &&
            html`<${Button} title=${undo.text} aria-label="Undo the last change" onClick=${actions.undo}>Undo<//>`
          }
          ${image.width && html`<${Button} onClick=${() => setCropping(true)}>Crop<//>`}
          <${Button} onClick=${remove}>Leave out<//>
        </div>`
      }
    </div>
  <//>`;
}
