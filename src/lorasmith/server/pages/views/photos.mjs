// The photos of a LoRA: what they show, their captions, what is wrong with them, and what of them is trained.
import { get } from "../lib/api.mjs";
import { useConflicts, useDraft } from "../lib/drafts.mjs";
import { html, useState } from "../lib/html.mjs";
import { go } from "../lib/router.mjs";
import { say, useStore } from "../lib/stores.mjs";
import { counted } from "../lib/tags.mjs";
import { doneTo, undoLast } from "../lib/undo.mjs";
import { forget } from "../lib/uploads.mjs";
import { capital, count, slug } from "../lib/words.mjs";
import { Button, Elsewhere, Field, Loading, Problem, Question, useLoaded } from "../parts/basics.mjs";
import { Before, MoveControl, PAIRS } from "../parts/before.mjs";
import { CaptionDialog, CaptioningState } from "../parts/captioning.mjs";
import { DropZone } from "../parts/drop_zone.mjs";
import { LeftOut } from "../parts/left_out.mjs";
import { PhotoEditor } from "../parts/photo_editor.mjs";
import { changesOf, useCaptions, useCheck, useFilter, usePhotos, useUndoKey } from "../parts/photo_hooks.mjs";
import { PhotoTile } from "../parts/photo_tile.mjs";
import { Remarks, remarksOf, removedBy } from "../parts/remarks.mjs";
import { Replace } from "../parts/replace.mjs";
import { NextBar, Stepper } from "../parts/stepper.mjs";
import { TagList } from "../parts/tags.mjs";
import { takesControls } from "./model.mjs";

const FEW = 5;

/** @param edited the picture whose caption has the focus at first */
export function PhotosView({ dataset, edited }) {
  const [draft, change] = useDraft(dataset);
  const photos = usePhotos(dataset);
  const captions = useCaptions(photos);
  const check = useCheck(photos, captions.captions, draft);
  const filter = useFilter(photos.images, captions.captionOf, check.problemsOf);
  const [crops, setCrops] = useState(true);
  const [opened, open] = useState(null); // the dialog that is open: {name, file}
  const [listed] = useLoaded(async (signal) => (draft.model ? get(["models"], {}, signal) : null), [draft.model]);
  useUndoKey(dataset);

  const { found, images, controls, onTheWay, underway, canChange } = photos;
  const model = listed?.models.find((one) => one.name === draft.model);
  const takes = model ? takesControls(model, draft) : false;
  const isPairs = draft.pairs ?? (controls.length > 0 || takes);
  const words = PAIRS[draft.settings.pairs] ?? PAIRS.none;
  const changes = changesOf(photos, words, (before, now) =>
    open((shown) => (shown?.file === before ? { ...shown, file: now } : shown)),
  );
  const captioned = images.filter((one) => captions.captionOf(one).trim()).length;
  const total = images.length + onTheWay.length;
  const remarks = remarksOf({
    check: check.check,
    isNameless: !captioned && !draft.trigger.trim(),
    lack: words.lack,
    lacking: isPairs ? images.filter((one) => !one.controls.length).map((one) => one.file) : [],
    taker: controls.length > 0 && model && words === PAIRS.none && !takes ? model.title : "",
  });

  /** Removes what remarks say should be: everything that they name, in one step. */
  function fix(some) {
    const there = (files) => files.filter((file) => images.some((one) => one.file === file));
    const files = there(removedBy(some));
    if (!files.length) return say("These photos are not here any more.");
    filter.setRemark(null);
    const kinds = some
      .map((one) => [one.title.toLowerCase(), there(one.removes ?? []).length])
      .filter(([, number]) => number)
      .map(([title, number]) => `${title} (${number})`);
    const moved = `${count(files.length, "photo was", "photos were")} moved to the removed files`;
    return changes.drop(files, `${moved}: ${kinds.join(", ")}.`);
  }

  const shared = { dataset, draft, photos, captions, check, filter, changes, words, isPairs, open };
  return html`
    <${Stepper} at="photos" dataset=${dataset} />
    <section>
      <h1>Your photos</h1>
      <${Names} dataset=${dataset} />
    </section>
    <section aria-labelledby="photos">
      <div class="head">
        <h2 id="photos">${total ? count(total, "photo") : "Photos"}</h2>
        <span class="faint" role="status">
          ${
            underway
              ? `${count(underway, "photo")} on the way…`
              : images.length > 0 && `${captioned} of ${images.length} with a caption`
          }
        </span>
      </div>
      ${
        found?.builtin
          ? html`<p class="faint">These pictures belong to Lorasmith, to try it with; they cannot be changed.</p>`
          : html`
            <${DropZone} onFiles=${changes.take} pairs=${isPairs ? words : null} />
            <${Kind} draft=${draft} isPairs=${isPairs} onChange=${change} />
          `
      }
      <${Problem} error=${photos.error} onRetry=${photos.reload} />
      ${!found && !photos.error && html`<${Loading} what="photos" />`}
      <${LeftOut} dataset=${dataset} />
      <${CaptioningState} dataset=${dataset}
        onUndo=${(written) => captions.store(partOf(written, "before"), partOf(written, "caption"))} />
      <${Remarks} dataset=${dataset} remarks=${remarks} images=${images} isChecked=${Boolean(check.check)}
        error=${check.error} checking=${check.checking} onFix=${canChange ? fix : null} onShow=${filter.setRemark}
        onCaption=${canChange ? () => open({ name: "captions" }) : null} />
      ${images.length > 0 && html`<${Tools} ...${shared} crops=${crops} onCrops=${setCrops} />`}
      <${PhotoList} ...${shared} crops=${crops} edited=${edited} />
    </section>
    ${opened && html`<${Opened} ...${shared} opened=${opened} lacking=${images.length - captioned} />`}
    <${NextBar} note=${noteOf(total, underway)}>
      <a class="button" href="#/">Back</a>
      <${Button} kind="primary" disabled=${!images.length || underway > 0}
          onClick=${() => go("new", dataset, "model")}>
        Next: model
      <//>
    <//>
  `;
}

/** What the LoRA and its subject are called. */
function Names({ dataset }) {
  const [draft, change] = useDraft(dataset);
  const [theirs, choose] = useConflicts(dataset);
  const input = (name, what, attributes) => html`
    <input ...${attributes} type="text" value=${draft[name]}
      onInput=${(event) => change({ [name]: event.currentTarget.value })} />
    ${
      name in theirs &&
      html`<${Elsewhere} there=${theirs[name]} what=${what} onChoose=${(isMine) => choose(name, isMine)} />`
    }
  `;
  return html`<div class="fields two">
    <${Field} label="Name of the LoRA" help="The file and its folder are called so.">
      ${(attributes) =>
        input("name", "name", { ...attributes, maxlength: 64, placeholder: slug(draft.trigger) || dataset })}
    <//>
    <${Field} label="Trigger word" optional
        help="Words that will call up what the photos show, such as “milo cat”. Put them into your prompts later.">
      ${(attributes) => input("trigger", "trigger word", { ...attributes, maxlength: 200, autocapitalize: "off" })}
    <//>
  </div>`;
}

/** Whether the photos are pairs, and what these teach. */
const Kind = ({ draft, isPairs, onChange }) => html`
  <label class="check">
    <input type="checkbox" checked=${isPairs}
      onChange=${(event) => onChange({ pairs: event.currentTarget.checked, settings: taught(draft, "none") })} />
    These are pairs: two pictures of each name
  </label>
  ${
    isPairs &&
    html`<${Field} label="What they teach">
      ${(attributes) => html`<select ...${attributes} value=${draft.settings.pairs ?? "none"}
          onChange=${(event) => onChange({ pairs: true, settings: taught(draft, event.currentTarget.value) })}>
        ${Object.entries(PAIRS).map(
          ([name, { title }]) => html`<option key=${name} value=${name}>${capital(title)}</option>`,
        )}
      </select>`}
    <//>`
  }
`;

/** What is done with all photos, and which of them are shown. */
function Tools({ dataset, photos: { images, canChange }, captions, filter, open, crops, onCrops }) {
  const last = useStore(doneTo(dataset)).at(-1);
  const { shown, odd, onlyOdd, setOnlyOdd, remark, setRemark, tag, setTag } = filter;
  const all = () => {
    setRemark(null);
    setTag(null);
  };
  return html`
    <div class="tools">
      ${
        canChange &&
        html`
          <${Button} class="small" onClick=${() => open({ name: "captions" })}>Write captions<//>
          <${Button} class="small" onClick=${() => open({ name: "replace" })}>Find and replace in captions<//>
          <${Button} class="small" onClick=${() => open({ name: "clear" })}>Remove all<//>
          <${Button} class="small" disabled=${!last} title=${last?.text} aria-label="Undo the last change"
              onClick=${() => undoLast(dataset)}>
            Undo
          <//>
        `
      }
      <label class="check">
        <input type="checkbox" checked=${crops} onChange=${(event) => onCrops(event.currentTarget.checked)} />
        Show what is trained
      </label>
      ${
        odd.length > 0 &&
        html`<label class="check">
          <input type="checkbox" checked=${onlyOdd} onChange=${(event) => setOnlyOdd(event.currentTarget.checked)} />
          Only the ${count(odd.length, "photo")} with remarks
        </label>`
      }
    </div>
    <${TagList} images=${images} captionOf=${captions.captionOf} chosen=${tag} onChoose=${setTag}
      onChange=${canChange ? captions.changeTags : null} />
    ${
      (remark || tag !== null) &&
      html`<p class="filtered" role="status">
        Shown: ${count(shown.length, "photo")}${remark ? ` of “${remark.title}”` : ""}
        ${tag !== null ? ` with the tag “${tag}”` : ""}.
        <button type="button" class="as-link" onClick=${all}>Show all</button>
      </p>`
    }
  `;
}

/** The photos, those on their way first, each with its picture before; and such pictures that belong to none. */
function PhotoList({ dataset, draft, photos, captions, check, filter, changes, words, isPairs, open, crops, edited }) {
  const { stray, onTheWay, previews, version, canChange } = photos;
  const actions = canChange
    ? {
        pair: changes.pair,
        remove: changes.removeControl,
        move: (file) => open({ name: "move", file }),
        choose: changes.take,
      }
    : null;
  const before = (image, controls) => html`<${Before} dataset=${dataset} image=${image} controls=${controls}
    version=${version} words=${words} actions=${actions} />`;
  return html`
    <ul class=${`tiles ${isPairs ? "pairs" : ""}`}>
      ${onTheWay.map(
        (entry) => html`<${PhotoTile} key=${`sent ${entry.key}`} upload=${entry}
          onRemove=${() => forget(dataset, entry.key)} />`,
      )}
      ${filter.shown.map(
        (image) => html`<${PhotoTile} key=${image.file} dataset=${dataset} image=${image}
          preview=${previews.get(image.file)?.preview} caption=${captions.captionOf(image)}
          problems=${check.problemsOf(image)} facts=${crops ? check.check?.images[image.file] : null}
          trigger=${draft.trigger} usesMasks=${draft.settings.masks === "files"} isFixed=${!canChange}
          isEdited=${image.file === edited} onCaption=${(caption, seen) => captions.storeTyped(image, caption, seen)}
          onRemove=${() => changes.dropOne(image)} onOpen=${() => open({ name: "photo", file: image.file })}
          before=${isPairs ? before(image.file, image.controls) : null} />`,
      )}
    </ul>
    ${
      isPairs &&
      stray.length > 0 &&
      html`
        <h3>${capital(words.others)}, without ${words === PAIRS.none ? "one after" : "a picture"}</h3>
        <p class="faint">
          Drag each onto the picture that it belongs to, or press ⇄. What stays here is not trained on.
        </p>
        <ul class="tiles">
          ${stray.map(
            (one) => html`<li class="tile" key=${one.file}>
              ${before(null, [one])}
              <p class="tile-name"><span class="clip" title=${one.file}>${one.file}</span></p>
            </li>`,
          )}
        </ul>
      `
    }
  `;
}

/** The dialog that is open. */
function Opened({ dataset, draft, photos, captions, check, filter, changes, words, open, opened, lacking }) {
  const { images, canChange } = photos;
  const last = useStore(doneTo(dataset)).at(-1);
  const close = () => open(null);
  const editing = {
    caption: captions.storeTyped,
    crop: changes.crop,
    remove: changes.dropOne,
    undo: () => undoLast(dataset),
    tags: ({ file }, text) => captions.changeTags({ [file]: text }, `The tags of ${file} were changed.`),
  };
  switch (opened.name) {
    case "photo":
      return html`<${PhotoEditor} dataset=${dataset} file=${opened.file}
        images=${filter.shown.some((one) => one.file === opened.file) ? filter.shown : images}
        captionOf=${captions.captionOf} facts=${check.check?.images ?? {}} problemsOf=${check.problemsOf}
        trigger=${draft.trigger} known=${counted(images.map(captions.captionOf)).map(([name]) => name)} undo=${last}
        onClose=${close}
        actions=${{ show: (file) => open({ name: "photo", file }), ...(canChange ? editing : {}) }} />`;
    case "captions":
      return html`<${CaptionDialog} dataset=${dataset} number=${images.length} lacking=${lacking}
        trigger=${draft.trigger} onClose=${close} />`;
    case "clear":
      return html`<${Question} title="Remove these photos?" yes="Remove all" kind="danger" onClose=${close}
          onYes=${() => changes.removeAll(draft)}>
        <p>
          The folder <b>${dataset}</b> with ${count(images.length, "photo")} and their captions is moved to the
          removed files of Lorasmith. Nothing is deleted, and runs keep their LoRAs.
        </p>
      <//>`;
    case "move":
      return html`<${MoveControl} dataset=${dataset} control=${opened.file} images=${images} words=${words}
        onMove=${changes.pair} onClose=${close} />`;
    default:
      return html`<${Replace} images=${images} captionOf=${captions.captionOf} onReplace=${captions.replaceAll}
        onClose=${close} />`;
  }
}

/** Captions that were written, before or after that, by file. */
const partOf = (written, part) => Object.fromEntries(Object.entries(written).map(([file, one]) => [file, one[part]]));

/** The settings of a draft with what its pairs teach. */
const taught = (draft, pairs) =>
  Object.fromEntries([
    ...Object.entries(draft.settings).filter(([name]) => name !== "pairs"),
    ...(pairs === "none" ? [] : [["pairs", pairs]]),
  ]);

function noteOf(total, underway) {
  if (!total) return "Add photos to go on.";
  if (underway) return `${count(underway, "photo")} on the way…`;
  return total < FEW ? "It works with a few, and better with ten or more." : "";
}
