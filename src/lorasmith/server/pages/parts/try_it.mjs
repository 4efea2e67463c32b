// Prompts drawn with a LoRA of a run beside its base model, also while it trains. The page keeps them until it is
// loaded
// again.
import { fileOfRun, get, post, sentence } from "../lib/api.mjs";
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { useEvents } from "../lib/live.mjs";
import { announcement, createStore, useStore, work } from "../lib/stores.mjs";
import { filesOf, filesOfInput, useAccept } from "../lib/uploads.mjs";
import { whole } from "../lib/words.mjs";
import { Button, Field, Loading, Problem, Progress, State, isPassing, useLoaded } from "./basics.mjs";
import { act } from "./jobs.mjs";
import { Lightbox } from "./pictures.mjs";

const MOST_SEED = 2 ** 32 - 1;
const WIDEST_STRENGTH = 2;
const stores = new Map();

function triesOf(run) {
  if (!stores.has(run)) stores.set(run, createStore([]));
  return stores.get(run);
}

/**
 * @param {Props<{ run: { id: string, [name: string]: any } }>} props
 *   `run`: its {id, trigger, saves: [{step, file}], recommended}
 *   `view`: of a run that trains, which then draws; null for one that has ended, with whose LoRA a job draws
 */
export function TryIt({ run, view = null }) {
  const [facts, error, reload] = useLoaded((signal) => get(["runs", run.id, "drawing"], {}, signal), [run.id]);
  const refusal = error && !isPassing(error);
  return html`<section aria-labelledby="try">
    <h2 id="try">Try it</h2>
    ${
      facts
        ? html`<${TryForm} key=${run.id} run=${run} isTraining=${view !== null} control=${facts.control}
          least=${facts.least_strength ?? 0} />`
        : refusal
          ? html`<p class="faint">${error.message}</p>`
          : error
            ? html`<${Problem} error=${error} onRetry=${reload} />`
            : html`<${Loading} what="the model" />`
    }
    <${Tries} key=${run.id} run=${run} view=${view} />
  </section>`;
}

/** @param {Props<{ run: { id: string, [name: string]: any } }>} props */
function TryForm({ run, isTraining, control, least }) {
  const [prompt, setPrompt] = useState(run.subject || run.trigger);
  const [strength, setStrength] = useState("1");
  const [seed, setSeed] = useState("0");
  const [lora, setLora] = useState(run.recommended?.file ?? "");
  const [picture, setPicture] = useState(null);
  const [error, setError] = useState(null);
  const saves = run.saves.filter((one, index, all) => all.findIndex((other) => other.step === one.step) === index);
  const hasStrength = strength.trim() !== "" && Number(strength) >= least && Number(strength) <= WIDEST_STRENGTH;
  const hasSeed = /^\d+$/.test(seed.trim()) && Number(seed) <= MOST_SEED;
  const lacksPicture = control === "required" && !picture;
  const draw = async () => {
    setError(null);
    try {
      const body = {
        prompt,
        strength: Number(strength),
        seed: Number(seed),
        control: picture ? await stored(run, picture) : "",
        lora,
      };
      const step = saves.find((one) => one.file === lora)?.step;
      const sent = isTraining
        ? await post(["runs", run.id, "requests"], { what: "drawing", drawing: body })
        : await post(["runs", run.id, "drawing"], body);
      triesOf(run.id).set((before) => [{ ...body, id: sent.id, job: isTraining ? null : sent, step }, ...before]);
    } catch (failure) {
      setError(failure);
    }
  };
  return html`
    <p>
      One picture without the LoRA and one with it, from the same noise.
      ${isTraining ? " They are drawn after the step that runs; the training waits for them, and stays the same." : ""}
    </p>
    <${Field} label="Prompt">
      ${(attributes) => html`<textarea ...${attributes} rows="2" maxlength="10000" value=${prompt}
        onInput=${(event) => setPrompt(event.currentTarget.value)}></textarea>`}
    <//>
    <div class="fields three">
      ${
        (isTraining || saves.length > 1) &&
        html`<${Field} label="LoRA">
          ${(attributes) => html`<select ...${attributes} value=${lora}
              onChange=${(event) => setLora(event.currentTarget.value)}>
            ${
              isTraining
                ? html`<option value="">As it is now</option>`
                : !saves.some((one) => one.file === lora) && html`<option value=${lora}>The last one</option>`
            }
            ${saves.map(
              (one) => html`<option key=${one.file} value=${one.file}>
                Step ${whole(one.step)}${one.file === run.recommended?.file ? " (recommended)" : ""}
              </option>`,
            )}
          </select>`}
        <//>`
      }
      <${Field} label="Strength"
          error=${hasStrength ? null : `Must be a number from ${least} to ${WIDEST_STRENGTH}.`}>
        ${(attributes) => html`<input ...${attributes} type="text" inputmode="decimal" value=${strength}
          onInput=${(event) => setStrength(event.currentTarget.value)} />`}
      <//>
      <${Field} label="Seed" error=${hasSeed ? null : `Must be a whole number from 0 to ${MOST_SEED}.`}>
        ${(attributes) => html`<input ...${attributes} type="text" inputmode="numeric" value=${seed}
          onInput=${(event) => setSeed(event.currentTarget.value)} />`}
      <//>
    </div>
    ${
      control !== "none" &&
      html`<${PictureZone} picture=${picture} isNeeded=${control === "required"} onPicture=${setPicture} />`
    }
    <${Problem} error=${error} />
    <div class="actions">
      <${Button} kind="primary" busyText="Sending…" disabled=${!hasStrength || !hasSeed || lacksPicture}
          onClick=${draw}>
        Draw
      <//>
      ${lacksPicture && html`<span class="faint">This model edits pictures: choose one first.</span>`}
    </div>
  `;
}

/** The name of a picture on the server, sent once for each run. */
async function stored(run, picture) {
  if (picture.run !== run.id) {
    const form = new FormData();
    form.append("file", picture.file, "control");
    picture.control = (await post(["runs", run.id, "controls"], form)).control;
    picture.run = run.id;
  }
  return picture.control;
}

function PictureZone({ picture, isNeeded, onPicture }) {
  const input = useRef(null);
  const accept = useAccept();
  const [over, setOver] = useState(false);
  const take = ([found]) =>
    found && onPicture({ file: found.file, name: found.file.name, preview: URL.createObjectURL(found.file) });
  useEffect(() => () => picture && URL.revokeObjectURL(picture.preview), [picture]);
  const dropped = async (event) => {
    event.preventDefault();
    setOver(false);
    take(await filesOf(event.dataTransfer));
  };
  return html`<div class=${`drop-zone ${over ? "over" : ""}`} onDrop=${dropped} onDragLeave=${() => setOver(false)}
      onDragOver=${(event) => {
        event.preventDefault();
        setOver(true);
      }}>
    ${picture && html`<img class="control-thumb" src=${picture.preview} alt="Picture to edit" />`}
    <p>
      <b>${picture ? picture.name : "Drop the picture to edit here"}</b>
      ${!isNeeded && !picture && html` <span class="faint">(optional)</span>`}
    </p>
    <div class="actions">
      <${Button} onClick=${() => input.current.click()}>${picture ? "Choose another" : "Choose a picture"}<//>
      ${picture && html`<${Button} onClick=${() => onPicture(null)}>Take it away<//>`}
    </div>
    <input ref=${input} type="file" accept=${accept} class="unseen" tabindex="-1" aria-label="Picture to edit"
      onChange=${(event) => {
        take(filesOfInput(event.currentTarget));
        event.currentTarget.value = "";
      }} />
  </div>`;
}

/** @param {Props<{ run: { id: string, [name: string]: any } }>} props */
function Tries({ run, view }) {
  const tries = useStore(triesOf(run.id));
  if (!tries.length) return null;
  return html`<ul class="rows">
    ${tries.map((one) => html`<${one.job ? Try : Requested} key=${one.id} run=${run} one=${one} view=${view} />`)}
  </ul>`;
}

/**
 * What the training itself draws.
 *
 * @param {Props<{ run: { id: string, [name: string]: any } }>} props
 */
function Requested({ run, one, view }) {
  const found = view?.drawn?.find((other) => other.id === one.id);
  if (found) one.found = found; // the view ends with the training
  useEffect(() => {
    if (found?.pictures.length) announcement.set("The pictures are drawn.");
  }, [Boolean(found)]);
  const { pictures = [], note, error, step } = one.found ?? {};
  const isOver = !view || view.outcome;
  return html`<li class="try">
    <${TryHead} one=${{ ...one, step: one.lora ? one.step : step }} />
    ${
      !one.found &&
      (isOver
        ? html`<p class="faint">The training ended before it was drawn. Draw it again.</p>`
        : html`<p class="faint" role="status">
          ${view.status.startsWith("Drawing") ? view.status : "It is drawn after the step that runs."}
        </p>`)
    }
    <${Problem} error=${error ? { message: sentence(error) } : null} />
    <${Drawn} run=${run} one=${one} pictures=${pictures} notes=${note ? [note] : []} />
  </li>`;
}

const TryHead = ({ one, children }) => html`<div class="head">
  <p>
    <b>
      ${one.prompt || "No prompt"}
    </b> <span class="faint">
      ${one.step ? `step ${whole(one.step)}, ` : ""}strength ${one.strength}, seed ${one.seed}
    </span>
  </p>
  ${children}
</div>`;

/**
 * The picture without the LoRA and that with it.
 *
 * @param {Props<{ run: { id: string, [name: string]: any } }>} props
 */
function Drawn({ run, one, pictures, notes }) {
  const [large, setLarge] = useState(null);
  const titles = ["Base model", `Strength ${one.strength}`];
  const shots = pictures.map((file, index) => ({ file, title: titles[index], prompt: one.prompt }));
  const source = (file) => fileOfRun(run.id, file);
  return html`
    ${
      shots.length > 0 &&
      html`<div class="beside">
        ${
          one.control &&
          html`<figure>
            <img src=${source(`tried/${one.control}`)} alt="The picture to edit" />
            <figcaption>Picture to edit</figcaption>
          </figure>`
        }
        ${shots.map(
          (shot, index) => html`<figure key=${shot.file}>
            <button type="button" class="picture" onClick=${() => setLarge(index)}>
              <img src=${source(shot.file)} alt=${`${shot.title}: ${shot.prompt}`} />
            </button>
            <figcaption>${shot.title}</figcaption>
          </figure>`,
        )}
      </div>`
    }
    ${notes.map((note) => html`<p class="faint" key=${note}>${sentence(note)}</p>`)}
    ${
      large !== null &&
      html`<${Lightbox} shots=${shots} start=${large} source=${source} onClose=${() => setLarge(null)} />`
    }
  `;
}

/** @param {Props<{ run: { id: string, [name: string]: any } }>} props */
function Try({ run, one }) {
  const known = useStore(work);
  const job = known?.jobs.get(one.id) ?? one.job;
  const { state } = job;
  const [done, setDone] = useState(null);
  const [outputs, setOutputs] = useState(one.outputs ?? null);
  const [error, setError] = useState(null);
  useEvents(state === "running" ? `jobs/${one.id}` : null, { progress: setDone });
  useEffect(() => {
    if (state !== "completed" || one.outputs) return;
    get(["jobs", one.id]).then((found) => {
      setOutputs((one.outputs = found.outputs));
      announcement.set("The pictures are drawn.");
    }, setError);
  }, [state]);
  const isWaitingForOther = [...(known?.jobs.values() ?? [])].some(
    (other) => other.state === "running" && other.kind === "train",
  );
  const isKnown = known?.jobs.has(one.id);
  useEffect(() => {
    // Removed from the queue, unless it is about to be announced.
    if (known && !isKnown) get(["jobs", one.id]).catch(setError);
  }, [isKnown]);
  const pictures = outputs?.pictures ?? [];
  return html`<li class="try">
    <${TryHead} one=${one}>${!pictures.length && !error && html`<${State} state=${state} />`}<//>
    ${
      state === "pending" &&
      !error &&
      html`<p class="faint" role="status">
        ${isWaitingForOther ? "It waits for the training that runs." : "It waits for its turn."}
      </p>`
    }
    ${state === "running" && html`<${Progress} label="Drawing" value=${done?.value} max=${done?.maximum} />`}
    ${
      (state === "pending" || state === "running") &&
      !error &&
      html`<div class="actions">
        <${Button} class="small" onClick=${() => act(job, "cancel", { pause: false })}>Cancel<//>
      </div>`
    }
    ${state === "failed" && html`<${Problem} error=${{ message: sentence(job.error?.message ?? "It failed") }} />`}
    <${Problem} error=${error} />
    <${Drawn} run=${run} one=${one} pictures=${pictures} notes=${outputs?.notes ?? []} />
  </li>`;
}
