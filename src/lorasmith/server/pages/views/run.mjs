// A run in the room for pictures: its verdict, what is kept of it, and what is done with it next.
import { address, get, post, sentence } from "../lib/api.mjs";
import { html, useEffect, useState } from "../lib/html.mjs";
import { t, translated } from "../lib/language.mjs";
import { go, link, replace } from "../lib/router.mjs";
import { useStore, work } from "../lib/stores.mjs";
import { moment, whole } from "../lib/words.mjs";
import { trainAgain } from "../parts/advice.mjs";
import { Button, Field, Loading, Problem, Question, State, useLoaded } from "../parts/basics.mjs";
import { Icon } from "../parts/icons.mjs";
import { CONTINUED, act, jobsOfRuns } from "../parts/jobs.mjs";
import { Keep } from "../parts/keep.mjs";
import { useView } from "../parts/live_run.mjs";
import { EditMarks, Star, removeRun } from "../parts/marks.mjs";
import { Room } from "../parts/room.mjs";
import { nameOfRun } from "../parts/run_card.mjs";
import { Requests, Training, headOf } from "./job.mjs";

const MORE_STEPS = 0.5; // "train on" suggests this share of the steps on top
const SOON_MS = 1500; // files of the end are written after its event

export function RunView({ id }) {
  const [run, error, reload] = useLoaded((signal) => get(["runs", id], {}, signal), [id]);
  const known = useStore(work);
  const job =
    jobsOfRuns(known).get(id) ??
    [...(known?.jobs.values() ?? [])].filter((one) => one.run === id).sort((a, b) => b.created - a.created)[0];
  const isRunning = run?.state === "running";
  const watched = isRunning ? run.job : null;
  const view = useView(isRunning && !watched ? `runs/${id}` : null);
  useEffect(() => {
    if (watched) replace("jobs", watched); // where it is controlled, too
  }, [watched]);
  useEffect(() => {
    if (!view?.outcome) return undefined;
    const timer = setTimeout(reload, SOON_MS);
    return () => clearTimeout(timer);
  }, [view?.outcome]);
  if (error && !run) {
    return html`<section>
      <h1>${id.split("/").pop()}</h1><${Problem} error=${error} onRetry=${reload} />
      <p class="alone"><a href=${link("runs")}>All runs</a></p>
    </section>`;
  }
  if (!run || watched) return html`<section><${Loading} what="the run" /></section>`;
  return html`<${Room} run=${run} id=${id} view=${view} isRunning=${isRunning} total=${run.steps} onEnd=${reload}
    empty=${html`<p class="easel-words">Nothing was drawn yet.</p>`}
    title=${isRunning ? headOf("running", view) : verdictOf(run)[0]}
    panel=${(shown) =>
      isRunning
        ? html`<${Training} title=${nameOfRun(run)} view=${view} state="running"
            controls=${view?.step > 0 && html`<${Requests} id=${id} />`} />`
        : html`<${Verdict} run=${run} job=${job} shown=${shown} reload=${reload} />`} />`;
}

/** What is said of a run, sentence by sentence. */
const verdictOf = (run) =>
  sentence(run.recommended?.sentence ?? (run.verdict || run.status))
    .split(/(?<=[.!?]) (?=[A-Z])/)
    .map(translated);

/** @param {Props<{ run: Api.RunAnswer, job: Api.JobAnswer | undefined }>} props */
function Verdict({ run, job, shown, reload }) {
  const [dialog, setDialog] = useState("");
  const close = () => setDialog("");
  const { recommended: best } = run;
  const [head, ...reason] = verdictOf(run);
  const canContinue = job && CONTINUED.includes(job.state);
  const isStanding = job?.state === "paused" || job?.state === "interrupted";
  const file = run.saves.find((one) => one.step === shown.step)?.file ?? best?.file ?? "";
  const step = run.saves.find((one) => one.file === file)?.step ?? best?.step ?? null;
  return html`
    <div class="panel-head">
      <p class="panel-name">
        ${nameOfRun(run)}
        ${
          (isStanding || !best?.is_judged) &&
          html`<${State}
            state=${isStanding ? job?.state : run.state} />`
        }
      </p>
      <${Star} run=${run} onChange=${reload} />
      <details class="more">
        <summary class="icon-button" aria-label="More" title="More"><${Icon} name="more" /></summary>
        <div class="menu">
          ${run.dataset && html`<a href=${link("new", run.dataset, "photos")}>Its photos</a>`}
          ${
            run.is_trainable_on &&
            html`<button type="button" onClick=${() => setDialog("on")}>
              Train it further</button>`
          }
          <a href=${address(["runs", run.id, "report"])} target="_blank" rel="noopener">Report</a>
          <a href=${`editor/?run=${encodeURIComponent(run.id)}`}>Open in editor</a>
          <button type="button" onClick=${() => setDialog("marks")}>Name and note</button>
          <button type="button" class="bad"
              onClick=${() => removeRun(run, (isBack) => go(...(isBack ? ["runs", run.id] : ["runs"])))}>
            Delete
          </button>
        </div>
      </details>
    </div>
    <h1 class="verdict">${head}</h1>
    ${reason.length > 0 && html`<p class="reason">${reason.join(" ")}</p>`}
    ${
      job?.state === "failed" && html`<${Problem} error=${{ message: sentence(job.error?.message ?? t`It failed`) }} />`
    }
    ${run.note && html`<p key="note" class="note">${run.note}</p>`}
    <div class="actions">
      ${
        best &&
        html`<${Button} kind=${canContinue && job.state !== "cancelled" ? "plain" : "primary"}
            onClick=${() => setDialog("keep")}>
          Keep this one
        <//>`
      }
      ${
        canContinue &&
        html`<${Button} kind=${job.state === "cancelled" ? "plain" : "primary"}
            onClick=${() => act(job, "continue").then((done) => done && go("jobs", job.id))}>
          Continue
        <//>`
      }
      <a class="button" href=${link("compare", run.id)}>Compare</a>
      ${run.dataset && html`<${Button} onClick=${() => trainAgain(run)}>Train again with changes<//>`}
    </div>
    <p class="faint panel-facts">
      ${[run.trigger && t`Write “${run.trigger}” in prompts`, run.model, moment(run.started).replaceAll(" ", "\u00a0")]
        .filter(Boolean)
        .join(" · ")}
    </p>
    ${
      dialog === "keep" &&
      html`<${Keep} run=${run} file=${file} step=${step} picture=${shown.picture} onClose=${close} onDone=${reload} />`
    }
    ${dialog === "marks" && html`<${EditMarks} run=${run} onClose=${close} onDone=${reload} />`}
    ${dialog === "on" && html`<${TrainOn} run=${run} onClose=${close} />`}
  `;
}

/** @param {Props<{ run: Api.RunAnswer }>} props */
function TrainOn({ run, onClose }) {
  const done = run.step ?? run.steps ?? 0;
  const [steps, setSteps] = useState(String(Math.max(10, Math.round((done * MORE_STEPS) / 10) * 10)));
  const more = Number(steps);
  const isGood = Number.isInteger(more) && more > 0;
  const start = async () =>
    go("jobs", (await post(["runs", run.id, "train-on"], { steps: done + more, evaluate: true })).id);
  return html`<${Question} title="Train it further" yes=${t`Train ${isGood ? whole(more) : ""} more steps`}
      disabled=${!isGood} onYes=${start} onClose=${onClose}>
    <p>It continues after step ${whole(done)}, as if the run had been longer from its start.</p>
    <${Field} label="More steps" error=${isGood ? null : t`Must be a whole number of at least 1.`}>
      ${(attributes) => html`<input ...${attributes} type="text" inputmode="numeric" value=${steps}
        onInput=${(event) => setSteps(event.currentTarget.value)} />`}
    <//>
  <//>`;
}
