// Beside the contact sheet: what the pictures are of, what is said of the chosen ones, and what is done with all.
import { useConflicts, useDraft } from "../lib/drafts.mjs";
import { html, useState } from "../lib/html.mjs";
import { textsOf } from "../lib/json_caption.mjs";
import { t } from "../lib/language.mjs";
import { KINDS, preserving } from "../lib/kinds.mjs";
import { counted, isTagged, withTag } from "../lib/tags.mjs";
import { count } from "../lib/words.mjs";
import { Button, Choices, Elsewhere, Field } from "./basics.mjs";
import { Before } from "./before.mjs";
import { Caption } from "./caption.mjs";
import { Icon } from "./icons.mjs";
import { removedBy } from "./remarks.mjs";
import { Chips, TagList } from "./tags.mjs";

/** A text of the draft, with what another page has typed meanwhile. */
export function DraftText({ dataset, name, what, attributes, onInput }) {
  const [draft, change] = useDraft(dataset);
  const [theirs, choose] = useConflicts(dataset);
  return html`
    <input ...${attributes} type="text" value=${draft[name]}
      onInput=${({ currentTarget: { value } }) => change({ [name]: value, ...onInput?.(value) })} />
    ${
      name in theirs &&
      html`<${Elsewhere} there=${theirs[name]} what=${what} onChoose=${(isMine) => choose(name, isMine)} />`
    }
  `;
}

/** What the LoRA is called. @param such what it is called if nobody says */
export const Named = ({ dataset, such }) => html`<span class="sheet-name">
  <${DraftText} dataset=${dataset} name="name" what="name"
    attributes=${{ "aria-label": t`Name of the LoRA`, title: t`Name of the LoRA`, maxlength: 64, placeholder: such }} />
</span>`;

/** The question of what the pictures are of, and what that asks for. */
export function What({ dataset, draft, kind, change, onAnswer }) {
  const { ask, such, help, isPairs } = KINDS[kind] ?? KINDS.thing;
  const isKept = draft.settings.preserve === "class";
  const kept = preserving(draft, true).preserve_class;
  return html`
    <h2>What is it?</h2>
    <${Choices} label="What is it?" icons value=${kind} onChange=${onAnswer}
      options=${Object.entries(KINDS).map(([value, { title, icon }]) => ({ value, title, icon }))} />
    ${
      kind === "edit" &&
      html`<label class="check">
        <input type="checkbox" checked=${draft.settings.pairs === "dpo"}
          onChange=${({ currentTarget }) => {
            const { pairs, ...others } = draft.settings;
            change({ settings: currentTarget.checked ? { ...others, pairs: "dpo" } : others });
          }} />
        They are worse and better ones: teach what is better
      </label>`
    }
    <${Field} label=${ask} optional=${isPairs} help=${help}>
      ${(attributes) => html`<${DraftText} dataset=${dataset} name="trigger" what="trigger word"
        attributes=${{ ...attributes, maxlength: 200, autocapitalize: "off", placeholder: such }}
        onInput=${(trigger) => isKept && { settings: preserving({ ...draft, trigger }, true) }} />`}
    <//>
    ${
      KINDS[kind]?.teaches === "subject" &&
      kept &&
      html`<label class="check">
        <input type="checkbox" checked=${isKept}
          onChange=${({ currentTarget }) => change({ settings: preserving(draft, currentTarget.checked) })} />
        <span>Keep others of “${kept}” as they were <span class="faint">(takes twice as long)</span></span>
      </label>`
    }
  `;
}

/**
 * What is said of the chosen photos, and what is done with them.
 *
 * @param {Props<{ item: { image: Api.PictureRow, picture: string }, files: string[] }>} props
 *   `item`: the one that is looked at, `files` all that are chosen
 *   `actions`: {leaveOut(), enter(mode), choose(files, image), move(control), remove(control), removeMask(image)}
 */
export function ChosenPhotos(props) {
  const { draft, item, files, photos, captions, check, words, isEdited, canChange, isLarge, actions } = props;
  const { image } = item;
  const [added, setAdded] = useState("");
  if (item.picture)
    return html`<div class="panel-part">
      <p>${image.file} is left out.</p>
      <div class="actions"><${Key} name="X" onClick=${actions.leaveOut}>Bring it back<//></div>
    </div>`;
  const some = photos.images.filter((one) => files.includes(one.file));
  if (some.length > 1)
    return html`<div class="panel-part">
      <h2>${count(some.length, "photo")} chosen</h2>
      ${
        canChange &&
        html`
          <form class="add-tag"
              onSubmit=${(event) => {
                event.preventDefault();
                if (!added.trim()) return;
                const texts = some.filter((one) => isTagged(captions.captionOf(one)));
                captions.changeTags(
                  Object.fromEntries(texts.map((one) => [one.file, withTag(captions.captionOf(one), added)])),
                  t`“${added}” was added to ${count(texts.length, "caption")}.`,
                );
                setAdded("");
              }}>
            <input type="text" aria-label="Words to add to all of them" placeholder="Words to add to all of them"
              value=${added} onInput=${(event) => setAdded(event.currentTarget.value)} />
            <button type="submit" class="button small" aria-disabled=${added.trim() ? undefined : "true"}>Add</button>
          </form>
          <div class="actions"><${Key} name="X" onClick=${actions.leaveOut}>Leave them out<//></div>
        `
      }
    </div>`;
  const { trained, tokens } = check.check?.images[image.file] ?? {};
  const caption = captions.captionOf(image);
  const problems = check.problemsOf(image);
  return html`<div class="panel-part">
    <h2>Words for the chosen photo</h2>
    ${
      problems.length > 0 &&
      html`<ul class="problems" aria-label="Hints">${problems.map((text) => html`<li key=${text}>${text}</li>`)}</ul>`
    }
    ${
      canChange
        ? html`
          <${Caption} key=${image.file} name=${image.file} caption=${caption} trigger=${draft.trigger}
            isEdited=${isEdited} onCaption=${(text, seen) => captions.storeTyped(image, text, seen)} />
          ${
            textsOf(caption) === null &&
            html`<details>
              <summary>Tags</summary>
              <${Chips} key=${`tags ${image.file}`} name=${image.file} caption=${caption}
                known=${counted(photos.images.map(captions.captionOf)).map(([name]) => name)}
                onCaption=${(text) =>
                  captions.changeTags({ [image.file]: text }, t`The tags of ${image.file} were changed.`)} />
            </details>`
          }
        `
        : html`<p>${caption || t`No words`}</p>`
    }
    <p class="faint photo-facts" title=${image.file}>
      <span class="clip">${image.file}</span>${image.crop ? t` · cropped` : ""}
      ${image.width ? ` · ${image.width} × ${image.height}` : ""}
      ${trained ? t` · trained at ${trained[0]} × ${trained[1]}` : ""}${tokens ? ` · ${count(tokens, "token")}` : ""}
    </p>
    ${
      canChange &&
      html`<div class="actions">
        ${!isLarge && html`<${Key} name="Enter" onClick=${() => actions.enter("large")}>Large<//>`}
        <${Key} name="X" onClick=${actions.leaveOut}>Leave out<//>
        ${
          image.width &&
          html`
            <${Key} name="C" onClick=${() => actions.enter("crop")}>Crop<//>
            <${Key} name="M" onClick=${() => actions.enter("mask")}>${image.mask ? t`Change the mask` : t`Mask`}<//>
          `
        }
      </div>`
    }
    ${image.mask && html`<${MaskWords} ...${props} image=${image} />`}
    ${
      words &&
      canChange &&
      html`<${Before} image=${image} controls=${image.controls} words=${words} actions=${actions} />`
    }
  </div>`;
}

/** Whether the mask of a photo is used. */
function MaskWords({ draft, image, canChange, change, actions }) {
  const isUsed = draft.settings.masks === "files";
  return html`
    <label class="check">
      <input type="checkbox" checked=${isUsed}
        onChange=${({ currentTarget }) => {
          const { masks, ...others } = draft.settings;
          change({ settings: currentTarget.checked ? { ...others, masks: "files" } : others });
        }} />
      Learn only what the masks leave bright
    </label>
    ${
      canChange &&
      html`<div class="actions">
        <${Button} class="small" onClick=${() => actions.removeMask(image)}>
          <${Icon} name="trash" />Remove the mask
        <//>
      </div>`
    }
  `;
}

/** A button with the key that does the same. */
const Key = ({ name, children, onClick }) => html`<button type="button" class="button small keyed" onClick=${onClick}>
  <kbd aria-hidden="true">${name}</kbd>${children}
</button>`;

/** What is done with the words of all photos, and how many photos these are. */
export function AllPhotos({ images, check, captions, captioned, filter, canChange, onOpen, kind }) {
  const alike = (check?.findings ?? []).filter((one) => one.kind === "copies" || one.kind === "look-alikes");
  const number = images.length - removedBy(alike).filter((file) => images.some((one) => one.file === file)).length;
  const enough = KINDS[kind]?.enough ?? 10;
  const isFewer = number < images.length;
  const some = KINDS[kind]?.isPairs
    ? isFewer
      ? count(number, "different pair")
      : count(number, "pair")
    : isFewer
      ? count(number, "different photo")
      : count(number, "photo");
  return html`<div class="panel-part">
    <h2>All photos</h2>
    <p class="faint" role="status">${captioned} of ${images.length} with a caption</p>
    ${
      canChange &&
      html`<div class="actions">
        <${Button} class="small" onClick=${() => onOpen("captions")}>Write captions<//>
        <${Button} class="small" onClick=${() => onOpen("replace")}>Find and replace in captions<//>
        <${Button} class="small" onClick=${() => onOpen("clear")}>Remove all<//>
      </div>`
    }
    <${TagList} images=${images} captionOf=${captions.captionOf} chosen=${filter.tag} onChoose=${filter.setTag}
      onChange=${canChange ? captions.changeTags : null} />
    <p class="faint">
      ${
        number >= enough
          ? t`${some} are a good start.`
          : t`${some}: it works with a few, and better with ${enough} or more.`
      }
    </p>
  </div>`;
}
