// What to do about single pictures of a run: leave one out, draw it less often, edit its caption; and train again so.
import { fileOfRun, get, post, remove } from "../lib/api.mjs";
import { readDraft, useDraft, writeDraft } from "../lib/drafts.mjs";
import { html, useState } from "../lib/html.mjs";
import { go } from "../lib/router.mjs";
import { say } from "../lib/stores.mjs";
import { capital } from "../lib/words.mjs";
import { Button, useLoaded } from "./basics.mjs";

/** Chooses for the photos of a run what it was trained with, and what was chosen for single pictures since. */
function choose(run) {
  const draft = readDraft(run.dataset);
  const { trigger: _, ...settings } = run.changed;
  const repeats = draft.settings.image_repeats;
  writeDraft(run.dataset, { ...draft, name: run.name, trigger: run.trigger, model: run.model, isChosen: true,
    settings: repeats === undefined ? settings : { ...settings, image_repeats: repeats } });
}

/** Leads to the settings for training a run again. */
export function trainAgain(run) {
  choose(run);
  go("new", run.dataset, "settings");
}

/** What the losses of a picture say, in words. */
export const findingOf = (run, file) => capital(run.advice.find((one) => one.file === file)?.finding ?? "");

export function Advice({ run }) {
  const [photos, , reload] = useLoaded(async (signal) => (run.dataset && run.advice.length ? get(["datasets", run.dataset], {}, signal) : null), [run.id]);
  const [away, setAway] = useState({}); // where pictures were moved to that were left out here
  if (!run.advice_summary) return null;
  const pictures = new Map(run.images.map((one) => [one.file, one]));
  const act = (work) => async () => {
    try {
      await work();
    } catch (failure) {
      say(failure.message, { mood: "bad" });
    }
  };
  const restore = (file, removed) => act(async () => {
    await post(["datasets", run.dataset, "restore"], { removed });
    setAway(({ [file]: _, ...others }) => others);
    reload();
  });
  const leaveOut = (file) => act(async () => {
    const { removed } = await remove(["datasets", run.dataset, "images", file]);
    setAway((all) => ({ ...all, [file]: removed }));
    reload();
    say(`${file} was moved to the removed files.`, { undo: restore(file, removed) });
  });
  const edit = (file) => {
    choose(run);
    go("new", run.dataset, "photos", file);
  };
  return html`<section aria-labelledby="advice"><h2 id="advice">Picture by picture</h2>
    ${run.advice.length === 0 && html`<p>${run.advice_summary}</p>`}
    <ul class="rows">${run.advice.map((one) => html`<li class="row" key=${one.file}>
      <span class="row-picture">${pictures.get(one.file)?.thumbnail && html`<img src=${fileOfRun(run.id, pictures.get(one.file).thumbnail)} alt="" loading="lazy" />`}</span>
      <div class="row-text"><b>${one.file} <span class="tag">${capital(one.finding)}</span></b><span>${one.remedy}</span><span class="faint">${one.reason}</span>
        ${pictures.get(one.file)?.caption && html`<span class="faint">Its caption: “${pictures.get(one.file).caption}”</span>`}</div>
      ${photos && html`<${Actions} run=${run} advice=${one} isThere=${!photos.builtin && photos.images.some((image) => image.file === one.file)} removed=${away[one.file]}
        onLeaveOut=${leaveOut(one.file)} onRestore=${restore(one.file, away[one.file])} onEdit=${() => edit(one.file)} />`}</li>`)}</ul>
    ${photos && html`<div class="actions"><${Button} onClick=${() => trainAgain(run)}>Train again with these changes<//></div>`}
  </section>`;
}

function Actions({ run, advice, isThere, removed, onLeaveOut, onRestore, onEdit }) {
  const [draft, change] = useDraft(run.dataset);
  const rules = (draft.settings.image_repeats ?? run.changed.image_repeats ?? "").split("|").map((one) => one.trim()).filter(Boolean);
  const isLess = rules.includes(advice.drawn_less);
  const nameIn = (rule) => rule.slice(0, rule.lastIndexOf("="));
  const others = rules.filter((rule) => nameIn(rule) !== nameIn(advice.drawn_less));
  const store = (chosen) => change({ settings: { ...draft.settings, image_repeats: chosen.join(" | ") } });
  const before = (run.changed.image_repeats ?? "").split("|").map((one) => one.trim()).filter((rule) => rule && nameIn(rule) === nameIn(advice.drawn_less));
  const of = (what) => `${what}: ${advice.file}`;
  if (removed) return html`<div class="actions"><span class="faint">Left out.</span> <${Button} class="small" aria-label=${of("Undo")} onClick=${onRestore}>Undo<//></div>`;
  return html`<div class="actions">
    ${advice.drawn_less && (isLess
      ? html`<span class="faint">It will be drawn less often.</span> <${Button} class="small" aria-label=${of("Undo")} onClick=${() => store([...before, ...others])}>Undo<//>`
      : html`<${Button} class="small" aria-label=${of("Repeat less")} onClick=${() => store([advice.drawn_less, ...others])}>Repeat less<//>`)}
    ${isThere && html`<${Button} class="small" aria-label=${of("Edit the caption")} onClick=${onEdit}>Edit the caption<//>
      <${Button} class="small" aria-label=${of("Leave out")} onClick=${onLeaveOut}>Leave out<//>`}
  </div>`;
}
