// A run as its picture: what it is called, and a tile of it.
import { fileOfRun } from "../lib/api.mjs";
import { html } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { link } from "../lib/router.mjs";
import { stateWords, whole } from "../lib/words.mjs";
import { Star } from "./marks.mjs";

const TILE_PX = 480;
const LARGE_PX = 1024; // of few
const ENDED = ["finished", "stopped", "cancelled", "completed"]; // of which nothing is to be said
const BUILT_IN = "lorasmith-tiny";

/** What a run is called, other than all others: the title that it was given, or its folder's name. */
export const nameOfRun = (run) => run.label || run.id.split("/").pop();

/** The same on a picture: the first run of a name is called by it. */
export const shortName = (run) => nameOfRun(run).replace(/-001$/, "");

/** What it was learnt with: a model of its own name, or the built-in one. */
const modelWords = (model) => (model === BUILT_IN ? t`built-in model` : model);

/**
 * A run of the wall: its best picture, with its words on it.
 *
 * @param {Props<{ run: Api.RunRow, state: string }>} props
 */
export function Cover({ run, state, isLarge = false, onChange }) {
  const what = run.teaches === "style" || run.teaches === "slider" ? run.teaches : run.subject || run.teaches;
  return html`<li class=${run.starred ? "starred" : ""}>
    <a class="cover" href=${link("runs", run.id)}>
      ${
        run.cover &&
        html`<img src=${fileOfRun(run.id, run.cover, isLarge ? LARGE_PX : TILE_PX)} alt="" loading="lazy"
          decoding="async" />`
      }
      ${!ENDED.includes(state) && html`<span class="badge">${stateWords(state)[0]}</span>`}
      <span class="cover-words">
        <b>${shortName(run)}</b><span>${[what, modelWords(run.model)].filter(Boolean).join(" · ")}</span>
      </span>
    </a>
    <${Star} run=${run} onChange=${onChange} />
  </li>`;
}

export const stepsOf = (run) =>
  run.step === run.steps || !run.steps
    ? t`${whole(run.step ?? 0)} steps`
    : t`${whole(run.step ?? 0)} of ${whole(run.steps)} steps`;
