// Find and replace in all captions.
import { html, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { count } from "../lib/words.mjs";
import { Button, Dialog, Field, Problem } from "./basics.mjs";

/** @param {Props<{ images: Api.PictureRow[] }>} props */
export function Replace({ images, captionOf, onReplace, onClose }) {
  const [find, setFind] = useState("");
  const [put, setPut] = useState("");
  const [exact, setExact] = useState(false);
  const [error, setError] = useState(null);
  const changed = replaced(images, captionOf, find, put, exact);
  const number = Object.keys(changed).length;
  const apply = async () => {
    try {
      await onReplace(changed);
      onClose();
    } catch (failure) {
      setError(failure);
    }
  };
  const sample = images.find((one) => one.file in changed);
  return html`<${Dialog} title="Find and replace" onClose=${onClose}>
    <form
        onSubmit=${(event) => {
          event.preventDefault();
          if (number) apply();
        }}>
      <${Field} label="Find">
        ${(attributes) => html`<input ...${attributes} type="text" value=${find} autofocus
          onInput=${(event) => setFind(event.currentTarget.value)} />`}
      <//>
      <${Field} label="Replace with" help="Empty to remove it.">
        ${(attributes) => html`<input ...${attributes} type="text" value=${put}
          onInput=${(event) => setPut(event.currentTarget.value)} />`}
      <//>
      <label class="check">
        <input type="checkbox" checked=${exact} onChange=${(event) => setExact(event.currentTarget.checked)} /> Capital
        letters matter
      </label>
      <p role="status" class="faint">
        ${find ? t`In ${count(number, "caption")}.` : t`It searches the captions of all photos.`}
      </p>
      ${
        sample &&
        html`<p class="sample"><del>${captionOf(sample)}</del><ins>${changed[sample.file] || "(empty)"}</ins></p>`
      }
      <${Problem} error=${error} />
      <div class="actions end">
        <${Button} onClick=${onClose}>Cancel<//>
        <button type="submit" class="button primary" aria-disabled=${number ? undefined : "true"}>Replace</button>
      </div>
    </form>
  <//>`;
}

/** The captions that change, by file. */
export function replaced(images, captionOf, find, put, exact) {
  if (!find) return {};
  const pattern = new RegExp(find.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), exact ? "gu" : "giu");
  const changed = {};
  for (const image of images) {
    const before = captionOf(image);
    const after = before
      .replace(pattern, () => put)
      .replace(/ {2,}/g, " ")
      .trim();
    if (after !== before.trim() && before.search(pattern) >= 0) changed[image.file] = after;
  }
  return changed;
}
