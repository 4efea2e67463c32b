// A run as its events tell it: progress, curves, previews and remarks.
import { fileOfRun, sentence } from "../lib/api.mjs";
import { html, useEffect, useMemo, useRef, useState } from "../lib/html.mjs";
import { announcement, status, useStore } from "../lib/stores.mjs";
import { lossColumns, secondsPerStep, smoothed, stepsDone } from "../lib/story.mjs";
import { bytes, duration, measured, moment, speed, whole } from "../lib/words.mjs";
import { Progress } from "./basics.mjs";
import { Curves } from "./curves.mjs";
import { Previews } from "./pictures.mjs";

const SPOKEN_SHARES = 10; // progress is read out this often
const RECENT = 50; // steps whose mean loss is shown

/** @param head what stands above the progress, in the same card */
export function LiveRun({ story, run, isRunning, head }) {
  const done = stepsDone(story);
  const planned = story.started?.steps ?? null;
  const gap = isRunning ? secondsPerStep(story) : null;
  const left = gap && planned ? gap * Math.max(0, planned - done) : null;
  const server = useStore(status);
  const device = server?.devices?.[0];
  const validations = [...story.validations.values()].sort((a, b) => a.step - b.step);
  const best = validations.length ? validations[validations.length - 1].best_step : null;
  const recent = story.steps.filter((step) => Number.isFinite(step?.loss)).slice(-RECENT);
  const spoken = useRef(0);
  useEffect(() => {
    const share = planned ? Math.floor((SPOKEN_SHARES * done) / planned) : 0;
    if (share > spoken.current && isRunning) announcement.set(`${whole(done)} of ${whole(planned)} steps.${left ? ` ${duration(left, { about: true })} left.` : ""}`);
    spoken.current = share;
  }, [done, planned]);
  const previews = useMemo(() => [...story.previews.values()].map((one) => ({ ...one, file: inside(run, one.file) })), [story.previews.size, run]);
  const notes = [...story.notes.values()].sort((a, b) => a.at - b.at);
  if (!done && !story.started) return head ? html`<section aria-labelledby="job">${head}</section>` : null;
  return html`
    <section aria-labelledby=${head ? "job" : undefined} aria-label=${head ? undefined : "Progress"}>
      ${head}
      ${planned && html`<div class="progress-line"><${Progress} value=${done} max=${planned} label="Progress of the training" />
        <span><b>${whole(done)}</b> of ${whole(planned)} steps</span></div>`}
      <dl class="facts">
        ${isRunning && html`<div><dt>Time left</dt><dd>${left === null ? "–" : duration(left)}</dd></div>
          <div><dt>Speed</dt><dd>${gap === null ? "–" : speed(gap)}</dd></div>`}
        <div><dt>Loss (mean of ${Math.min(RECENT, recent.length || 1)})</dt><dd>${recent.length ? measured(recent.reduce((sum, step) => sum + step.loss, 0) / recent.length) : "–"}</dd></div>
        ${validations.length > 0 && html`<div><dt>Held-out loss</dt><dd>${measured(validations[validations.length - 1].loss)}</dd></div>`}
        ${isRunning && Number.isFinite(device?.memory_bytes) && Number.isFinite(device.free_bytes) && html`<div><dt>Memory used</dt><dd>${bytes(device.memory_bytes - device.free_bytes)} of ${bytes(device.memory_bytes)}</dd></div>`}
      </dl>
      ${story.drawing && html`<p class="faint">Drawing previews: ${story.drawing.done} of ${story.drawing.total}…</p>`}
    </section>
    ${done > 0 && html`<section aria-labelledby="curves"><${LossCurves} columns=${lossColumns(story)} validations=${validations} best=${best} /></section>`}
    ${previews.length > 0 && run && html`<section aria-labelledby="previews"><h2 id="previews">Previews</h2>
      <${Previews} previews=${previews} source=${(file) => fileOfRun(run, file)} live=${isRunning} bestStep=${best} /></section>`}
    ${notes.length > 0 && html`<section aria-labelledby="remarks"><h2 id="remarks">Remarks</h2><ul class="remarks">
      ${notes.map((note) => html`<li key=${note.at + note.text} class=${note.mood}><span class="faint nowrap">${moment(note.at)}</span> ${sentence(note.text)}</li>`)}</ul></section>`}`;
}

/** Loss over steps, smoothed as chosen, with the losses on held-out images. */
export function LossCurves({ columns: [xs, ys], validations, best }) {
  const [weight, setWeight] = useState(0.9);
  const held = validations.filter((one) => Number.isFinite(one.loss));
  const base = held.length ? held[0].base_loss : null;
  const lines = [
    { label: "Loss", xs, ys, color: "--raw", width: 1 },
    ...(weight > 0 ? [{ label: "Smoothed", xs, ys: smoothed(ys, weight), color: "--smooth", width: 2 }] : []),
    ...(held.length ? [{ label: "Held out", xs: held.map((one) => one.step), ys: held.map((one) => one.loss), color: "--held-out", width: 2, points: true }] : []),
    ...(Number.isFinite(base) ? [{ label: "Held out, base model", xs: [0, Math.max(xs.at(-1) ?? 1, held.at(-1)?.step ?? 1)], ys: [base, base], color: "--held-out", width: 1, dash: [4, 4] }] : []),
  ];
  return html`<div class="head"><h2 id="curves">Loss</h2><label class="slider short">Smoothing
      <input type="range" min="0" max="0.99" step="0.01" value=${weight} onInput=${(event) => setWeight(Number(event.currentTarget.value))} /></label></div>
    <${Curves} lines=${lines} marks=${best ? [{ x: best }] : []} label=${`Training loss over ${xs.at(-1) ?? 0} steps, last ${measured(smoothed(ys, weight).at(-1) ?? NaN)}${held.length ? `; held-out loss ${measured(held.at(-1).loss)}, lowest at step ${best}` : ""}`} />
    ${validations.length > 0 && validations.at(-1).verdict && html`<p class="verdict-line">${sentence(validations.at(-1).verdict)}</p>`}`;
}

/** The path of a file inside a run's folder; events name files by other paths too. */
export function inside(run, file) {
  const path = file.replaceAll("\\", "/");
  const at = run ? path.lastIndexOf(`${run}/`) : -1;
  if (at >= 0) return path.slice(at + run.length + 1);
  const named = run ? path.lastIndexOf(`/${run.split("/").pop()}/`) : -1;
  return named >= 0 ? path.slice(named + run.split("/").pop().length + 2) : path;
}
