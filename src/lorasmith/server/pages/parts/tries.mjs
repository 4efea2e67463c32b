// What was drawn with the LoRAs of a run by request, as every page finds it: the server keeps it.
import { get } from "../lib/api.mjs";
import { t } from "../lib/language.mjs";
import { createStore, useStore, work } from "../lib/stores.mjs";
import { useLoaded } from "./basics.mjs";

const MOST = 100; // that are shown

/** Pictures of drawings that are not complete, by job: [file, …]. */
const partly = createStore(/** @type {Map<string, string[]>} */ (new Map()));
export const heardFiles = (id, files) => partly.set((all) => new Map(all).set(id, files));

/** Drawings that this page asked of a training, until its view has them: {id, prompt, strength, seed, lora}. */
export const asked = createStore(/** @type {Map<string, any[]>} */ (new Map()));

/** The jobs that draw with a run's LoRAs or evaluate them, as far as the page has heard of them, by id. */
export function useJobsAbout(id) {
  const known = useStore(work);
  return [...(known?.jobs.values() ?? [])].filter((job) => job.about === id);
}

/**
 * The drawings of a run, the newest first: {id, prompt, strength, strengths, seed, lora, step, control, files, job,
 * note, error}; `job` is null for those that the training itself draws.
 *
 * @param {{ id: string, saves?: { step: number, file: string }[], drawn?: any[], asked?: any[] } | null} run
 * @param {any} view
 */
export function useTries(run, view, isRunning) {
  const id = run?.id ?? "";
  const heard = useJobsAbout(id);
  const halves = useStore(partly);
  const own = useStore(asked).get(id) ?? [];
  // Before this page was loaded, or by another one.
  const others = (run?.asked ?? []).filter((one) => !own.some((two) => two.id === one.id));
  const news = heard.map((job) => `${job.id} ${job.state}`).sort();
  const [found] = useLoaded(
    async (signal) => (id ? (await get(["jobs"], { about: id, limit: MOST }, signal)).jobs : []),
    [id, news.join()],
  );
  const saves = view?.saves ?? run?.saves ?? [];
  const stepOf = (lora) => saves.find((one) => one.file === lora)?.step ?? null;
  const jobs = new Map([...heard, ...(found ?? [])].map((job) => [job.id, job]));
  const byJob = [...jobs.values()]
    .filter((job) => job.kind === "draw" && job.wish === null && job.request?.text !== undefined)
    .filter((job) => job.state !== "cancelled" || job.outputs?.pictures)
    .sort((a, b) => b.created - a.created)
    .map((job) => {
      const { text: prompt, lora, strength, strengths = [], seed, control } = job.request;
      const files = job.outputs?.pictures ?? halves.get(job.id) ?? [];
      const note = job.outputs?.notes?.join(" ");
      const step = stepOf(lora);
      return {
        id: job.id,
        prompt,
        strength,
        strengths: [strength, ...strengths],
        seed,
        lora,
        step,
        control,
        files,
        job,
        note,
      };
    });
  const drawn = (view ?? run)?.drawn ?? [];
  const byTraining = drawn.map((one) => ({
    ...one,
    strengths: [one.strength],
    step: one.lora ? stepOf(one.lora) : one.step,
    files: one.pictures,
    job: null,
  }));
  const waiting = [...others, ...own]
    .filter((one) => !drawn.some((other) => other.id === one.id))
    .map((one) => ({
      ...{ ...one, strengths: [one.strength], step: null, files: [], job: null },
      error: isRunning ? "" : t`The training stopped before this was drawn. Draw it again`,
    }));
  return [...waiting.toReversed(), ...byJob, ...byTraining.toReversed()];
}
