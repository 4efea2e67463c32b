// A job while it waits and trains: its progress, losses, previews, and what can be done with it.
import { get, post, sentence } from "../lib/api.mjs";
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { link, replace } from "../lib/router.mjs";
import { announcement, useStore, work } from "../lib/stores.mjs";
import { Button, Loading, Problem, Question, State, useLoaded } from "../parts/basics.mjs";
import { Queue, act, isAsked, titleOf } from "../parts/jobs.mjs";
import { LiveRun, useView } from "../parts/live_run.mjs";
import { Stepper } from "../parts/stepper.mjs";

const ENDED = ["completed", "failed", "cancelled"];

const SPOKEN = { completed: "finished", cancelled: "stopped", pending: "waiting" };

export function JobView({ id }) {
  const [loaded, error, reload] = useLoaded((signal) => get(["jobs", id], {}, signal), [id]);
  const known = useStore(work);
  const heard = known?.jobs.get(id);
  const job = loaded && heard ? { ...loaded, ...heard } : (loaded ?? heard);
  const view = useView(`jobs/${id}`);
  const [asking, setAsking] = useState(false);
  const before = useRef(null);

  useEffect(() => {
    const state = job?.state;
    if (!state) return;
    const wasOn = before.current && !ENDED.includes(before.current);
    if (before.current && before.current !== state) announcement.set(`The training is ${SPOKEN[state] ?? state}.`);
    before.current = state;
    // Whoever watched it to its end sees the result; a link to an ended job stays what it is.
    if (wasOn && (state === "completed" || state === "cancelled") && job.run) replace("runs", job.run);
  }, [job?.state, job?.run]);

  if (error && !job)
    return html`<section>
      <h1>Training</h1><${Problem} error=${error} onRetry=${reload} /><a href="#/">Start a new one</a>
    </section>`;
  if (!job) return html`<section><${Loading} what="the training" /></section>`;
  const { state } = job;
  const trigger = job.request?.trigger ?? job.request?.settings?.trigger;
  const steps = view?.step ?? 0;
  const isEnded = ENDED.includes(state);
  return html`
    <${Stepper} at=${isEnded ? "result" : "training"} dataset=${job.request?.dataset ?? undefined}
      addresses=${job.run && isEnded ? { training: link("jobs", id), result: link("runs", job.run) } : {}} />
    <${LiveRun} view=${view} run=${job.run ? { id: job.run, trigger: trigger ?? "" } : null}
      isRunning=${state === "running"}
      head=${html`
        <div class="head"><h1 id="job">${titleOf(job)}</h1><${State} state=${state} /></div>
        <p class="faint">${[job.request?.model, trigger && `“${trigger}”`].filter(Boolean).join(" · ")}</p>
        <${Standing} job=${job} view=${view} known=${known} />
        ${job.error && html`<${Problem} error=${{ message: sentence(job.error.message) }} />`}
      `}
      controls=${html`
        ${
          state === "running" &&
          html`
            <${Button} onClick=${() => act(job, "cancel", { pause: true })} busyText="Pausing…">Pause<//>
            <${Button} onClick=${() => setAsking(true)}>Stop and keep<//>
          `
        }
        ${
          state === "pending" &&
          html`
            <${Button} onClick=${() => act(job, "move", { front: true })}>To the front<//>
            <${Button} onClick=${() => act(job, "cancel", { pause: false })}>Do not train<//>
          `
        }
        ${
          (state === "paused" || state === "interrupted") &&
          html`
            <${Button} kind="primary" onClick=${() => act(job, "continue")}>Continue<//>
            <${Button} onClick=${() => act(job, "cancel", { pause: false })}>Stop here<//>
          `
        }
        ${
          (state === "cancelled" || (state === "failed" && job.run)) &&
          html`<${Button} onClick=${() => act(job, "continue")}>Continue<//>`
        }
        ${
          state === "failed" &&
          html`<${Button} kind="primary"
              onClick=${() => act(job, "retry").then((next) => next?.id && (location.hash = link("jobs", next.id)))}>
            Try again
          <//>`
        }
        ${
          job.run &&
          ENDED.includes(state) &&
          html`<a class="button primary" href=${link("runs", job.run)}>See the result</a>`
        }
      `} />
    <${Queue} except=${id} />
    ${
      asking &&
      html`<${Question} title="Stop the training?" yes="Stop and keep" onClose=${() => setAsking(false)}
          onYes=${() => post(["jobs", id, "cancel"], { pause: false })}>
        <p>
          ${steps ? `What was learnt in ${steps} steps is kept. You can continue it later.` : "Nothing was learnt yet."}
        </p>
      <//>`
    }
  `;
}

/**
 * What happens before the first step, in words.
 *
 * @param {Props<{ job: Api.JobAnswer }>} props
 */
function Standing({ job, view, known }) {
  if (job.state === "pending") {
    const ahead = [...(known?.jobs.values() ?? [])].filter(
      (one) =>
        one.id !== job.id &&
        isAsked(one) &&
        (one.state === "running" || (one.state === "pending" && one.number < job.number)),
    ).length;
    return html`<p role="status">
      ${ahead ? `It starts after ${ahead === 1 ? "one other job" : `${ahead} other jobs`}.` : "It starts in a moment."}
    </p>`;
  }
  if (job.state === "paused")
    return html`<p>It is paused. Everything so far is stored, also when the server is stopped.</p>`;
  if (job.state === "interrupted")
    return job.error ? null : html`<p>It was interrupted. It continues where it stopped.</p>`; // or its error says so
  if (job.state !== "running" || view?.step) return null;
  const lines = view?.preparation ?? [];
  return html`
    <ol class="preparing" role="status">
      ${lines.length ? lines.map((line) => html`<li key=${line}>${line}</li>`) : html`<li>Getting ready…</li>`}
    </ol>
    <progress aria-label="Preparing"></progress>
  `;
}
