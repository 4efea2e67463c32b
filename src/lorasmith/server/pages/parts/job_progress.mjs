// How far a job is that draws or writes captions: a bar, what is done of how much, and the time left.
import { capital, count, duration, whole } from "../lib/words.mjs";
import { html, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { useEvents } from "../lib/live.mjs";
import { Progress } from "./basics.mjs";

const LEAST_MS = 3000; // from which on the time that is left is told

/** @param {Props<{ job: Api.JobAnswer, label: string }>} props `job` runs */
export function JobProgress({ job, label }) {
  /** @type {[{ first: any, last: any }, (next: (before: { first: any }) => { first: any, last: any }) => void]} */
  const [{ first, last }, setHeard] = useState({ first: null, last: null });
  useEvents(`jobs/${job.id}`, {
    progress: (event) => {
      const heard = { ...event, at: Date.now() };
      setHeard((before) => ({ first: before.first ?? heard, last: heard }));
    },
  });
  const {
    value,
    maximum,
    pictures = job.kind === "caption" ? maximum : null,
  } = last ?? /** @type {Record<string, any>} */ ({});
  const taken = last ? last.at - first.at : 0;
  const seconds = taken >= LEAST_MS ? (taken / 1000 / (value - first.value)) * (maximum - value) : NaN;
  const told = [
    pictures && t`${whole(Math.floor((value / maximum) * pictures))} of ${count(pictures, "picture")}`,
    Number.isFinite(seconds) && t`${capital(duration(seconds, { about: true }))} left`,
  ].filter(Boolean);
  return html`
    <${Progress} label=${label} value=${value} max=${maximum} />
    ${told.length > 0 && html`<span class="faint">${told.join(" · ")}</span>`}
  `;
}
