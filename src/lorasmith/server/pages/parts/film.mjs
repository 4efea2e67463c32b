// Pictures of a run over its steps: the newest or a chosen one beside that of the base model, and a strip of all.
import { html, useEffect, useMemo, useRef, useState } from "../lib/html.mjs";
import { announcement } from "../lib/stores.mjs";
import { capital, whole } from "../lib/words.mjs";
import { Lightbox } from "./pictures.mjs";

const stepTitle = (step) => `Step ${whole(step)}`;

/**
 * @param previews [{step, strength, prompt, number, file}], of which those of the base model and at full strength are
 *   shown
 * @param pairs [{title, number, file}]: what the prompts edit, and what it was edited to in training
 * @param source address of a preview's file
 * @param live whether newer ones may come: the newest is then shown until another one is chosen
 * @param bestStep the step that is recommended, which is shown first if the run has ended
 */
export function Film({ previews, pairs = [], source, live = false, bestStep = null }) {
  const table = useMemo(() => arranged(previews), [previews]);
  const [chosen, setChosen] = useState(null);
  const [number, setNumber] = useState(null);
  const [other, setOther] = useState("base");
  const [large, setLarge] = useState(null);
  const strip = useRef(null);
  const { steps, prompts } = table;
  const last = steps.at(-1);
  const before = useRef(last);
  useEffect(() => {
    if (live && last !== undefined && last !== before.current)
      announcement.set(`A new picture, of step ${whole(last)}.`);
    before.current = last;
  }, [last]);
  const at = steps.includes(chosen) ? chosen : !live && steps.includes(bestStep) ? bestStep : last;
  useEffect(() => {
    const button = strip.current?.querySelector("[aria-pressed=true]");
    if (button) strip.current.scrollLeft = button.offsetLeft - (strip.current.clientWidth - button.clientWidth) / 2;
  }, [at, steps.length]);
  if (!prompts.length) return null;
  const shown = prompts.some(([one]) => one === number) ? number : prompts[0][0];
  const prompt = prompts.find(([one]) => one === shown)?.[1];
  const given = pairs.filter((one) => one.number === shown);
  const beside = given.find((one) => one.title === other);
  const without = beside?.file ?? table.base.get(shown)?.file;
  const withoutTitle = beside ? capital(beside.title) : "Base model";
  const withIt = table.at(at, shown)?.file;
  const shots = [
    without && { file: without, title: withoutTitle, prompt },
    withIt && { file: withIt, title: stepTitle(at), prompt },
  ].filter(Boolean);
  const pick = (index) => setChosen(live && index === steps.length - 1 ? null : steps[index]);
  return html`<div class="film">
    ${
      prompts.length > 1 &&
      html`<div class="chips" role="group" aria-label="Prompts">
        ${prompts.map(
          ([one, text]) => html`<button type="button" key=${one} class="chip" aria-pressed=${one === shown}
              onClick=${() => setNumber(one)}>
            ${text || "No prompt"}
          </button>`,
        )}
      </div>`
    }
    ${
      without && withIt
        ? html`<${Wipe} key=${shown} before=${source(without)} after=${source(withIt)}
          titles=${[withoutTitle, stepTitle(at)]} prompt=${prompt} />`
        : html`<figure class="alone">
          <img src=${source(without ?? withIt)} alt=${`${without ? withoutTitle : stepTitle(at)}: ${prompt}`} />
          <figcaption>
            ${without ? `${withoutTitle}.` : `${stepTitle(at)}.`}
            ${live && !withIt ? " Pictures with the LoRA follow." : ""}
          </figcaption>
        </figure>`
    }
    <div class="film-line">
      <p class="faint">${prompts.length > 1 ? "" : prompt}</p>
      ${
        given.length > 0 &&
        html`<label class="short">
          Beside <select value=${other} onChange=${(event) => setOther(event.currentTarget.value)}>
            <option value="base">Base model</option>
            ${given.map((one) => html`<option key=${one.title} value=${one.title}>${capital(one.title)}</option>`)}
          </select>
        </label>`
      }
      <button type="button" class="button small" onClick=${() => setLarge(shots.length - 1)}>Enlarge</button>
    </div>
    ${
      steps.length > 1 &&
      html`
        <div class="slider">
          <label for="film-step">Step</label>
          <input id="film-step" type="range" min="0" max=${steps.length - 1} value=${steps.indexOf(at)}
            aria-valuetext=${`step ${at}`} onInput=${(event) => pick(Number(event.currentTarget.value))} />
          <output>${whole(at)}${at === bestStep ? " (best)" : ""}</output>
        </div>
        <div class="film-strip" ref=${strip} role="group" aria-label="Pictures by step">
          ${steps.map(
            (step, index) => html`<button type="button" key=${step} class="film-shot" aria-pressed=${step === at}
                onClick=${() => pick(index)}>
              ${
                table.at(step, shown)
                  ? html`<img src=${source(table.at(step, shown).file)} alt="" loading="lazy" />`
                  : html`<span class="missing">–</span>`
              }
              <span>${stepTitle(step)}</span>
            </button>`,
          )}
        </div>
      `
    }
    ${
      large !== null &&
      html`<${Lightbox} shots=${shots} start=${Math.max(0, large)} source=${source} onClose=${() => setLarge(null)} />`
    }
  </div>`;
}

/**
 * Two pictures over each other, with a divider that is dragged, or moved with the arrow keys.
 *
 * @param titles what is on the left, and what is on the right
 */
export function Wipe({ before, after, titles, prompt }) {
  const [at, setAt] = useState(50);
  const [ratio, setRatio] = useState(1);
  const loaded = ({ currentTarget: { naturalWidth, naturalHeight } }) =>
    naturalHeight && setRatio(naturalWidth / naturalHeight);
  return html`<div class="wipe" style=${{ "--at": `${at}%`, "--ratio": ratio }}>
    <img src=${after} alt=${`${titles[1]}: ${prompt}`} onLoad=${loaded} draggable="false" />
    <img class="wipe-before" src=${before} alt=${`${titles[0]}: ${prompt}`} draggable="false" />
    <span class="wipe-line" aria-hidden="true"></span>
    <span class="wipe-title" aria-hidden="true">${titles[0]}</span>
    <span class="wipe-title right" aria-hidden="true">${titles[1]}</span>
    <input type="range" min="0" max="100" value=${at}
      aria-label=${`Divider: ${titles[0]} on its left, ${titles[1]} on its right`}
      aria-valuetext=${`${at} % ${titles[0]}`} onInput=${(event) => setAt(Number(event.currentTarget.value))} />
  </div>`;
}

function arranged(previews) {
  const shown = previews.filter((one) => one.strength === 0 || one.strength === 1);
  const prompts = [...new Map(shown.map((one) => [one.number, one.prompt]))].sort(([a], [b]) => a - b);
  const base = new Map(shown.filter((one) => one.strength === 0).map((one) => [one.number, one]));
  const drawn = new Map(shown.filter((one) => one.strength === 1).map((one) => [`${one.step} ${one.number}`, one]));
  const steps = [...new Set([...drawn.values()].map((one) => one.step))].sort((a, b) => a - b);
  return { prompts, base, steps, at: (step, number) => drawn.get(`${step} ${number}`) };
}
