// A gallery of a run: what its LoRAs draw for prompts of several kinds, by step and strength.
import { fileOfRun, get, post } from "../lib/api.mjs";
import { html, useState } from "../lib/html.mjs";
import { count, whole } from "../lib/words.mjs";
import { Field, Loading, Problem, isPassing, useLoaded } from "./basics.mjs";
import { Lightbox } from "./pictures.mjs";
import { Queued, SubjectField } from "./queued.mjs";

/** @param {Props<{ run: Api.RunAnswer }>} props `run` has a LoRA */
export function Gallery({ run }) {
  const [found, error, reload] = useLoaded((signal) => get(["runs", run.id, "gallery"], {}, signal), [run.id]);
  const [wish, setWish] = useState(null);
  const [own, setOwn] = useState("");
  const [subject, setSubject] = useState("");
  if (error && !isPassing(error)) return null; // "Try it" says why
  if (!found)
    return html`<section aria-labelledby="gallery">
      <h2 id="gallery">Gallery</h2>
      ${error ? html`<${Problem} error=${error} onRetry=${reload} />` : html`<${Loading} what="the gallery" />`}
    </section>`;
  const { kinds, steps, strengths, grids } = found;
  const known = new Set(Object.values(kinds).flat());
  const others = grids.map((one) => one.wish).filter((one) => !known.has(one));
  const chosen = wish ?? grids[0]?.wish ?? Object.values(kinds)[0]?.[0] ?? "";
  const asked = chosen === OWN ? own.trim() : chosen;
  const grid = grids.find((one) => one.wish === asked);
  const pictures = 1 + steps.length * strengths.length;
  const chip = (one, label = one) => html`<button type="button" key=${one} class="chip"
      aria-pressed=${one === chosen} onClick=${() => setWish(one)}>
    ${label}
    ${grids.some((each) => each.wish === one) && html` <span class="chip-mark" role="img" aria-label="drawn">✓</span>`}
  </button>`;
  return html`<section aria-labelledby="gallery">
    <h2 id="gallery">Gallery</h2>
    <p>
      One prompt over steps and strengths, from the same noise: where it looks like your photos and still does what
      you ask.
    </p>
    ${Object.entries({ ...kinds, ...(others.length ? { Yours: others } : {}) }).map(
      ([kind, wishes]) => html`<div class="kind-row" key=${kind} role="group" aria-label=${kind}>
        <span class="faint">${kind}</span><div class="chips">${wishes.map((one) => chip(one))}</div>
      </div>`,
    )}
    <div class="kind-row">
      <span class="faint">Other</span><div class="chips">${chip(OWN, "Something else")}</div>
    </div>
    ${
      chosen === OWN &&
      html`<${Field} label="What to ask for"
          help="Such as “in a hat”; with the trigger in it, it is the whole prompt.">
        ${(attributes) => html`<input ...${attributes} type="text" maxlength="1000" value=${own}
          onInput=${(event) => setOwn(event.currentTarget.value)} />`}
      <//>`
    }
    ${grid && html`<${GridTable} key=${grid.prompt} run=${run} grid=${grid} />`}
    <${Queued} label=${grid ? "Draw it again" : `Draw ${count(pictures, "picture")}`}
        isIt=${(job) => job.about === run.id && job.kind === "draw" && typeof job.wish === "string"}
        said="The pictures are drawn." disabled=${!asked || (found.subject === "" && !subject.trim())}
        start=${() =>
          post(["runs", run.id, "gallery"], {
            wish: asked,
            ...(subject.trim() ? { subject: subject.trim() } : {}),
          })} onDone=${reload}>
      ${found.subject === "" && html`<${SubjectField} value=${subject} onValue=${setSubject} />`}
    <//>
  </section>`;
}

const OWN = "\n"; // no wish is that

/** @param {Props<{ run: Api.RunAnswer, grid: Api.Grid }>} props */
function GridTable({ run, grid }) {
  const [large, setLarge] = useState(null);
  const steps = [...new Set(grid.cells.map((one) => one.step))].sort((a, b) => a - b);
  const strengths = [...new Set(grid.cells.map((one) => one.strength))].sort((a, b) => a - b);
  const shots = [
    { file: grid.base, title: "Base model", prompt: grid.prompt },
    ...strengths.flatMap((strength) =>
      steps.map((step) => {
        const cell = grid.cells.find((one) => one.step === step && one.strength === strength);
        return { file: cell?.file, title: `Step ${whole(step)}, strength ${strength}`, prompt: grid.prompt };
      }),
    ),
  ].filter((one) => one.file);
  const source = (file) => fileOfRun(run.id, file);
  const picture = (shot) =>
    shot &&
    html`<button type="button" class="picture" onClick=${() => setLarge(shots.indexOf(shot))}>
      <img src=${source(shot.file)} alt=${`${shot.title}: ${shot.prompt}`} loading="lazy" />
    </button>`;
  return html`
    <p class="faint grid-prompt">${grid.prompt}</p>
    <div class="scroll" tabindex="0" role="region" aria-label="Pictures by strength and step">
      <table class="grid">
        <thead>
          <tr>
            <th scope="col">Base model</th><th scope="col">Strength</th>
            ${steps.map((step) => html`<th scope="col" key=${step}>Step ${whole(step)}</th>`)}
          </tr>
        </thead>
        <tbody>
          ${strengths.map(
            (strength, index) => html`<tr key=${strength}>
              ${index === 0 && html`<td rowspan=${strengths.length}>${picture(shots[0])}</td>`}
              <th scope="row">${strength}</th>
              ${steps.map(
                (step) => html`<td key=${step}>
                  ${picture(shots.find((one) => one.title === `Step ${whole(step)}, strength ${strength}`))}
                </td>`,
              )}
            </tr>`,
          )}
        </tbody>
      </table>
    </div>
    ${
      large !== null &&
      html`<${Lightbox} shots=${shots} start=${large} source=${source} onClose=${() => setLarge(null)} />`
    }
  `;
}
