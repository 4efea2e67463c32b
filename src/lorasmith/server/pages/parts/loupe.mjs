// One photo as large as the sheet: looked at, cropped, or masked.
import { address } from "../lib/api.mjs";
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { Problem } from "./basics.mjs";
import { Cropper } from "./cropper.mjs";
import { Icon } from "./icons.mjs";
import { Masker } from "./masker.mjs";
import { controlOf, maskOf, Shades, sourceOf } from "./photo_tile.mjs";

const LARGE = 1600; // pixels

/**
 * @param {Props<{ image: Api.PictureRow }>} props
 *   `mode`: "large", "crop" or "mask"
 *   `at`: which photo of how many, from 0, and their number
 *   `onMode`: called with the next mode, null for the sheet
 *   `onGo`: called with -1 or 1
 *   `onCrop`, `onMask`: store a crop and a painted mask
 */
export function Loupe({ dataset, image, mode, at: [at, number], facts, version, words, onMode, onGo, onCrop, onMask }) {
  const [error, setError] = useState(null);
  const stage = useRef(null);
  useEffect(() => setError(null), [image.file, mode]);
  useEffect(() => void (mode === "large" && stage.current?.focus({ preventScroll: true })), [mode]);
  const done = (change) => async (part) => {
    try {
      await change(image, part);
      onMode("large");
    } catch (failure) {
      setError(failure);
    }
  };
  if (mode === "crop") {
    const { width = 0, height = 0, crop } = image;
    const whole = crop
      ? { width: Math.round((width ?? 0) / crop.width), height: Math.round((height ?? 0) / crop.height) }
      : image;
    return html`<div class="loupe">
      <${Cropper} name=${image.file} size=${whole} crop=${crop} onCrop=${done(onCrop)} onCancel=${() => onMode("large")}
        source=${address(["datasets", dataset, "images", image.file], { width: LARGE, original: "true" })} />
      <${Problem} error=${error} />
    </div>`;
  }
  if (mode === "mask")
    return html`<div class="loupe">
      <${Masker} key=${image.file} name=${image.file} source=${sourceOf(dataset, image, LARGE)}
        mask=${image.mask && maskOf(dataset, image, LARGE, version)} onMask=${done(onMask)}
        onCancel=${() => onMode("large")} />
      <${Problem} error=${error} />
    </div>`;
  const before = words && image.controls.find((one) => !one.fixed && !one.problem);
  return html`<div class="loupe">
    <div class="loupe-bar">
      <button type="button" class="button small" onClick=${() => onMode(null)}>
        <${Icon} name="back" />All photos
      </button>
      <span class="faint" role="status">${at + 1} of ${number}</span>
      <span class="actions">
        <button type="button" class="icon-button" aria-label="Previous photo" disabled=${at === 0}
            onClick=${() => onGo(-1)}>
          <${Icon} name="back" />
        </button>
        <button type="button" class="icon-button" aria-label="Next photo" disabled=${at === number - 1}
            onClick=${() => onGo(1)}>
          <${Icon} name="forward" />
        </button>
      </span>
    </div>
    <div class="stage" ref=${stage} tabindex="-1">
      ${
        before &&
        html`<img key=${before.file} src=${controlOf(dataset, before.file, version)}
          alt=${t`Before: ${before.file}`} />`
      }
      <div class="whole" style=${image.width && image.height ? { "--ratio": image.width / image.height } : {}}>
        <img key=${image.file} src=${sourceOf(dataset, image, LARGE)} alt=${image.caption || image.file} />
        <${Shades} crop=${facts?.crop} mask=${image.mask && maskOf(dataset, image, LARGE, version)} />
      </div>
    </div>
  </div>`;
}
