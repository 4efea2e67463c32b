// The other picture of a pair, such as that before an edit: moved to another photo, replaced, removed.
import { address } from "../lib/api.mjs";
import { html, useRef } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { filesOfInput, useAccept } from "../lib/uploads.mjs";
import { Dialog } from "./basics.mjs";
import { Icon } from "./icons.mjs";

/** What the pictures of pairs are called, by the setting pairs. */
export const PAIRS = {
  none: {
    other: t`“before”`,
    of: t`“before” of`,
    others: t`pictures before`,
    main: t`pictures after`,
    zones: [
      [t`Before`, t`Same file names on both sides.`],
      [t`After`, t`With captions that say what to change.`],
    ],
  },
  slider: {
    other: t`opposite`,
    of: t`opposite of`,
    others: t`opposites`,
    main: t`pictures`,
    zones: [
      [t`Less of it`, t`For example: young. Same file names on both sides.`],
      [t`More of it`, t`For example: old. Captions say what both show.`],
    ],
  },
  dpo: {
    other: t`worse one`,
    of: t`worse one of`,
    others: t`worse ones`,
    main: t`better ones`,
    zones: [
      [t`Worse`, t`Same file names on both sides.`],
      [t`Better`, t`With captions of both.`],
    ],
  },
};

/**
 * What is done with the picture before of a photo, or with one that belongs to none.
 *
 * @param {Props<{ controls: Api.ControlRow[] }>} props
 *   `image`: the trained picture, null for others that belong to none
 *   `words`: of `PAIRS`
 *   `actions`: {choose(files, image), remove(control), move(control)}
 */
export function Before({ image, controls, words, actions }) {
  const input = useRef(null);
  const accept = useAccept();
  const chosen = (event) => {
    actions.choose(filesOfInput(event.currentTarget), image.file);
    event.currentTarget.value = "";
  };
  return html`<div class="actions">
    ${
      image &&
      html`
        <button type="button" class="button small"
            aria-label=${t`${controls.length ? t`Replace` : t`Add`} the ${words.of} ${image.file}`}
            onClick=${() => input.current.click()}>
          ${controls.length ? t`Replace` : t`Add`} the ${words.other}
        </button>
        <input ref=${input} type="file" accept=${accept} hidden onChange=${chosen} />
      `
    }
    ${controls
      .filter((one) => !one.fixed)
      .map(
        ({ file }) => html`
          <button type="button" class="button small" aria-label=${t`Move it to another picture: ${file}`}
              onClick=${() => actions.move(file)}>
            <${Icon} name="swap" />Move it
          </button>
          <button type="button" class="button small" aria-label=${t`Remove it, the ${words.other}: ${file}`}
              onClick=${() => actions.remove(file)}>
            <${Icon} name="trash" />Remove it
          </button>
        `,
      )}
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
