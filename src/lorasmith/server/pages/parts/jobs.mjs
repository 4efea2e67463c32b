// Jobs: what one is called, the queue, and what can be done with each.
import { post, remove, sentence } from "../lib/api.mjs";
import { html, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { link } from "../lib/router.mjs";
import { newest, say, useStore, work } from "../lib/stores.mjs";
import { moment } from "../lib/words.mjs";
import { Button, State } from "./basics.mjs";
import { JobProgress } from "./job_progress.mjs";

const WORK = {
  train: t`Training`,
  measure: t`Measurement`,
  graph: t`Workflow`,
  draw: t`Drawing`,
  evaluate: t`Evaluation`,
  caption: t`Captions`,
};

export const titleOf = (job) =>
  (job.kind === "train" ? job.run : job.about)?.split("/").pop() ||
  job.title ||
  job.name ||
  job.request?.name ||
  (WORK[job.kind] ?? t`Job`);

const workOf = (job) => (job.wish ? t`Gallery` : (WORK[job.kind] ?? job.kind));

/** Whether a job is one that somebody waits for: pages measure steps by themselves, when nothing else is to be done. */
export const isAsked = (job) => job.kind !== "measure";

export const isActive = (job) => job.state === "running" || job.state === "pending";

/** Whether a job is of the queue: it runs, waits or stands still. */
export const isQueued = (job) => job.state in ORDER;

/** Runs an action on a job; its failure is said at the edge of the page. */
export async function act(job, action, body) {
  const asked = work.get();
  try {
    const changed = action === "remove" ? await remove(["jobs", job.id]) : await post(["jobs", job.id, action], body);
    work.set((before) => {
      const jobs = new Map(before?.jobs ?? []);
      if (action === "remove") jobs.delete(job.id);
      else if (changed?.id) jobs.set(changed.id, newest(changed, asked, before));
      return { queue: { pending: 0, running: 0 }, ...before, jobs };
    });
    return changed ?? true;
  } catch (error) {
    say(error.message, { mood: "bad" });
    return null;
  }
}

/** The job of a run that runs, waits or stands still, by the run's id: their state is that of the run. */
export const jobsOfRuns = (known) =>
  new Map(
    [...(known?.jobs.values() ?? [])]
      .filter((job) => job.run && job.kind === "train" && isQueued(job))
      .map((job) => [job.run, job]),
  );

/** What is done with a training that does not run: the one thing, by its state. */
export const CONTINUED = ["paused", "interrupted", "cancelled", "failed"];

/** Trainings that stand still and can continue. */
export function Offers({ hidden }) {
  const known = useStore(work);
  const [later, setLater] = useState(() => new Set(JSON.parse(sessionStorage.getItem("lorasmith.later") ?? "[]")));
  if (hidden || !known) return null;
  const waiting = [...known.jobs.values()].filter(
    (job) => job.kind === "train" && job.state === "interrupted" && !later.has(job.id),
  );
  const postpone = (job) => {
    const next = new Set([...later, job.id]);
    setLater(next);
    sessionStorage.setItem("lorasmith.later", JSON.stringify([...next]));
  };
  return waiting.slice(0, 3).map(
    (job) => html`<div class="notice fair-notice offer" key=${job.id} role="group"
        aria-label="Interrupted training">
      <p>
        ${html`<b>${titleOf(job)}</b>`} was interrupted${
          job.error ? `: ${sentence(job.error.message)}` : t`. It continues where it stopped.`
        }
      </p>
      <div class="actions">
        <${Button} onClick=${() => postpone(job)}>Not now<//>
        <${Button} kind="primary"
            onClick=${() => act(job, "continue").then((done) => done && (location.hash = link("jobs", job.id)))}>
          Continue
        <//>
      </div>
    </div>`,
  );
}

const ORDER = { running: 0, pending: 1, paused: 2, interrupted: 3 };

/**
 * The jobs that run or wait, in order, except one.
 *
 * @param {Props<{ except?: string, empty?: string }>} props `empty` is said where there is none
 */
export function Queue({ except, empty = "" }) {
  const known = useStore(work);
  if (!known) return null;
  const jobs = [...known.jobs.values()]
    .filter((job) => isQueued(job) && isAsked(job) && job.id !== except)
    .sort(
      (a, b) =>
        ORDER[a.state] - ORDER[b.state] ||
        Number(a.gives_way) - Number(b.gives_way) ||
        (a.number ?? 0) - (b.number ?? 0),
    );
  if (!jobs.length) return empty ? html`<p class="faint">${empty}</p>` : null;
  return html`<section aria-labelledby="queue">
    <h2 id="queue">Queue</h2>
    <ul class="rows">
      ${jobs.map(
        (job) => html`<li key=${job.id} class="row">
          <div class="row-text">
            ${
              job.kind === "train" || job.about
                ? html`<a href=${job.about ? link("runs", job.about) : link("jobs", job.id)}>${titleOf(job)}</a>`
                : html`<b>${titleOf(job)}</b>`
            }
            <span class="faint">
              ${[workOf(job), moment(job.started ?? job.created), job.submitter].filter(Boolean).join(" · ")}
            </span>
            ${
              job.kind !== "train" &&
              job.state === "running" &&
              html`<${JobProgress} job=${job} label=${workOf(job)} />`
            }
            ${job.state === "interrupted" && job.error && html`<span>${sentence(job.error.message)}</span>`}
          </div>
          <${State} state=${job.state} kind=${job.kind} />
          <div class="actions">
            ${
              job.state === "pending" &&
              html`<${Button} class="small" onClick=${() => act(job, "move", { front: true })}>To the front<//>`
            }
            ${
              (job.state === "paused" || job.state === "interrupted") &&
              html`<${Button} class="small" onClick=${() => act(job, "continue")}>Continue<//>`
            }
            ${
              job.state === "running"
                ? html`<${Button} class="small" onClick=${() => act(job, "cancel", { pause: false })}>Stop<//>`
                : html`<${Button} class="small" onClick=${() => act(job, "remove")}>Remove<//>`
            }
          </div>
        </li>`,
      )}
    </ul>
  </section>`;
}
