// What the server shows of a run as it changes: progress, pictures, numbers and remarks.
import { sentence } from "../lib/api.mjs";
import { useEffect, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { useEvents } from "../lib/live.mjs";
import { say, work } from "../lib/stores.mjs";
import { duration } from "../lib/words.mjs";

/** What is shown of a run as a stream sends it; null before that. A stream sends the whole at first, then changes. */
export function useView(topic) {
  const [view, setView] = useState(null);
  useEffect(() => setView(null), [topic]);
  useEvents(topic, {
    view: ({ view: changes }) => setView((before) => ({ ...before, ...changes })),
    // The view itself says what is not there.
    fault: ({ kind, message }) => kind.startsWith("Unknown") || say(sentence(message), { mood: "bad" }),
    job: (event) =>
      work.set((all) => ({
        queue: { pending: 0, running: 0 },
        ...all,
        jobs: new Map(all?.jobs ?? []).set(event.id, { ...all?.jobs.get(event.id), ...event }),
      })),
  });
  return view;
}

/** How long a run takes yet, such as "about 4 minutes left"; empty where that is not known. */
export function timeLeft(view) {
  const seconds = view?.metrics.find((one) => one.name === "time_left")?.value;
  return Number.isFinite(seconds) ? t`${duration(seconds, { about: true })} left` : "";
}
