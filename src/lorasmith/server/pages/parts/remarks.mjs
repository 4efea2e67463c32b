// What is remarked about the photos: a chip each, and in words for the one that is chosen; what mends it can be undone.
import { html } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { useStore } from "../lib/stores.mjs";
import { canDrop, leftOut } from "../lib/uploads.mjs";
import { count, whole } from "../lib/words.mjs";
import { Button } from "./basics.mjs";

const LISTED = 12; // files that cannot be used, and reasons
const NAMED = 3;
// Kinds whose photos are left out by choice, not by "Fix all".
const CHOSEN = ["odd ones out", "tiny pictures", "blurred pictures"];
const GRAVITY = ["problem", "warning", "remark"];

const named = (files) => {
  if (files.length > NAMED + 1) return t`${files.slice(0, NAMED).join(", ")} and ${files.length - NAMED} others`;
  return files.length < 2 ? files.join("") : t`${files.slice(0, -1).join(", ")} and ${files.at(-1)}`;
};

/** By kind of the finding: what its chip says, and what is better than its message; {number} is that of photos. */
const WORDS = {
  "empty pictures": [t`{number} empty`],
  "tiny pictures": [
    t`{number} tiny`,
    (files) =>
      files.length === 1
        ? t`${files[0]} is tiny and will look blurred.`
        : t`${named(files)} are tiny and will look blurred.`,
  ],
  "enlarged pictures": [
    t`{number} small`,
    (files) =>
      files.length === 1
        ? t`${files[0]} is small and will be a little soft.`
        : t`${named(files)} are small and will be a little soft.`,
  ],
  "blurred pictures": [
    t`{number} blurred`,
    (files) =>
      files.length === 1
        ? t`${files[0]} is blurred, which is learnt, too.`
        : t`${named(files)} are blurred, which is learnt, too.`,
  ],
  "cut pictures": [t`{number} cut`, (files) => t`${named(files)} will lose their edges. Crop them to what matters.`],
  copies: [t`{number} twice`, () => t`These are in the set already. Keep one of each.`],
  "look-alikes": [
    t`{number} alike`,
    () => t`Nearly the same as another one. Keep one, unless the difference matters to you.`,
  ],
  "much alike": [t`Much alike`],
  "odd ones out": [t`{number} different`, () => t`Do these show the same as the others?`],
  "unchanged pairs": [t`{number} unchanged`],
  "swapped pairs": [t`{number} swapped?`],
  "other aspects": [t`{number} of another shape`],
  "missing captions": [
    t`{number} without words`,
    (files) =>
      files.length === 1
        ? t`${files[0]} is without words. Say what it shows.`
        : t`${named(files)} are without words. Say what each shows.`,
  ],
  "empty captions": [t`{number} with empty words`],
  "equal captions": [t`{number} with the same words`, () => t`Say in each what only that picture shows.`],
  "long captions": [t`{number} too long`],
  "broken captions": [t`{number} with broken JSON`],
  "known trigger": [t`A known word`],
  "dropped captions": [t`Few words`],
  "shared tags": [t`Shared tags`],
};
const CHANGES = /^(make|turn|change|add|remove|convert|replace|put|transform|give)\b/i; // captions that name a change

/**
 * The remarks: [{kind, chip, text, severity, files, removes, details}], the gravest first.
 *
 * @param {Props<{ check: Api.DataCheckAnswer | null, images: Api.PictureRow[] }>} props
 *   `isNameless`: whether neither captions nor a trigger name the subject
 *   `words`: of `PAIRS` for pairs, else null
 *   `taker`: the model that takes no pictures before an edit though there are some; empty if it does
 *   `isSlider`: whether strength is to do what captions must then not say
 */
export function remarksOf({ check, images, captionOf, isNameless, words, taker, isSlider }) {
  const found = [];
  if (isNameless)
    found.push({
      chip: t`No name yet`,
      severity: "problem",
      text: t`What will you call it in prompts? Answer that, or say in words what each photo shows.`,
    });
  const lacking = words ? images.filter((one) => !one.controls.length).map((one) => one.file) : [];
  if (lacking.length)
    found.push({
      chip: t`${lacking.length} without ${words.other}`,
      severity: "problem",
      files: lacking,
      text:
        t`${count(lacking.length, "picture has", "pictures have")} no ${words.other} yet.` +
        (canDrop ? t` Drop them on the left.` : t` Add them on the left.`),
    });
  if (taker)
    found.push({
      chip: t`Cannot edit`,
      severity: "problem",
      text: t`${taker} cannot edit pictures. Choose one that can, make it a slider, or train on “after” alone.`,
    });
  const asking = isSlider ? images.filter((one) => CHANGES.test(captionOf(one))).map((one) => one.file) : [];
  if (asking.length)
    found.push({
      chip: t`${asking.length} name the change`,
      severity: "warning",
      files: asking,
      text: t`Say what both pictures show: the strength of the LoRA makes the change, not its words.`,
    });
  const skipped = check?.skipped ?? [];
  for (const one of check?.findings ?? []) {
    if (one.kind === "missing controls") continue; // said above, at once
    if (isNameless && one.kind === "missing captions") continue;
    const [chip, text] = WORDS[one.kind] ?? [];
    const number = one.files.length || skipped.length;
    found.push({
      ...one,
      chip:
        one.kind === "unused files" ? t`${number} not used` : (chip ?? one.title).replace("{number}", String(number)),
      text: text?.(one.files) ?? one.message,
      details: one.kind === "unused files" ? skipped : [],
    });
  }
  return found.sort((a, b) => GRAVITY.indexOf(a.severity) - GRAVITY.indexOf(b.severity));
}

/** The photos that "Fix all" removes. */
export const removedBy = (remarks) => [...new Set(remarks.flatMap((one) => one.removes ?? []))];

/**
 * @param {Props<{ number: number }>} props
 *   `number`: of photos
 *   `remarks`: of `remarksOf`
 *   `chosen`: the remark whose photos are shown, in words below the chips; null for none
 *   `check`: of `useCheck`
 *   `onFix`: called with remarks whose photos are to be removed; null where nothing can be changed
 *   `onChoose`: called with a remark, or null
 *   `onCaption`: opens the dialog that writes captions; null where nothing can be changed
 */
export function Remarks({ dataset, remarks, number, chosen, check, onFix, onChoose, onCaption }) {
  const files = useStore(leftOut)[dataset] ?? [];
  const shown =
    chosen?.chip === "not added" ? (files.length ? chosen : null) : remarks.find((one) => one.chip === chosen?.chip);
  const fixable = removedBy(remarks);
  const toggle = (one) => onChoose(one.chip === shown?.chip ? null : one);
  const chip = (
    one,
    text = one.chip,
  ) => html`<button type="button" key=${one.chip} class=${`chip ${one.severity === "remark" ? "" : "fair"}`}
      aria-pressed=${one.chip === shown?.chip ? "true" : "false"} onClick=${() => toggle(one)}>
    ${text}
  </button>`;
  const leave = shown && onFix && (CHOSEN.includes(shown.kind) ? shown.files : shown.removes);
  return html`
    ${remarks.map((one) => chip(one))}
    ${files.length > 0 && chip({ chip: "not added", severity: "remark" }, t`${count(files.length, "file")} not added`)}
    ${
      onFix &&
      fixable.length > 0 &&
      html`<${Button} class="small" busyText="Leaving out…" onClick=${() => onFix(remarks)}>
        Fix all: leave out ${count(fixable.length, "photo")}
      <//>`
    }
    ${
      check.checking &&
      html`<span class="faint" role="status">
        Checking photos: ${whole(check.checking.done)} of ${whole(check.checking.total)}…
      </span>`
    }
    ${check.error && html`<span class="faint">The photos were not checked. ${check.error.message}</span>`}
    ${
      number > 0 &&
      check.check &&
      !remarks.length &&
      html`<span class="unseen" role="status">Nothing to mend in these photos.</span>`
    }
    ${
      shown &&
      html`<div class="remark" role="status">
        ${
          shown.chip === "not added"
            ? html`
              <ul class="file-list">${reasonsOf(files)}</ul>
              <${Button} class="small" aria-label="Close the list of files that were not added"
                  onClick=${() => {
                    leftOut.set((all) => ({ ...all, [dataset]: [] }));
                    onChoose(null);
                  }}>
                Close
              <//>
            `
            : html`
              <span>${shown.text}</span>
              ${
                shown.details?.length > 0 &&
                html`<ul class="file-list">
                  ${shown.details
                    .slice(0, LISTED)
                    .map((file) => html`<li key=${file.file}>${file.file} cannot be used: ${file.reason}</li>`)}
                  ${shown.details.length > LISTED && html`<li>and ${shown.details.length - LISTED} more</li>`}
                </ul>`
              }
              ${
                leave?.length > 0 &&
                html`<${Button} class="small" onClick=${() => onFix([{ ...shown, removes: leave }])}>
                  Leave out ${leave.length}
                <//>`
              }
              ${
                onCaption &&
                shown.kind === "missing captions" &&
                html`<${Button} class="small" onClick=${onCaption}>Write captions<//>`
              }
              ${shown.files?.length > 0 && html`<${Button} class="small" onClick=${() => onChoose(null)}>Show all<//>`}
            `
        }
      </div>`
    }
  `;
}

/** The files that were not added, by reason. */
const reasonsOf = (files) =>
  [...Map.groupBy(files, ({ reason }) => reason)].slice(0, LISTED).map(
    ([reason, [first, ...others]]) => html`<li key=${reason}>
      <b>${first.name}</b> ${reason}${reason.endsWith(".") ? "" : "."}
      ${others.length > 0 && html` <span class="faint">Also ${named(others.map(({ name }) => name))}.</span>`}
    </li>`,
  );
