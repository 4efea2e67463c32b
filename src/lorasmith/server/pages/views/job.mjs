// A job while it waits and trains: its progress, losses, previews, and what can be done with it.
import { address, get, post, sentence } from "../lib/api.mjs";
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { useEvents } from "../lib/live.mjs";
import { link, replace } from "../lib/router.mjs";
import { announcement, say, useStore, work } from "../lib/stores.mjs";
import { emptyStory, stepsDone, tell } from "../lib/story.mjs";
import { Button, Loading, Problem, Question, State, useLoaded } from "../parts/basics.mjs";
import { Queue, act, titleOf } from "../parts/jobs.mjs";
import { LiveRun } from "../parts/live_run.mjs";
import { Stepper } from "../parts/stepper.mjs";

const DRAWN_EVERY_MS = 2000; // the cores that draw may be those that train
const ENDED = ["completed", "failed", "cancelled"];

export function JobView({ id }) {
  const [loaded, error, reload] = useLoaded((signal) => get(["jobs", id], {}, signal), [id]);
  const known = useStore(work);
  const job = loaded || known?.jobs.get(id) ? { ...loaded, ...known?.jobs.get(id) } : null;
  const [story] = useStory(address(["jobs", id, "events"]));
  const [asking, setAsking] = useState(false);
  const before = useRef(null);

  useEffect(() => {
    const state = job?.state;
    if (!state) return;
    const wasOn = before.current && !ENDED.includes(before.current);
    if (before.current && before.current !== state) announcement.set(`The training is ${{ running: "running", paused: "paused", completed: "finished", failed: "failed", cancelled: "stopped", pending: "waiting" }[state] ?? state}.`);
    before.current = state;
    // Whoever watched it to its end sees the result; a link to an ended job stays what it is.
    if (wasOn && (state === "completed" || state === "cancelled") && job.run) replace("runs", job.run);
  }, [job?.state, job?.run]);

  if (error && !job) return html`<section><h1>Training</h1><${Problem} error=${error} onRetry=${reload} /><a href="#/">Start a new one</a></section>`;
  if (!job) return html`<section><${Loading} what="the training" /></section>`;
  const { state } = job;
  const steps = stepsDone(story);
  return html`
    <${Stepper} at=${ENDED.includes(state) ? "result" : "training"} dataset=${job.request?.dataset ?? undefined}
      addresses=${job.run && ENDED.includes(state) ? { training: link("jobs", id), result: link("runs", job.run) } : {}} />
    <${LiveRun} story=${story} run=${job.run} isRunning=${state === "running"} head=${html`
      <div class="head"><h1 id="job">${titleOf(job)}</h1><${State} state=${state} /></div>
      <p class="faint">${[job.request?.model, job.request?.trigger && `“${job.request.trigger}”`].filter(Boolean).join(" · ")}</p>
      <${Standing} job=${job} story=${story} known=${known} />
      ${job.error && html`<${Problem} error=${{ message: job.error.message }} />`}
      <div class="actions">
        ${state === "running" && html`<${Button} onClick=${() => act(job, "cancel", { pause: true })} busyText="Pausing…">Pause<//>
          <${Button} onClick=${() => setAsking(true)}>Stop and keep<//>`}
        ${state === "pending" && html`<${Button} onClick=${() => act(job, "move", { front: true })}>To the front<//>
          <${Button} onClick=${() => act(job, "cancel", { pause: false })}>Do not train<//>`}
        ${(state === "paused" || state === "interrupted") && html`<${Button} kind="primary" onClick=${() => act(job, "continue")}>Resume<//>
          <${Button} onClick=${() => act(job, "cancel", { pause: false })}>Stop here<//>`}
        ${state === "cancelled" && html`<${Button} onClick=${() => act(job, "continue")}>Continue it<//>`}
        ${state === "failed" && job.run && html`<${Button} onClick=${() => act(job, "continue")}>Continue it<//>`}
        ${state === "failed" && html`<${Button} kind="primary" onClick=${() => act(job, "retry").then((next) => next?.id && (location.hash = link("jobs", next.id)))}>Try again<//>`}
        ${job.run && ENDED.includes(state) && html`<a class="button primary" href=${link("runs", job.run)}>See the result</a>`}
      </div>`} />
    <${Queue} except=${id} />
    ${asking && html`<${Question} title="Stop the training?" yes="Stop and keep" onClose=${() => setAsking(false)}
      onYes=${() => post(["jobs", id, "cancel"], { pause: false })}>
      <p>${steps ? `What was learnt in ${steps} steps is kept. You can continue it later.` : "Nothing was learnt yet."}</p><//>`}`;
}

/** What happens before the first step, in words. */
function Standing({ job, story, known }) {
  if (job.state === "pending") {
    const ahead = [...(known?.jobs.values() ?? [])].filter((one) => one.id !== job.id && (one.state === "running" || (one.state === "pending" && one.number < job.number))).length;
    return html`<p role="status">${ahead ? `It starts after ${ahead === 1 ? "one other job" : `${ahead} other jobs`}.` : "It starts in a moment."}</p>`;
  }
  if (job.state === "paused") return html`<p>It is paused. Everything so far is stored, also when the server is stopped.</p>`;
  if (job.state === "interrupted") return html`<p>It was interrupted. It continues where it stopped.</p>`;
  if (job.state !== "running" || story.steps.length) return null;
  const lines = story.preparation;
  return html`<ol class="preparing" role="status">
    ${lines.length ? lines.map((line) => html`<li key=${line.kind}>${line.text}</li>`) : html`<li>Getting ready…</li>`}</ol>
    <progress aria-label="Preparing"></progress>`;
}

/** The story that a stream of events tells. It is drawn a moment after an event, with all that came meanwhile. */
export function useStory(url) {
  const story = useRef(emptyStory());
  const [, setFrame] = useState(0);
  const pending = useRef(0);
  const redraw = () => {
    if (pending.current) return;
    pending.current = setTimeout(() => {
      pending.current = 0;
      setFrame((number) => number + 1);
    }, DRAWN_EVERY_MS);
  };
  useEffect(() => () => clearTimeout(pending.current), []);
  useEvents(url, {
    preparation: (event) => { tell(story.current, event); redraw(); },
    training: (event) => { tell(story.current, event); redraw(); },
    fault: (error) => say(sentence(error.message), { mood: "bad" }),
    reset: () => { story.current = emptyStory(); redraw(); },
    job: (event) => { work.set((all) => ({ queue: { pending: 0, running: 0 }, ...all, jobs: new Map(all?.jobs ?? []).set(event.id, { ...all?.jobs.get(event.id), ...event }) })); },
  });
  return [story.current];
}
