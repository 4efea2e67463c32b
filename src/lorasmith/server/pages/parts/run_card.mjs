// A run at a glance.
import { fileOfRun } from "../lib/api.mjs";
import { html } from "../lib/html.mjs";
import { link } from "../lib/router.mjs";
import { moment, whole } from "../lib/words.mjs";
import { State } from "./basics.mjs";

/** What a run is called, other than all others: the title that it was given, or its folder's name. */
export const nameOfRun = (run) => run.label || run.id.split("/").pop();

/** @param {Props<{ run: Api.RunRow }>} props */
export function RunCard({ run }) {
  return html`<a class="card" href=${link("runs", run.id)}>
    <span class="card-picture">
      ${run.cover && html`<img src=${fileOfRun(run.id, run.cover)} alt="" loading="lazy" />`}
    </span>
    <b>${run.starred && html`<span class="star" role="img" aria-label="Starred">★</span> `}${nameOfRun(run)}</b>
    <span class="card-state"><${State} state=${run.state} /> <span class="faint">${stepsOf(run)}</span></span>
    <span class="faint">${run.model ? `${run.model} · ` : ""}${moment(run.started)}</span>
  </a>`;
}

export const stepsOf = (run) =>
  run.step === run.steps || !run.steps
    ? `${whole(run.step ?? 0)} steps`
    : `${whole(run.step ?? 0)} of ${whole(run.steps)} steps`;
