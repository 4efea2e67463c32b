// The other picture of a pair, such as that before an edit: dragged to another picture, moved in a dialog, replaced,
// removed.
import { address } from "../lib/api.mjs";
import { html, useRef, useState } from "../lib/html.mjs";
import { filesOfInput, useAccept } from "../lib/uploads.mjs";
import { capital } from "../lib/words.mjs";
import { Dialog } from "./basics.mjs";

/** What pairs teach, by the setting pairs, and what their pictures are called. */
export const PAIRS = {
  none: {
    title: "an edit: a picture before and one after",
    other: "picture before",
    of: "picture before",
    others: "pictures before",
    main: "pictures after",
    lack: "the picture before the edit: add it beside it, or choose controls optional in the settings.",
    zones: [
      ["Before", "Drop the pictures before the edit here, named as those after it."],
      ["After", "Drop the edited pictures here, with their captions: what was asked for."],
    ],
  },
  slider: {
    title: "a slider: a picture at each end",
    other: "opposite",
    of: "opposite of",
    others: "opposites",
    main: "pictures",
    lack: "the opposite: add it beside it.",
    zones: [
      ["Strength −1", "Drop the pictures of one end here, named as those of the other."],
      ["Strength 1", "Drop the pictures of the other end here, with captions that do not name what changes."],
    ],
  },
  dpo: {
    title: "a preference: a better picture and a worse one",
    other: "opposite",
    of: "opposite of",
    others: "opposites",
    main: "pictures",
    lack: "the opposite: add it beside it.",
    zones: [
      ["Worse", "Drop the worse pictures here, named as the better ones."],
      ["Better", "Drop the better pictures here, with captions of both."],
    ],
  },
};

const DRAGGED = "application/x-lorasmith-control";
const THUMBNAIL = 480; // pixels: twice the width at which they are shown

/**
 * @param {Props<{ controls: Api.ControlRow[] }>} props
 *   `image`: the trained picture, null for others that belong to none
 *   `controls`: [{file, width, height, fixed, problem}]
 *   `version`: changes when files have changed places, as their addresses then stay the same
 *   `words`: of `PAIRS`
 *   `actions`: null, or {pair(control, image), choose(files, image), remove(control), move(control)}; null if nothing
 *     can be changed
 */
export function Before({ dataset, image, controls, version, words, actions }) {
  const input = useRef(null);
  const accept = useAccept();
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
  return html`<div class=${`frame before ${over ? "over" : ""}`} data-before=${image ?? undefined}
      onDragOver=${allowed} onDragLeave=${() => setOver(false)} onDrop=${dropped}>
    ${controls.map(
      (one) => html`<${Control} key=${one.file} dataset=${dataset} control=${one} version=${version} words=${words}
        actions=${actions} />`,
    )}
    ${controls.length === 0 && html`<span class="missing">No ${words.other}</span>`}
    ${
      image &&
      actions &&
      html`
        <button type="button" class="button small"
            aria-label=${`${controls.length ? "Replace" : "Add"} the ${words.of} ${image}`}
            onClick=${() => input.current.click()}>
          ${controls.length ? "Replace" : "Add"}
        </button>
        <input ref=${input} type="file" accept=${accept} class="unseen" tabindex="-1"
          aria-label=${`${capital(words.of)} ${image}`} onChange=${chosen} />
      `
    }
  </div>`;
}

function Control({ dataset, control, version, words, actions }) {
  const [unseen, setUnseen] = useState(false);
  const { file, fixed, problem } = control;
  if (fixed) return html`<span class="missing">${file}</span>`;
  const drag = (event) => event.dataTransfer.setData(DRAGGED, file);
  return html`<div class="whole" draggable=${actions ? "true" : undefined} onDragStart=${drag}>
    ${
      unseen
        ? html`<span class="missing">${problem || "No preview"}</span>`
        : html`<img src=${address(["datasets", dataset, "controls", file], { width: THUMBNAIL, v: version })}
          alt=${`${capital(words.other)}: ${file}`} draggable="false" loading="lazy"
          onError=${() => setUnseen(true)} />`
    }
    ${
      actions &&
      html`
        <button type="button" class="icon-button corner" aria-label=${`Remove the ${words.other}, ${file}`}
            title="Remove" onClick=${() => actions.remove(file)}>
          ✕
        </button>
        <button type="button" class="icon-button corner left" aria-label=${`Move ${file} to another picture`}
            title="Move to another picture" onClick=${() => actions.move(file)}>
          ⇄
        </button>
      `
    }
  </div>`;
}

/**
 * A dialog in which the picture is chosen that the other one of a pair belongs to.
 *
 * @param {Props<{ images: Api.PictureRow[] }>} props
 */
export function MoveControl({ dataset, control, images, words, onMove, onClose }) {
  return html`<${Dialog} title="Which picture does it belong to?" onClose=${onClose} wide>
    <p>${control} becomes the ${words.of} the one that you choose. If that has one, both change places.</p>
    <ul class="thumbs">
      ${images.map(
        (image) => html`<li key=${image.file}>
          <button type="button" class="picture"
              onClick=${() => {
                onClose();
                onMove(control, image.file);
              }}>
            <img src=${address(["datasets", dataset, "images", image.file], { width: 256 })} alt="" loading="lazy" />
            <span>${image.file}</span>
          </button>
        </li>`,
      )}
    </ul>
  <//>`;
}
