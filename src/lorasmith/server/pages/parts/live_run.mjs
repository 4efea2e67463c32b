// The view of a run that the server sends: progress, numbers, curves, previews and remarks.
import { fileOfRun, post, sentence } from "../lib/api.mjs";
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { useEvents } from "../lib/live.mjs";
import { announcement, said, say, work } from "../lib/stores.mjs";
import { measured, moment, whole } from "../lib/words.mjs";
import { Button, Fold, Progress } from "./basics.mjs";
import { Curves } from "./curves.mjs";
import { Film } from "./film.mjs";
import { Previews } from "./pictures.mjs";
import { TryIt } from "./try_it.mjs";

const SPOKEN_SHARES = 10; // progress is read out this often

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

/**
 * @param run its {id, trigger}
 * @param head what stands above the progress, in the same card
 * @param controls buttons beside those for pictures and the LoRA
 */
export function LiveRun({ view, run, isRunning, head, controls }) {
  const { step: done, steps: planned } = view ?? { step: 0, steps: 0 };
  const spoken = useRef(0);
  const left = view?.metrics.find((one) => one.name === "time_left");
  useEffect(() => {
    const share = planned ? Math.floor((SPOKEN_SHARES * done) / planned) : 0;
    if (share > spoken.current && isRunning)
      announcement.set(`${whole(done)} of ${whole(planned)} steps.${left ? ` ${left.line}.` : ""}`);
    spoken.current = share;
  }, [done, planned]);
  const isBegun = done > 0 || planned > 0;
  const warnings = view?.notes.filter((one) => one.is_warning) ?? [];
  const remarks = view?.notes.filter((one) => !one.is_warning) ?? [];
  const isStrip = view?.previews.some((one) => one.strength < 0);
  const source = (file) => fileOfRun(run.id, file);
  return html`
    ${
      (isBegun || head) &&
      html`<section aria-labelledby=${head ? "job" : undefined} aria-label=${head ? undefined : "Progress"}>
        ${head}
        ${
          planned > 0 &&
          html`<div class="progress-line">
            <${Progress} value=${done} max=${planned} label="Progress of the training" />
            <span>
              <b>${whole(done)}</b> of ${whole(planned)} steps${isRunning && left ? html` · ${left.line}` : ""}
            </span>
          </div>`
        }
        ${isBegun && isRunning && html`<p class="faint">${view.status}</p>`}
        ${
          (controls || (isBegun && isRunning && run)) &&
          html`<div class="actions">${isBegun && isRunning && run && html`<${Requests} run=${run} />`}${controls}</div>`
        }
        ${
          view?.saves?.length > 0 &&
          isRunning &&
          run &&
          html`<p class="faint kept">
            Kept so
            far: ${view.saves.map(
              (one, index) => html`
                ${index > 0 && ", "}<a key=${one.file} href=${source(one.file)} download>step ${whole(one.step)}</a>
              `,
            )}
          </p>`
        }
        ${warnings.map((note) => html`<p class="fair warning" key=${note.at + note.text}>${sentence(note.text)}</p>`)}
      </section>`
    }
    ${
      view?.previews.length > 0 &&
      run &&
      html`<section aria-labelledby="pictures">
        <h2 id="pictures">Pictures</h2>
        ${
          isStrip
            ? html`<${Previews} previews=${view.previews} source=${source} live=${isRunning} />`
            : html`<${Film} previews=${view.previews} source=${source} live=${isRunning} />`
        }
      </section>`
    }
    ${done > 0 && isRunning && run && html`<${TryIt} run=${{ ...run, saves: view.saves ?? [] }} view=${view} />`}
    ${
      isBegun &&
      html`<section>
        <${Fold} title="Details">
          <dl class="facts">
            ${view.metrics.map((one) => html`<div key=${one.name}><dt>${one.label}</dt><dd>${one.text}</dd></div>`)}
          </dl>
          ${
            done > 0 &&
            html`
              <${LossCurves} points=${view.curve} validations=${view.validations} best=${view.best_step}
                verdict=${view.verdict} />
              <${LikenessCurves} points=${view.likenesses} />
            `
          }
          ${
            remarks.length > 0 &&
            html`
              <h3 id="remarks">Remarks</h3>
              <ul class="remarks">
                ${remarks.map(
                  (note) => html`<li key=${note.at + note.text} class="faint">
                    <span class="nowrap">${moment(note.at)}</span> ${sentence(note.text)}
                  </li>`,
                )}
              </ul>
            `
          }
        <//>
      </section>`
    }
  `;
}

/** What a run that trains is asked for. */
function Requests({ run }) {
  const ask = (what, text) =>
    said(async () => {
      await post(["runs", run.id, "requests"], { what });
      say(text);
    });
  return html`
    <${Button} onClick=${() => ask("preview", "Pictures are drawn after this step.")}>Preview now<//>
    <${Button} onClick=${() => ask("save", "The LoRA is saved after this step.")}>Save now<//>
  `;
}

/**
 * The loss of each step, the loss of the run after each, and the losses on held-out images.
 *
 * @param points [[step, loss, mean]]
 */
export function LossCurves({ points, validations, best, verdict = "" }) {
  const [xs, ys, means] = [0, 1, 2].map((column) => points.map((point) => point[column]));
  const held = validations.filter((one) => Number.isFinite(one.loss));
  const base = held.length ? held[0].base_loss : null;
  const lines = [
    { label: "Loss", xs, ys, color: "--raw", width: 1 },
    { label: "Mean", xs, ys: means, color: "--smooth", width: 2 },
    ...(held.length
      ? [
          {
            label: "Held out",
            xs: held.map((one) => one.step),
            ys: held.map((one) => one.loss),
            color: "--held-out",
            width: 2,
            points: true,
          },
        ]
      : []),
    ...(Number.isFinite(base)
      ? [
          {
            label: "Held out, base model",
            xs: [0, Math.max(xs.at(-1) ?? 1, held.at(-1)?.step ?? 1)],
            ys: [base, base],
            color: "--held-out",
            width: 1,
            dash: [4, 4],
          },
        ]
      : []),
  ];
  const heldOut = held.length ? `; held-out loss ${measured(held.at(-1).loss)}, lowest at step ${best}` : "";
  return html`
    <h3 id="curves">Loss</h3>
    <${Curves} lines=${lines}
      marks=${best ? [{ x: best, label: `lowest held-out loss, step ${whole(best)}` }] : []}
      label=${`Training loss over ${xs.at(-1) ?? 0} steps, last ${measured(means.at(-1) ?? NaN)}${heldOut}`} />
    ${verdict && html`<p class="verdict-line">${sentence(verdict)}</p>`}
  `;
}

/** How alike previews are to the training pictures, and how well they follow prompts where that is watched. */
export function LikenessCurves({ points }) {
  if (points.length < 2) return null;
  const xs = points.map((one) => one.step);
  const { own, likeness } = points.at(-1);
  const lines = [
    { label: "Previews", xs, ys: points.map((one) => one.likeness), color: "--smooth", width: 2, points: true },
    ...(Number.isFinite(own)
      ? [
          {
            label: "Photos to one another",
            xs: [0, xs.at(-1)],
            ys: [own, own],
            color: "--smooth",
            width: 1,
            dash: [4, 4],
          },
        ]
      : []),
    ...(points.some((one) => Number.isFinite(one.adherence))
      ? [
          {
            label: "Prompts followed",
            xs,
            ys: points.map((one) => one.adherence),
            color: "--held-out",
            width: 2,
            points: true,
          },
        ]
      : []),
  ];
  return html`
    <h3>Likeness to the photos</h3>
    <${Curves} lines=${lines} axis="Likeness"
      label=${`Likeness of previews to the training photos, ${measured(likeness)} at step ${xs.at(-1)}`} />
  `;
}
