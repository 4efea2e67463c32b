// Previews of a run: beside those of the base model, over steps and strengths, and large.
import { html, useEffect, useMemo, useState } from "../lib/html.mjs";
import { capital, whole } from "../lib/words.mjs";
import { Dialog } from "./basics.mjs";

/**
 * Previews by prompt, with a slider over steps. Those of a LoRA that is drawn at negative strengths, a slider itself,
 * are a strip in the order of strengths, with one over strengths.
 *
 * @param previews [{step, strength, prompt, number, file}], with the place of its prompt
 * @param pairs [{title, number, file}]: what the prompts edit, and what it was edited to in training
 * @param source address of a preview's file
 * @param live whether newer ones may come: the slider then stays at the newest
 */
export function Previews({ previews, pairs = [], source, live = false, bestStep = null }) {
  const table = useMemo(() => arranged(previews), [previews]);
  const [chosen, setChosen] = useState(null);
  const [large, setLarge] = useState(null);
  const [amount, setAmount] = useState(1);
  if (!table.steps.length && !table.base.size) return null;
  const at = chosen === null || !table.steps.includes(chosen) ? table.steps.length - 1 : table.steps.indexOf(chosen);
  const step = table.steps[at];
  // The strip of a run that is live stays whole while the strengths of its newest step are drawn one by one.
  const strengths = live && previews.some((one) => one.strength < 0) ? table.strengths(null) : table.strengths(step);
  const pick = (index) => setChosen(live && index === table.steps.length - 1 ? null : table.steps[index]);
  const beside = [...new Set(pairs.map((one) => one.title))];
  const isStrip = strengths[0] < 0;
  const inOrder = isStrip ? [...strengths, 0].sort((a, b) => a - b) : strengths;
  const shotAt = (strength, number) => (strength === 0 ? table.base.get(number) : table.at(step, strength, number));
  const rows = table.prompts.map(([number, prompt]) => ({
    prompt,
    number,
    cells: [
      ...beside.map((title) => [title, pairs.find((one) => one.title === title && one.number === number)]),
      ...(isStrip ? [] : [["Base model", table.base.get(number)]]),
      ...inOrder.map((strength) => [
        strength === 0 ? "Base model" : titleOf(step, strength, strengths),
        shotAt(strength, number),
      ]),
    ].map(([title, shot]) => [capital(title), shot && { prompt, ...shot }]),
  }));
  const shots = rows.flatMap(({ cells }) =>
    cells.filter(([, shot]) => shot).map(([title, shot]) => ({ ...shot, title })),
  );
  const cell = (shot, title) =>
    shot
      ? html`<td>
        <button type="button" class="picture"
            onClick=${() => setLarge(shots.findIndex((one) => one.file === shot.file))}>
          <img src=${source(shot.file)} alt=${`${title}: ${shot.prompt}`} loading="lazy" />
        </button>
      </td>`
      : html`<td><span class="missing">Not drawn yet</span></td>`;
  return html`<div class="previews">
    ${
      table.steps.length > 1 &&
      html`<div class="slider">
        <label for="preview-step">Step</label>
        <input id="preview-step" type="range" min="0" max=${table.steps.length - 1} value=${at}
          aria-valuetext=${`step ${step}`} onInput=${(event) => pick(Number(event.currentTarget.value))} />
        <output>${whole(step)}${step === bestStep ? " (best)" : ""}</output>
      </div>`
    }
    ${
      isStrip &&
      html`<${Scrubber} strengths=${inOrder} amount=${amount} onAmount=${setAmount} rows=${rows} shotAt=${shotAt}
        source=${source} />`
    }
    <div class="scroll" tabindex="0" role="region" aria-label="Previews by prompt">
      <table class="pictures">
        <thead><tr>${rows[0].cells.map(([title]) => html`<th scope="col" key=${title}>${title}</th>`)}</tr></thead>
        <tbody>
          ${rows.map(
            ({ prompt, number, cells }) => html`
              <tr class="prompt-row" key=${`${number} words`}>
                <th scope="rowgroup" colspan=${cells.length}>${prompt || "No prompt"}</th>
              </tr>
              <tr key=${number}>${cells.map(([title, shot]) => cell(shot, title))}</tr>
            `,
          )}
        </tbody>
      </table>
    </div>
    ${
      large !== null &&
      large >= 0 &&
      html`<${Lightbox} shots=${shots} start=${large} source=${source} onClose=${() => setLarge(null)} />`
    }
  </div>`;
}

/** One picture for each prompt, at the strength that is chosen. */
function Scrubber({ strengths, amount, onAmount, rows, shotAt, source }) {
  const at = Math.max(0, strengths.indexOf(amount));
  return html`
    <div class="slider">
      <label for="preview-strength">Strength</label>
      <input id="preview-strength" type="range" min="0" max=${strengths.length - 1} value=${at}
        aria-valuetext=${`strength ${strengths[at]}`}
        onInput=${(event) => onAmount(strengths[Number(event.currentTarget.value)])} />
      <output>${strengths[at]}</output>
    </div>
    <div class="beside scrubbed">
      ${rows
        .map(({ prompt, number }) => [prompt, number, shotAt(strengths[at], number)])
        .map(
          ([prompt, number, shot]) => html`<figure key=${number}>
            ${
              shot
                ? html`<img src=${source(shot.file)} alt=${`Strength ${strengths[at]}: ${prompt}`} />`
                : html`<span class="missing">Not drawn yet</span>`
            }
          </figure>`,
        )}
    </div>
  `;
}

const titleOf = (step, strength, strengths) =>
  step === undefined
    ? ""
    : strengths.length > 1
      ? `Strength ${strength}`
      : `Step ${whole(step)}${strength === 1 ? "" : `, strength ${strength}`}`;

function arranged(previews) {
  const prompts = [...new Map(previews.map((one) => [one.number, one.prompt]))].sort(([a], [b]) => a - b);
  const base = new Map();
  const drawn = new Map();
  for (const one of previews) {
    if (one.strength === 0) base.set(one.number, one);
    else drawn.set(`${one.step} ${one.strength} ${one.number}`, one);
  }
  const steps = [...new Set([...drawn.values()].map((one) => one.step))].sort((a, b) => a - b);
  return {
    prompts,
    base,
    steps,
    strengths: (step) =>
      [
        ...new Set([...drawn.values()].filter((one) => step === null || one.step === step).map((one) => one.strength)),
      ].sort((a, b) => a - b),
    at: (step, strength, number) => drawn.get(`${step} ${strength} ${number}`),
  };
}

/** Pictures in the size of the window, turned with the arrow keys. */
export function Lightbox({ shots, start, source, onClose }) {
  const [at, setAt] = useState(start);
  const turn = (by) => setAt((index) => (index + by + shots.length) % shots.length);
  useEffect(() => {
    const pressed = (event) => {
      if (event.key === "ArrowRight") turn(1);
      if (event.key === "ArrowLeft") turn(-1);
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, [shots.length]);
  const shot = shots[Math.min(at, shots.length - 1)];
  return html`<${Dialog} title=${shot.title} onClose=${onClose} wide>
    <img class="large" src=${source(shot.file)} alt=${shot.prompt || shot.title} />
    <p class="faint" aria-live="polite">${shot.prompt}</p>
    ${
      shots.length > 1 &&
      html`<div class="actions spread">
        <button type="button" class="button" onClick=${() => turn(-1)}>← Previous</button>
        <span class="faint">${at + 1} of ${shots.length}</span>
        <button type="button" class="button" onClick=${() => turn(1)}>Next →</button>
      </div>`
    }
  <//>`;
}
