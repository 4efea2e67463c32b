// All runs in the base folder, those of the command line too, to look at and to compare.
import { fileOfRun, get } from "../lib/api.mjs";
import { html, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { go, link } from "../lib/router.mjs";
import { useStore, work } from "../lib/stores.mjs";
import { count, duration, measured, moment } from "../lib/words.mjs";
import { Star, removeRun } from "../parts/marks.mjs";
import { Button, Loading, Notice, Problem, State, useLoaded } from "../parts/basics.mjs";
import { Icon } from "../parts/icons.mjs";
import { CONTINUED, act, isActive, jobsOfRuns } from "../parts/jobs.mjs";
import { nameOfRun, stepsOf } from "../parts/run_card.mjs";
import { NextBar } from "../parts/stepper.mjs";
import { MOST_COMPARED } from "./compare.mjs";
import { useAgain } from "./sweep.mjs";

const PICTURE_PX = 160;
const FIRST = 100; // runs that are shown at first, starred ones before others

export function RunsView() {
  const [words, setWords] = useState("");
  const [isAsked, setAll] = useState(false);
  const isAll = isAsked || words !== "";
  const [found, error, reload] = useLoaded((signal) => get(["runs"], isAll ? {} : { limit: FIRST }, signal), [isAll]);
  const [chosen, setChosen] = useState([]);
  const known = useStore(work);
  useAgain(false, () => found && reload());
  const runs = found?.runs ?? [];
  const shown = runs
    .filter(
      (run) =>
        !words ||
        `${nameOfRun(run)} ${run.id} ${run.model} ${run.family} ${run.state} ${run.note}`
          .toLowerCase()
          .includes(words.toLowerCase()),
    )
    .sort((a, b) => Number(b.starred) - Number(a.starred)); // starred ones first, then as they come: the newest
  const jobs = jobsOfRuns(known);
  const choose = (id, on) => setChosen((ids) => (on ? [...ids, id] : ids.filter((one) => one !== id)));
  return html`
    <section aria-labelledby="runs">
      <div class="head">
        <h1 id="runs">All runs</h1>
        ${
          runs.length > 3 &&
          html`<label class="search">
            <span class="unseen">Search runs</span>
            <input type="search" placeholder="Search" value=${words}
              onInput=${(event) => setWords(event.currentTarget.value)} />
          </label>`
        }
      </div>
      <${Problem} error=${error} onRetry=${reload} />
      ${!found && !error && html`<${Loading} what="runs" />`}
      ${found && !runs.length && html`<p>There is no run yet. <a href="#/">Turn some photos into a LoRA.</a></p>`}
      ${runs.length > 1 && html`<p class="faint">Mark two or more to compare them.</p>`}
      <ul class="rows run-rows">
        ${shown.map(
          (run) => html`<li class="row" key=${run.id} aria-label=${nameOfRun(run)}>
            ${
              runs.length > 1 &&
              html`<input type="checkbox" aria-label=${t`Compare ${nameOfRun(run)}`}
                checked=${chosen.includes(run.id)}
                disabled=${!chosen.includes(run.id) && chosen.length >= MOST_COMPARED}
                onChange=${(event) => choose(run.id, event.currentTarget.checked)} />`
            }
            <a class="row-picture" href=${link("runs", run.id)} tabindex="-1" aria-hidden="true">
              ${run.cover && html`<img src=${fileOfRun(run.id, run.cover, PICTURE_PX)} alt="" loading="lazy" />`}
            </a>
            <div class="row-text">
              <a href=${link("runs", run.id)}><b>${nameOfRun(run)}</b></a>
              ${run.note && html`<span class="note clip">${run.note}</span>`}
              <span class="faint">${[run.id, run.model].filter(Boolean).join(" · ")}</span>
              <span class="faint">
                ${[
                  moment(run.started),
                  stepsOf(run),
                  run.seconds ? duration(run.seconds) : null,
                  run.held_out
                    ? t`held-out loss ${measured(run.held_out)}`
                    : run.loss
                      ? t`loss ${measured(run.loss)}`
                      : null,
                ]
                  .filter(Boolean)
                  .join(" · ")}
              </span>
            </div>
            <${RunState} run=${run} job=${jobs.get(run.id)} />
            <${Star} run=${run} onChange=${reload} />
            <button type="button" class="icon-button" aria-label=${t`Delete ${nameOfRun(run)}`} title="Delete"
                onClick=${() => removeRun(run, reload)}>
              <${Icon} name="trash" />
            </button>
          </li>`,
        )}
      </ul>
      ${
        !isAll &&
        found &&
        found.total > FIRST &&
        html`<p><${Button} onClick=${() => setAll(true)}>Show all ${count(found.total, "run")}<//></p>`
      }
      ${words && !shown.length && runs.length > 0 && html`<p class="faint">No run has these words.</p>`}
      ${
        found &&
        found.damaged.length > 0 &&
        html`<${Notice} mood="fair">
          <p>${count(found.damaged.length, "folder looks", "folders look")} like a run and cannot be read:</p>
          <ul>${found.damaged.map((one) => html`<li key=${one.file}>${one.file}: ${one.reason}</li>`)}</ul>
        <//>`
      }
    </section>
    ${
      chosen.length > 0 &&
      html`<${NextBar} note=${t`${count(chosen.length, "run")} marked`}>
        <${Button} onClick=${() => setChosen([])}>Clear<//>
        <${Button} kind="primary" disabled=${chosen.length < 2} onClick=${() => go("compare", ...chosen)}>Compare<//>
      <//>`
    }
  `;
}

/**
 * The state of a run, which is that of its job while it has one that has not ended, and what can be done in it.
 *
 * @param {Props<{ run: Api.RunRow, job: Api.JobAnswer | undefined }>} props
 */
function RunState({ run, job }) {
  const state = job?.state ?? run.state;
  return html`
    <${State} state=${state} />
    ${
      job &&
      CONTINUED.includes(state) &&
      html`<${Button} class="small" onClick=${() => act(job, "continue")}>Continue<//>`
    }
    ${job && isActive(job) && html`<a class="button small" href=${link("jobs", job.id)}>Watch</a>`}
  `;
}
