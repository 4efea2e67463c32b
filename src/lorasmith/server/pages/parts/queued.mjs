// A job that this page starts and waits for: its button, its progress, its end.
import { sentence } from "../lib/api.mjs";
import { html, useEffect, useState } from "../lib/html.mjs";
import { announcement, useStore, work } from "../lib/stores.mjs";
import { Button, Field, Problem } from "./basics.mjs";
import { JobProgress } from "./job_progress.mjs";
import { act } from "./jobs.mjs";

const ENDS = new Set(["completed", "failed", "cancelled", "interrupted", "paused"]);

/**
 * @param label of the button
 * @param isIt whether a job is this one: it is found again when the page is loaded again
 * @param start queues the job, which it returns
 * @param said what is announced when it is done
 */
export function Queued({ label, isIt, start, said, onDone, disabled, children }) {
  const known = useStore(work);
  const [mine, setQueued] = useState(null);
  const going = [...(known?.jobs.values() ?? [])].find((one) => isIt(one) && !ENDS.has(one.state)) ?? null;
  const queued = mine ?? going;
  useEffect(() => {
    if (!mine && going) setQueued(going); // its end is waited for
  }, [mine, going]);
  const [error, setError] = useState(null);
  const job = queued && (known?.jobs.get(queued.id) ?? queued);
  const isActive = job !== null && !ENDS.has(job.state);
  useEffect(() => {
    if (job?.state !== "completed") return;
    announcement.set(said);
    setQueued(null);
    onDone();
  }, [job?.state]);
  const begin = async () => {
    setError(null);
    try {
      setQueued(await start());
    } catch (failure) {
      setError(failure);
    }
  };
  return html`
    ${!isActive && children}
    ${job?.state === "pending" && html`<p class="faint" role="status">It waits for its turn.</p>`}
    ${job?.state === "running" && html`<${JobProgress} job=${job} label="Drawing" />`}
    ${job?.state === "failed" && html`<${Problem} error=${{ message: sentence(job.error?.message ?? "It failed") }} />`}
    <${Problem} error=${error} />
    <div class="actions">
      ${
        isActive
          ? html`<${Button} class="small" onClick=${() => act(job, "cancel", { pause: false })}>Cancel<//>`
          : html`<${Button} disabled=${disabled} onClick=${begin}>${label}<//>`
      }
    </div>
  `;
}

/** What a run without a trigger learnt, where its captions do not say it either. */
export const SubjectField = ({ value, onValue }) => html`<${Field} label="What should I draw?"
    help="The word for what was learnt, such as “a fox”.">
  ${(attributes) => html`<input ...${attributes} type="text" maxlength="1000" value=${value}
    onInput=${(event) => onValue(event.currentTarget.value)} />`}
<//>`;
