// Which LoRA of a run is good: its evaluation, with a slider over the LoRAs, and the job that makes it.
import { fileOfRun, get, post } from "../lib/api.mjs";
import { html, useState } from "../lib/html.mjs";
import { capital } from "../lib/words.mjs";
import { Loading, Problem, useLoaded } from "./basics.mjs";
import { Lightbox } from "./pictures.mjs";
import { Queued, SubjectField } from "./queued.mjs";

/** @param {Props<{ run: Api.RunAnswer }>} props `onDone` is called when there is another recommendation */
export function WhichStep({ run, onDone }) {
  const [subject, setSubject] = useState("");
  const [found, error, reload] = useLoaded((signal) => get(["runs", run.id, "evaluation"], {}, signal), [run.id]);
  return html`<section aria-labelledby="which">
    <h2 id="which">Which step?</h2>
    ${error && html`<${Problem} error=${error} onRetry=${reload} />`}
    ${!found && !error && html`<${Loading} what="the evaluation" />`}
    ${
      found?.evaluation &&
      html`<${Evaluated} key=${found.evaluation.sentence} run=${run} evaluation=${found.evaluation}
        folder=${found.folder} />`
    }
    ${
      found &&
      html`<${Queued} label=${found.evaluation ? "Evaluate again" : "Evaluate the LoRAs"}
          isIt=${(job) => job.kind === "evaluate" && job.about === run.id} said="The LoRAs are evaluated."
          onDone=${() => {
            reload();
            onDone();
          }} disabled=${found.subject === "" && !subject.trim()}
          start=${() => post(["runs", run.id, "evaluation"], { subject: subject.trim() })}>
        ${
          !found.evaluation &&
          html`<p>
            Draws with each LoRA that was saved, measures whether it looks like your photos and still does what
            prompts say, and recommends one.
          </p>`
        }
        ${found.subject === "" && html`<${SubjectField} value=${subject} onValue=${setSubject} />`}
      <//>`
    }
  </section>`;
}

/** @param {Props<{ run: Api.RunAnswer, evaluation: Api.Evaluation }>} props */
function Evaluated({ run, evaluation, folder }) {
  const { loras, prompts, verdict } = evaluation;
  /** @type {Partial<Api.EvaluatedLora>[]} */
  const rows = [{ label: "base model", pictures: evaluation.base }, ...loras];
  const best = verdict.best === null ? null : verdict.best + 1;
  const [at, setAt] = useState(best ?? rows.length - 1);
  const [large, setLarge] = useState(null);
  const { label = "", file, measures, pictures = [] } = rows[at];
  const source = (file) => fileOfRun(run.id, `${folder}/${file}`);
  const shown = Object.entries({ likeness: measures?.likeness, "adherence to prompts": measures?.adherence })
    .filter(([, value]) => typeof value === "number")
    .map(([name, value]) => `${name} ${value?.toFixed(2)}`);
  const shots = pictures.map((picture, index) => ({ file: picture, title: capital(label), prompt: prompts[index] }));
  const isThere = run.saves.some((one) => one.file === file);
  return html`
    <p>${evaluation.sentence}</p>
    <div class="slider">
      <label for="which-lora">LoRA</label>
      <input id="which-lora" type="range" min="0" max=${rows.length - 1} value=${at} aria-valuetext=${label}
        onInput=${(event) => setAt(Number(event.currentTarget.value))} />
      <output>${capital(label)}${at === best ? " (recommended)" : ""}</output>
    </div>
    ${shown.length > 0 && html`<p class="faint">${capital(shown.join(", "))}</p>`}
    <ul class="thumbs">
      ${shots.map(
        (shot, index) => html`<li key=${prompts[index]}>
          <button type="button" class="picture" onClick=${() => setLarge(index)}>
            <img src=${source(shot.file)} alt=${`${shot.title}: ${shot.prompt}`} loading="lazy" />
          </button>
          <span class="faint">${shot.prompt}</span>
        </li>`,
      )}
    </ul>
    <div class="actions">
      ${
        isThere &&
        html`<a class="button" href=${fileOfRun(run.id, file ?? "")} download>
          ${at === best ? "Use this one" : "Download this one"}
        </a>`
      }
      <a class="button" href=${source("contact sheet.png")} target="_blank" rel="noopener">Contact sheet</a>
    </div>
    ${evaluation.notes.map((note) => html`<p class="faint" key=${note}>${note}</p>`)}
    ${
      large !== null &&
      html`<${Lightbox} shots=${shots} start=${large} source=${source} onClose=${() => setLarge(null)} />`
    }
  `;
}
