// What to do about single pictures of a run: leave one out, draw it less often, edit its caption; and train again so.
import { fileOfRun, get, post, remove } from "../lib/api.mjs";
import { changeDraft, currentDraft, useDraft } from "../lib/drafts.mjs";
import { html, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { go } from "../lib/router.mjs";
import { said, say } from "../lib/stores.mjs";
import { capital, count } from "../lib/words.mjs";
import { Button, Fold, useLoaded } from "./basics.mjs";

/** Chooses for the photos of a run what it was trained with, and what was chosen for single pictures since. */
async function choose(run) {
  const { presets } = await get(["settings"], { images: run.images.length });
  const { trigger: _, ...changed } = run.changed;
  const { settings: before } = await currentDraft(run.dataset);
  const chosen = await withoutRecipe(run, asPreset(changed, presets));
  if (before.image_repeats !== undefined) chosen.settings = { ...chosen.settings, image_repeats: before.image_repeats };
  await changeDraft(run.dataset, {
    name: run.name,
    trigger: run.trigger,
    model: run.model,
    is_chosen: true,
    again: run.id,
    ...chosen,
  });
}

/** A choice without the settings that the recipe of its preset chooses anyway, where its model is here. */
async function withoutRecipe({ dataset, model, trigger }, { preset, settings }) {
  try {
    const { recipe } = await post(["plans"], { dataset, model, trigger, preset, settings: {} });
    const isOwn = ([name, value]) => recipe[name] !== value;
    return { preset, settings: Object.fromEntries(Object.entries(settings).filter(isOwn)) };
  } catch {
    return { preset, settings };
  }
}

/** Leads to the settings for training a run again. */
export const trainAgain = (run) =>
  said(async () => {
    await choose(run);
    go("new", run.dataset, "settings");
  });

/** Settings as those of the preset that most of them are, and what differs from it: {preset, settings}. */
function asPreset(changed, presets) {
  const apart = (preset) => Object.entries(changed).filter(([name, value]) => preset.settings[name] !== value);
  const whole = presets.filter((one) => Object.keys(one.settings).every((name) => name in changed));
  const [best] = [...whole, ...presets.filter((one) => one.name === "balanced")].sort(
    (a, b) => apart(a).length - apart(b).length,
  );
  return { preset: best.name, settings: Object.fromEntries(apart(best)) };
}

/** What the losses of a picture say, in words. */
export const findingOf = (run, file) => capital(run.advice.find((one) => one.file === file)?.finding ?? "");

/** @param {Props<{ run: Api.RunAnswer }>} props */
export function Advice({ run }) {
  const [photos, , reload] = useLoaded(
    async (signal) => {
      if (!run.dataset || !run.advice.length) return null;
      await currentDraft(run.dataset); // which the actions change
      return get(["datasets", run.dataset], {}, signal);
    },
    [run.id],
  );
  // Where pictures were moved to that were left out here.
  const [away, setAway] = useState(/** @type {Record<string, string>} */ ({}));
  if (!run.advice.length) return null;
  const dataset = run.dataset ?? "";
  const pictures = new Map(run.images.map((one) => [one.file, one]));
  const restore = (/** @type {string} */ file, removed) =>
    said(async () => {
      await post(["datasets", dataset, "restore"], { removed });
      setAway(({ [file]: _, ...others }) => others);
      reload();
    });
  const leaveOut = (file) =>
    said(async () => {
      const { removed } = await remove(["datasets", dataset, "images", file]);
      setAway((all) => ({ ...all, [file]: removed }));
      reload();
      say(t`${file} was moved to the removed files.`, { undo: () => restore(file, removed) });
    });
  const edit = (file) =>
    said(async () => {
      await choose(run);
      go("new", run.dataset, "photos", file);
    });
  return html`<${Fold} title=${t`${count(run.advice.length, "photo")} to look at`}>
    <ul class="rows">
      ${run.advice.map(
        (one) => html`<li class="row" key=${one.file}>
          <span class="row-picture">
            ${
              pictures.get(one.file)?.thumbnail &&
              html`<img src=${fileOfRun(run.id, pictures.get(one.file)?.thumbnail ?? "")} alt="" loading="lazy" />`
            }
          </span>
          <div class="row-text">
            <b>${one.file} <span class="tag">${capital(one.finding)}</span></b><span>${one.remedy}</span>
            <span class="faint">${one.reason}</span>
            ${
              pictures.get(one.file)?.caption &&
              html`<span class="faint">Its caption: “${pictures.get(one.file)?.caption}”</span>`
            }
          </div>
          ${
            photos &&
            html`<${Actions} run=${run} advice=${one}
              isThere=${!photos.builtin && photos.images.some((image) => image.file === one.file)}
              removed=${away[one.file]} onLeaveOut=${() => leaveOut(one.file)}
              onRestore=${() => restore(one.file, away[one.file])} onEdit=${() => edit(one.file)} />`
          }
        </li>`,
      )}
    </ul>
    ${
      photos &&
      html`<div class="actions"><${Button} onClick=${() => trainAgain(run)}>Train again with these changes<//></div>`
    }
  <//>`;
}

/** @param {Props<{ run: Api.RunAnswer, advice: Api.PictureAdvice }>} props */
function Actions({ run, advice, isThere, removed, onLeaveOut, onRestore, onEdit }) {
  const [draft, change] = useDraft(run.dataset);
  const rules = (draft.settings.image_repeats ?? run.changed.image_repeats ?? "")
    .split("|")
    .map((one) => one.trim())
    .filter(Boolean);
  const isLess = rules.includes(advice.drawn_less);
  const nameIn = (rule) => rule.slice(0, rule.lastIndexOf("="));
  const others = rules.filter((rule) => nameIn(rule) !== nameIn(advice.drawn_less));
  const store = (chosen) => change({ settings: { ...draft.settings, image_repeats: chosen.join(" | ") } });
  const before = (run.changed.image_repeats ?? "")
    .split("|")
    .map((one) => one.trim())
    .filter((rule) => rule && nameIn(rule) === nameIn(advice.drawn_less));
  const of = (what) => `${what}: ${advice.file}`;
  if (removed)
    return html`<div class="actions">
      <span class="faint">
        Left out.
      </span> <${Button} class="small" aria-label=${of(t`Undo`)} onClick=${onRestore}>Undo<//>
    </div>`;
  return html`<div class="actions">
    ${
      advice.drawn_less &&
      (isLess
        ? html`
          <span class="faint">
            It will be drawn less often.
          </span> <${Button} class="small" aria-label=${of(t`Undo`)} onClick=${() => store([...before, ...others])}>
            Undo
          <//>
        `
        : html`<${Button} class="small" aria-label=${of(t`Repeat less`)}
            onClick=${() => store([advice.drawn_less, ...others])}>
          Repeat less
        <//>`)
    }
    ${
      isThere &&
      html`
        <${Button} class="small" aria-label=${of(t`Edit the caption`)} onClick=${onEdit}>Edit the caption<//>
        <${Button} class="small" aria-label=${of(t`Leave out`)} onClick=${onLeaveOut}>Leave out<//>
      `
    }
  </div>`;
}
