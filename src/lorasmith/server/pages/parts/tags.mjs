// Tags as chips: those of one caption, and those of all.
import { html, useId, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { counted, hasTag, isTagged, tagsOf, withTag, withoutTag } from "../lib/tags.mjs";
import { count } from "../lib/words.mjs";
import { Button } from "./basics.mjs";
import { Icon } from "./icons.mjs";

const SHOWN = 40;

/**
 * The tags of a caption, each with a cross, and a field that adds one.
 *
 * @param known tags of the other captions, which are suggested
 */
export function Chips({ name, caption, known, onCaption }) {
  const [added, setAdded] = useState("");
  const id = useId();
  const tags = tagsOf(caption);
  const add = (event) => {
    event.preventDefault();
    if (added.trim()) onCaption(withTag(caption, added));
    setAdded("");
  };
  if (caption.includes("\n")) return html`<p class="faint">These are several captions, a line each.</p>`;
  return html`<div class="chips-field">
    <ul class="chips" aria-label=${t`Tags of ${name}`}>
      ${tags.map(
        (tag, index) => html`<li class="chip" key=${`${index} ${tag}`}>
          <span>${tag}</span>
          <button type="button" aria-label=${t`Remove the tag ${tag}`}
              onClick=${() => onCaption(withoutTag(caption, tag))}>
            <${Icon} name="close" />
          </button>
        </li>`,
      )}
    </ul>
    <form class="add-tag" onSubmit=${add}>
      <label class="unseen" for=${id}>Add a tag</label>
      <input id=${id} type="text" list=${`${id}l`} value=${added} placeholder="Add a tag" autocapitalize="off"
        onInput=${(event) => setAdded(event.currentTarget.value)} />
      <datalist id=${`${id}l`}>
        ${known
          .filter((tag) => !hasTag(caption, tag))
          .slice(0, SHOWN)
          .map((tag) => html`<option key=${tag} value=${tag}></option>`)}
      </datalist>
      <button type="submit" class="button small" aria-disabled=${added.trim() ? undefined : "true"}>Add</button>
    </form>
  </div>`;
}

const captions = (some) => count(some.length, "caption");

/**
 * The tags of all captions, the most frequent first. A chosen one shows the photos that have it.
 *
 * @param {Props<{ images: Api.PictureRow[] }>} props
 *   `chosen`: the tag that is chosen, null for none
 *   `onChange`: called with {file: caption} of what changes, and a sentence; null where nothing can be changed
 */
export function TagList({ images, captionOf, chosen, onChoose, onChange }) {
  const [isWhole, setWhole] = useState(false);
  const all = counted(images.map(captionOf));
  if (!all.length) return null;
  const shown = isWhole ? all : all.slice(0, SHOWN);
  const having = chosen === null ? [] : images.filter((one) => hasTag(captionOf(one), chosen));
  const lacking =
    chosen === null ? [] : images.filter((one) => !hasTag(captionOf(one), chosen) && isTagged(captionOf(one)));
  const changed = (some, change) => Object.fromEntries(some.map((one) => [one.file, change(captionOf(one), chosen)]));
  return html`<details class="tag-list">
    <summary>${count(all.length, "tag")} in the captions</summary>
    <ul class="chips" aria-label="Tags of all captions">
      ${shown.map(
        ([tag, number]) => html`<li key=${tag}>
          <button type="button" class="chip"
              aria-pressed=${chosen !== null && tag.toLowerCase() === chosen.toLowerCase() ? "true" : "false"}
              onClick=${() => onChoose(tag === chosen ? null : tag)}>
            <span>${tag}</span> <span class="number">${number}</span>
          </button>
        </li>`,
      )}
    </ul>
    ${
      all.length > shown.length &&
      html`<p><button type="button" class="as-link" onClick=${() => setWhole(true)}>Show all ${all.length}</button></p>`
    }
    ${
      chosen !== null &&
      onChange &&
      html`<div class="actions">
        <${Button} class="small"
            onClick=${() =>
              onChange(changed(having, withoutTag), t`“${chosen}” was removed from ${captions(having)}.`)}>
          Remove it from ${captions(having)}
        <//>
        ${
          lacking.length > 0 &&
          html`<${Button} class="small"
              onClick=${() => onChange(changed(lacking, withTag), t`“${chosen}” was added to ${captions(lacking)}.`)}>
            Add it to the other ${lacking.length}
          <//>`
        }
      </div>`
    }
  </details>`;
}
