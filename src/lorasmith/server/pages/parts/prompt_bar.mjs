// The bar at the bottom of the room: a prompt, its seed, and how it is drawn.
import { get, post } from "../lib/api.mjs";
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { canDrop, filesOf, filesOfInput, useAccept } from "../lib/uploads.mjs";
import { whole } from "../lib/words.mjs";
import { Button, Field, Problem, isPassing, useLoaded } from "./basics.mjs";
import { Icon } from "./icons.mjs";
import { asked } from "./tries.mjs";

const MOST_SEED = 2 ** 32 - 1;
const GREATEST = 2; // strength

/**
 * @param {Props<{ run: { id: string, subject?: string, trigger?: string, saves?: any[], recommended?: any } }>} props
 *   `ideas`: prompts to choose from
 *   `lora`: the file that is chosen by the step that is shown; empty for the last one, or for the weights as they are
 *   `onGrid`: draws a prompt at every step; null where that is not offered
 */
export function PromptBar({ run, isTraining, ideas, lora, amount, onDrawn, onGrid }) {
  const [facts, error, reload] = useLoaded((signal) => get(["runs", run.id, "drawing"], {}, signal), [run.id]);
  if (error && !isPassing(error)) return html`<p class="faint prompt-refused">${error.message}</p>`;
  return html`<${Bar} key=${run.id} run=${run} isTraining=${isTraining} ideas=${ideas} shown=${lora} amount=${amount}
    facts=${facts} onDrawn=${onDrawn} onGrid=${onGrid} problem=${error} onRetry=${reload} />`;
}

function Bar({ run, isTraining, ideas, shown, amount, facts, onDrawn, onGrid, problem, onRetry }) {
  const [typed, setPrompt] = useState(/** @type {string | null} */ (null));
  const prompt = typed ?? (run.subject || run.trigger || "");
  const [isRandom, setRandom] = useState(true);
  const [seed, setSeed] = useState("0");
  const [strength, setStrength] = useState("");
  const [lora, setLora] = useState(null); // other than what is shown
  const [isRow, setRow] = useState(true);
  const [picture, setPicture] = useState(null);
  const [error, setError] = useState(null);
  const [isOpen, setOpen] = useState(false);
  const least = facts?.least_strength ?? 0;
  const control = facts?.control ?? "none";
  const wanted = strength.trim() === "" ? amount || 1 : Number(strength);
  const hasStrength = wanted >= least && wanted <= GREATEST;
  const hasSeed = /^\d+$/.test(seed.trim()) && Number(seed) <= MOST_SEED;
  const lacksPicture = control === "required" && !picture;
  const cannot = !facts || !hasStrength || !hasSeed || lacksPicture;
  const saves = (run.saves ?? []).filter((one, index, all) => all.findIndex((two) => two.step === one.step) === index);
  const used = lora ?? shown;
  const draw = async () => {
    setError(null);
    const chosen = isRandom ? Math.floor(Math.random() * (MOST_SEED + 1)) : Number(seed);
    setSeed(String(chosen));
    try {
      const body = {
        prompt,
        strength: wanted,
        seed: chosen,
        control: picture ? await stored(run, picture) : "",
        lora: used,
      };
      if (isTraining) {
        const { id } = await post(["runs", run.id, "requests"], { what: "drawing", drawing: body });
        asked.set((all) => new Map(all).set(run.id, [...(all.get(run.id) ?? []), { ...body, id }]));
        onDrawn(id);
      } else {
        const strengths = isRow ? facts.strengths.filter((one) => one !== wanted) : [];
        onDrawn((await post(["runs", run.id, "drawing"], { ...body, strengths })).id);
      }
    } catch (failure) {
      setError(failure);
    }
  };
  const place = useRef(null);
  useEffect(() => {
    const style = place.current.closest(".studio").style; // where the panel of phones ends
    const size = new ResizeObserver(([{ target }]) =>
      style.setProperty("--prompt", `${/** @type {HTMLElement} */ (target).offsetHeight}px`),
    );
    size.observe(place.current);
    return () => {
      size.disconnect();
      style.removeProperty("--prompt");
    };
  }, []);
  return html`<div class="prompt-place" ref=${place}>
    <${Problem} error=${error ?? problem} onRetry=${error ? undefined : onRetry} />
    ${
      ideas.length > 0 &&
      html`<div class="ideas" role="group" aria-label="Prompts to try">
        ${ideas.map(
          (one) => html`<button type="button" class="chip" key=${one} onClick=${() => setPrompt(one)}>${one}</button>`,
        )}
      </div>`
    }
    ${
      control !== "none" &&
      html`<${PictureZone} picture=${picture} isNeeded=${control === "required"} onPicture=${setPicture} />`
    }
    <div class="prompt-bar">
      <input type="text" aria-label="Prompt" maxlength="10000" autocomplete="off" value=${prompt}
        placeholder="What should be drawn?" onKeyDown=${(event) => event.key === "Enter" && !cannot && draw()}
        onInput=${(event) => setPrompt(event.currentTarget.value)} />
      <button type="button" class="round" aria-pressed=${isRandom ? "true" : "false"} aria-label="Random seed"
          title=${isRandom ? t`Another noise for each picture` : t`Always the noise of seed ${seed}`}
          onClick=${() => setRandom(!isRandom)}>
        <${Icon} name="dice" />
      </button>
      <button type="button" class="round" aria-expanded=${isOpen ? "true" : "false"} aria-label="How it is drawn"
          title="How it is drawn" onClick=${() => setOpen(!isOpen)}>
        <${Icon} name="settings" />
      </button>
      <${Button} kind="primary" busyText="Sending…" disabled=${cannot} onClick=${draw}>Draw<//>
    </div>
    ${lacksPicture && html`<p class="faint">This model edits pictures: choose one first.</p>`}
    ${
      isOpen &&
      html`<div class="prompt-options">
        ${
          (isTraining || saves.length > 1) &&
          html`<${Field} label="LoRA">
            ${(attributes) => html`<select ...${attributes} value=${used}
                onChange=${(event) => setLora(event.currentTarget.value)}>
              ${
                isTraining
                  ? html`<option value="">As it is now</option>`
                  : !saves.some((one) => one.file === used) && html`<option value=${used}>The last one</option>`
              }
              ${saves.map(
                (one) => html`<option key=${one.file} value=${one.file}>
                  Step ${whole(one.step)}${one.file === run.recommended?.file ? t` (recommended)` : ""}
                </option>`,
              )}
            </select>`}
          <//>`
        }
        <${Field} label="Exact strength"
            error=${hasStrength ? null : t`Must be a number from ${least} to ${GREATEST}.`}>
          ${(attributes) => html`<input ...${attributes} type="text" inputmode="decimal" value=${strength}
            placeholder=${String(amount || 1)} onInput=${(event) => setStrength(event.currentTarget.value)} />`}
        <//>
        <${Field} label="Seed" error=${hasSeed ? null : t`Must be a whole number from 0 to ${MOST_SEED}.`}>
          ${(attributes) => html`<input ...${attributes} type="text" inputmode="numeric" value=${seed}
            onInput=${(event) => {
              setSeed(event.currentTarget.value);
              setRandom(false);
            }} />`}
        <//>
        ${
          !isTraining &&
          html`<label class="check">
            <input type="checkbox" checked=${isRow} onChange=${(event) => setRow(event.currentTarget.checked)} />
            Draw other strengths too, for the slider
          </label>`
        }
        ${
          onGrid &&
          html`<${Button} class="small" disabled=${!prompt.trim()} onClick=${() => onGrid(prompt)}>
            Draw it at every step<//>`
        }
      </div>`
    }
  </div>`;
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
  return html`<div class=${`control-zone ${over ? "over" : ""}`} onDrop=${dropped} onDragLeave=${() => setOver(false)}
      onDragOver=${(event) => {
        event.preventDefault();
        setOver(true);
      }}>
    ${picture && html`<img src=${picture.preview} alt="Picture to edit" />`}
    <span>
      ${picture ? picture.name : canDrop ? t`Drop the picture to edit here` : t`The picture to edit`}
      ${!isNeeded && !picture && html` <span class="faint">(optional)</span>`}
    </span>
    <${Button} class="small" onClick=${() => input.current.click()}>
        ${picture ? t`Choose another` : t`Choose a picture`}<//>
    ${picture && html`<${Button} class="small" onClick=${() => onPicture(null)}>Take it away<//>`}
    <input ref=${input} type="file" accept=${accept} hidden
      onChange=${(event) => {
        take(filesOfInput(event.currentTarget));
        event.currentTarget.value = "";
      }} />
  </div>`;
}
