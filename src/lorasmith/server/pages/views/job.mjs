// A training in the room for pictures, from the queue to its end: how long it takes, and what can be done with it.
import { get, post, sentence } from "../lib/api.mjs";
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { t, translated } from "../lib/language.mjs";
import { go, link, replace } from "../lib/router.mjs";
import { announcement, said, say, useStore, work } from "../lib/stores.mjs";
import { capital, count, whole } from "../lib/words.mjs";
import { Button, Loading, Problem, Progress, Question, State, useLoaded } from "../parts/basics.mjs";
import { act, isActive, titleOf } from "../parts/jobs.mjs";
import { timeLeft, useView } from "../parts/live_run.mjs";
import { Room } from "../parts/room.mjs";
import { useCovers } from "./sets.mjs";

const SPOKEN = {
  pending: t`The training is waiting.`,
  running: t`The training is running.`,
  paused: t`The training is paused.`,
  interrupted: t`The training is interrupted.`,
  completed: t`The training is finished.`,
  cancelled: t`The training is stopped.`,
  failed: t`The training has failed.`,
};
const SPOKEN_SHARES = 10; // progress is read out this often

export function JobView({ id }) {
  const [loaded, error, reload] = useLoaded((signal) => get(["jobs", id], {}, signal), [id]);
  const known = useStore(work);
  const heard = known?.jobs.get(id);
  const job = loaded && heard ? { ...loaded, ...heard } : (loaded ?? heard);
  const view = useView(`jobs/${id}`);
  const [run] = useLoaded(
    async (signal) => (job?.run && view?.step > 0 ? get(["runs", job.run], {}, signal) : null),
    [job?.run, job?.state, view?.step > 0],
  );
  const [asking, setAsking] = useState(false);
  const before = useRef(null);
  const state = job?.state;
  useEffect(() => {
    if (!state) return;
    if (before.current && before.current !== state) announcement.set(SPOKEN[state]);
    before.current = state;
    if ((state === "completed" || state === "cancelled") && job.run) replace("runs", job.run); // one page for a run
  }, [state, job?.run]);
  if (error && !job)
    return html`<section>
      <h1>Training</h1><${Problem} error=${error} onRetry=${reload} /><a href="#/">Start a new one</a>
    </section>`;
  if (!job) return html`<section><${Loading} what="the training" /></section>`;
  const isRunning = state === "running";
  const steps = view?.step ?? 0;
  const trigger = job.request?.trigger ?? job.request?.settings?.trigger ?? "";
  return html`
    <${Room} run=${run ? { ...run, subject: run.subject || trigger } : null} id=${job.run} view=${view}
        isRunning=${isRunning}
      total=${view?.steps} onEnd=${() => {}}
      empty=${html`<${Standing} job=${job} view=${view} known=${known} />`}
      title=${headOf(state, view)} panel=${() => html`<${Training} title=${titleOf(job)} view=${view} state=${state}
        note=${[job.request?.model, trigger && `“${trigger}”`].filter(Boolean).join(" · ")}
        error=${job.error && state !== "cancelled" ? sentence(job.error.message) : ""}
        controls=${html`
          ${isRunning && steps > 0 && job.run && html`<${Requests} id=${job.run} />`}
          ${
            isRunning &&
            html`
              <${Button} onClick=${() => act(job, "cancel", { pause: true })} busyText="Pausing…">Pause<//>
              <${Button} onClick=${() => setAsking(true)}>Stop and keep<//>
            `
          }
          ${
            state === "pending" &&
            html`
              ${
                jobsAhead(job, known) > 0 &&
                html`<${Button} onClick=${() => act(job, "move", { front: true })}>To the front<//>`
              }
              <${Button} onClick=${() => act(job, "cancel", { pause: false })}>Do not train<//>
            `
          }
          ${
            !isActive(job) &&
            (job.run || state !== "failed") &&
            html`<${Button} kind=${state === "failed" ? "plain" : "primary"} onClick=${() => act(job, "continue")}>
                Continue<//>`
          }
          ${
            (state === "paused" || state === "interrupted") &&
            html`<${Button} onClick=${() => act(job, "cancel", { pause: false })}>Stop here<//>`
          }
          ${
            state === "failed" &&
            html`<${Button} kind="primary"
                onClick=${() => act(job, "retry").then((next) => next?.id && go("jobs", next.id))}>
              Try again
            <//>`
          }
          ${state === "failed" && job.run && html`<a class="button" href=${link("runs", job.run)}>See the result</a>`}
        `} />`} />
    ${
      asking &&
      html`<${Question} title="Stop the training?" yes="Stop and keep" onClose=${() => setAsking(false)}
          onYes=${() => post(["jobs", id, "cancel"], { pause: false })}>
        <p>
          ${
            steps
              ? t`What was learnt in ${steps} steps is kept. You can continue it later.`
              : t`Nothing was learnt yet.`
          }
        </p>
      <//>`
    }
  `;
}

/** How far a training is: the time left in words, a bar, what is warned of, and what can be done. */
export function Training({ title, view, state, note = "", error = "", controls }) {
  const { step: done, steps: planned } = view ?? { step: 0, steps: 0 };
  const isRunning = state === "running";
  const left = capital(timeLeft(view));
  const spoken = useRef(0);
  useEffect(() => {
    const share = planned ? Math.floor((SPOKEN_SHARES * done) / planned) : 0;
    if (share > spoken.current && isRunning)
      announcement.set(t`${whole(done)} of ${whole(planned)} steps.${left ? ` ${left}.` : ""}`);
    spoken.current = share;
  }, [done, planned]);
  const warnings = (view?.notes ?? []).filter((one) => one.is_warning);
  const isDrawing = isRunning && view?.status.startsWith("Drawing");
  return html`
    <div class="panel-head"><p class="panel-name">${title}</p><${State} state=${state} /></div>
    <h1 class="verdict">${headOf(state, view)}</h1>
    ${note && html`<p class="faint panel-facts">${note}</p>`}
    ${error && html`<${Problem} error=${{ message: error }} />`}
    ${
      planned > 0 &&
      html`<div class="panel-progress">
        <${Progress} value=${done} max=${planned} label="Progress of the training" />
        <span class="faint">
          ${whole(done)} of ${whole(planned)} steps${isDrawing ? t` · drawing the next picture` : ""}
        </span>
      </div>`
    }
    <div class="actions">${controls}</div>
    ${warnings
      .filter((one) => one.kind !== "Note")
      .map((one) => html`<p class="fair warning" key=${one.at + one.text}>${sentence(one.text)}</p>`)}
  `;
}

/** What is said of a training in a few words. */
export const headOf = (state, view) =>
  state === "running" && view?.step > 0 ? capital(timeLeft(view)) || t`Learning` : HEADS[state];

const HEADS = {
  running: t`Getting ready`,
  pending: t`Waiting for its turn`,
  paused: t`Paused`,
  interrupted: t`Interrupted`,
  failed: t`It failed`,
  cancelled: t`Stopped`,
  completed: t`Finished`,
};

/** What a run that trains is asked for. */
export function Requests({ id }) {
  const ask = (what, text) =>
    said(async () => {
      await post(["runs", id, "requests"], { what });
      say(text);
    });
  return html`
    <${Button} onClick=${() => ask("preview", t`Pictures are drawn after this step.`)}>Preview now<//>
    <${Button} onClick=${() => ask("save", t`The LoRA is saved after this step.`)}>Save now<//>
  `;
}

/**
 * What happens before the first picture, in words.
 *
 * @param {Props<{ job: Api.JobAnswer }>} props
 */
function Standing({ job, view, known }) {
  if (job.state === "pending") {
    const ahead = jobsAhead(job, known);
    return html`<div class="easel-words">
      <${Photos} of=${job.request?.dataset} />
      <p role="status">
        ${ahead ? t`It starts after ${count(ahead, "other job")}.` : t`It starts in a moment.`}
      </p>
    </div>`;
  }
  if (job.state === "paused")
    return html`<p class="easel-words">It is paused. All of it is stored, also when the server is stopped.</p>`;
  if (job.state === "interrupted") return html`<p class="easel-words">It continues where it stopped.</p>`;
  if (job.state !== "running") return html`<p class="easel-words">Nothing was drawn yet.</p>`;
  const lines = view?.preparation ?? [];
  const isDrawing = view?.status.startsWith("Drawing");
  return html`<div class="easel-words">
    <${Photos} of=${job.request?.dataset} />
    <div role="status">
    ${
      view?.step > 0 || isDrawing
        ? html`<p>
          ${isDrawing ? t`Drawing what it looks like without your LoRA…` : t`The first picture comes soon.`}
        </p>`
        : html`
          <ol class="preparing">
            ${
              lines.length
                ? lines.map((line) => html`<li key=${line}>${translated(line)}</li>`)
                : html`<li>Getting ready…</li>`
            }
          </ol>
          <progress aria-label="Preparing"></progress>
        `
    }
    </div>
  </div>`;
}

/** How many jobs run or wait before one that waits. */
const jobsAhead = (job, known) =>
  [...(known?.jobs.values() ?? [])].filter(
    (one) =>
      one.id !== job.id &&
      !one.gives_way &&
      (one.state === "running" || (one.state === "pending" && one.number < job.number)),
  ).length;

/** Some of what a LoRA learns from, until there is a picture of its own. */
function Photos({ of }) {
  const files = useCovers(of);
  return (
    files.length > 0 &&
    html`<p class="learnt-from">${files.map((src) => html`<img key=${src} src=${src} alt="" decoding="async" />`)}</p>`
  );
}
