// What is remarked about the photos, in one card; and what mends it, which can be undone.
import { html } from "../lib/html.mjs";
import { capital, count, whole } from "../lib/words.mjs";
import { Button, Notice } from "./basics.mjs";
import { sourceOf } from "./photo_tile.mjs";

const STRIP = 6; // photos of a remark
const LISTED = 4; // files that cannot be used
const THUMBNAIL = 160;
const MOODS = { problem: "bad", warning: "fair", remark: "faint" };
// Kinds whose photos are left out by choice, not by "Fix all".
const CHOSEN = ["odd ones out", "tiny pictures", "blurred pictures"];
const GRAVITY = ["problem", "warning", "remark"];

/**
 * The remarks: [{title, text, severity, files, removes, details}], the gravest first.
 *
 * @param {Props<{ check: Api.DataCheckAnswer | null }>} props
 *   `isNameless`: whether neither captions nor a trigger name the subject
 *   `lacking`: photos that lack the other one of a pair, which `lack` is called
 *   `taker`: the model that takes no pictures before an edit though there are some; empty if it does
 */
export function remarksOf({ check, isNameless, lacking, lack, taker }) {
  const found = [];
  if (isNameless)
    found.push({
      title: "Nothing names the subject",
      severity: "problem",
      text: "Give a trigger word above, or captions to the photos, so that the LoRA learns what to call this.",
    });
  if (lacking.length)
    found.push({
      title: "Pairs without a picture",
      severity: "problem",
      files: lacking,
      text: `${lacking.length === 1 ? "A photo lacks" : `${lacking.length} photos lack`} ${lack}`,
    });
  if (taker)
    found.push({
      title: "Not an edit model",
      severity: "problem",
      text:
        `${taker} takes no pictures before an edit. Choose an edit model, or what else the pairs teach, ` +
        "or controls none in the settings to train without them.",
    });
  const skipped = check?.skipped ?? [];
  const findings = check?.findings ?? [];
  for (const one of findings) {
    const details = one.kind === "unused files" ? skipped : [];
    found.push({ ...one, title: one.title || capital(one.kind), text: details.length ? "" : one.message, details });
  }
  if (skipped.length && !findings.some((one) => one.kind === "unused files"))
    found.push({ title: "Files that cannot be used", severity: "problem", text: "", details: skipped });
  return found.sort((a, b) => GRAVITY.indexOf(a.severity) - GRAVITY.indexOf(b.severity));
}

/** The photos that "Fix all" removes. */
export const removedBy = (remarks) => [...new Set(remarks.flatMap((one) => one.removes ?? []))];

/**
 * @param {Props<{ images: Api.PictureRow[] }>} props
 *   `remarks`: of `remarksOf`
 *   `checking`: how many images, {done, total}, while they are checked, else null
 *   `onFix`: called with remarks whose photos are to be removed; null where nothing can be changed
 *   `onShow`: called with a remark whose photos are to be shown alone
 *   `onCaption`: opens the dialog that writes captions; null where nothing can be changed
 */
export function Remarks({ dataset, remarks, images, isChecked, error, checking, onFix, onShow, onCaption }) {
  if (error) return html`<${Notice} mood="fair"><p>The photos were not checked. ${error.message}</p><//>`;
  if (!images.length) return null;
  if (checking)
    return html`<p class="faint" role="status">
      Checking photos: ${whole(checking.done)} of ${whole(checking.total)}…
    </p>`;
  if (!remarks.length)
    return isChecked
      ? html`<p class="all-good"><span aria-hidden="true">✓</span> Nothing to mend in these photos.</p>`
      : null;
  const byName = new Map(images.map((one) => [one.file, one]));
  const fixable = removedBy(remarks);
  return html`<section class="remarks-card" aria-labelledby="remarks">
    <div class="head">
      <h3 id="remarks">${count(remarks.length, "remark")}</h3>
      ${
        onFix &&
        fixable.length > 0 &&
        html`<${Button} class="small" busyText="Removing…" onClick=${() => onFix(remarks)}>
          Fix all: leave out ${count(fixable.length, "photo")}
        <//>`
      }
    </div>
    <ul class="findings">
      ${remarks.map(
        (one, index) => html`<li key=${`${one.title} ${index}`} class=${`${MOODS[one.severity] ?? "fair"}-item`}>
          <div class="finding-text">
            <b>${one.title}</b> <span>${one.text}</span>
            ${
              one.details?.length > 0 &&
              html`<ul class="file-list">
                ${one.details
                  .slice(0, LISTED)
                  .map((file) => html`<li key=${file.file}>${file.file} cannot be used: ${file.reason}</li>`)}
                ${one.details.length > LISTED && html`<li>and ${one.details.length - LISTED} more</li>`}
              </ul>`
            }
          </div>
          ${
            one.files?.some((file) => byName.has(file)) &&
            html`<div class="strip">
              ${one.files
                .filter((file) => byName.has(file))
                .slice(0, STRIP)
                .map(
                  (file) => html`<img key=${file} src=${sourceOf(dataset, byName.get(file), THUMBNAIL)} alt=${file}
                    title=${file} loading="lazy" />`,
                )}
              ${one.files.length > STRIP && html`<span class="faint">+${one.files.length - STRIP}</span>`}
            </div>`
          }
          <div class="actions">
            ${
              one.files?.length > 0 &&
              html`<button type="button" class="as-link" aria-label=${`Show only: ${one.title}`}
                  onClick=${() => onShow(one)}>
                Show
              </button>`
            }
            ${
              onFix &&
              one.removes?.length > 0 &&
              html`<button type="button" class="as-link" aria-label=${`Leave out: ${one.title}`}
                  onClick=${() => onFix([one])}>
                Leave out ${one.removes.length}
              </button>`
            }
            ${
              onFix &&
              CHOSEN.includes(one.kind) &&
              html`<button type="button" class="as-link" aria-label=${`Leave out: ${one.title}`}
                  onClick=${() => onFix([{ ...one, removes: one.files }])}>
                Leave out ${one.files.length}
              </button>`
            }
            ${
              onCaption &&
              one.kind === "missing captions" &&
              html`<button type="button" class="as-link" onClick=${onCaption}>Write captions</button>`
            }
          </div>
        </li>`,
      )}
    </ul>
  </section>`;
}
