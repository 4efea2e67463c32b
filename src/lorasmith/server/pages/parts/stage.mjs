// One picture as large as its place, with that of the base model under a divider.
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { Slider } from "./basics.mjs";
import { Icon } from "./icons.mjs";

/**
 * @param left address of what is on the left of the divider; null for one picture alone
 * @param layers [{src, share}]: the picture, and one over it that is mixed in by its share
 * @param titles what is on the left, and what is on the right
 * @param fades whether a new picture comes slowly over the one before
 */
export function Stage({ left, layers, titles, prompt, fades = false, children }) {
  const [at, setAt] = useState(50);
  const [ratio, setRatio] = useState(1);
  const [first] = layers;
  const before = useRef(/** @type {(string | null)[]} */ ([null, null]));
  if (before.current[1] !== first.src) before.current = [before.current[1], first.src];
  const loaded = ({ currentTarget: { naturalWidth, naturalHeight } }) =>
    naturalHeight && setRatio(naturalWidth / naturalHeight);
  useEffect(() => {
    if (left) new Image().src = left;
  }, [left]);
  return html`<div class="easel-place">
    <figure class=${`easel ${fades ? "fades" : ""}`} style=${{ "--at": `${left ? at : 0}%`, "--ratio": ratio }}>
      ${before.current[0] && html`<img key=${before.current[0]} src=${before.current[0]} alt="" draggable="false" />`}
      <img key=${first.src} class="easel-picture" src=${first.src} alt=${`${titles[1]}: ${prompt}`} onLoad=${loaded}
        draggable="false" />
      ${layers
        .slice(1)
        .map(
          ({ src, share }) => html`<img key="mixed" src=${src} alt="" style=${{ opacity: share }} draggable="false" />`,
        )}
      ${
        left &&
        html`
          <img key="left" class="easel-left" src=${left} alt=${`${titles[0]}: ${prompt}`} draggable="false" />
          <span class="easel-line" aria-hidden="true"><span><${Icon} name="engineer" /></span></span>
          <span class="easel-pill" aria-hidden="true">${titles[0]}</span>
          <span class="easel-pill right" aria-hidden="true">${titles[1]}</span>
          <input type="range" min="0" max="100" value=${at}
            aria-label=${t`Divider: ${titles[0]} on its left, ${titles[1]} on its right`}
            aria-valuetext=${`${at} % ${titles[0]}`} onInput=${(event) => setAt(Number(event.currentTarget.value))} />
        `
      }
      ${!left && html`<span class="easel-pill">${titles[1]}</span>`}
      ${children}
    </figure>
  </div>`;
}

/**
 * The steps of a run as a strip of pictures, one of which is chosen, also with the arrow keys.
 *
 * @param shots [{step, src}]
 * @param best the step that is recommended
 */
export function Strip({ shots, step, best, total, onStep }) {
  const strip = useRef(null);
  useEffect(() => {
    const box = strip.current;
    const center = () => {
      const button = box.querySelector("[aria-pressed=true]");
      if (!button) return;
      box.scrollTop = button.offsetTop - (box.clientHeight - button.clientHeight) / 2;
      box.scrollLeft = button.offsetLeft - (box.clientWidth - button.clientWidth) / 2;
    };
    const size = new ResizeObserver(center); // calls once at first, and when a phone is turned
    size.observe(box);
    return () => size.disconnect();
  }, [step, shots.length]);
  const turn = (event) => {
    const by = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const next = shots.findIndex((one) => one.step === step) + by;
    if (!shots[next]) return;
    onStep(shots[next].step);
    strip.current.querySelectorAll("button")[next].focus();
  };
  return html`<div class="strip-place">
    <div class="steps-strip" ref=${strip} role="group" aria-label="Pictures by step" onKeyDown=${turn}>
      ${shots.map(
        (one) => html`<button type="button" key=${one.step} class="strip-shot" aria-pressed=${one.step === step}
            aria-label=${one.step === best ? t`Step ${one.step}, recommended` : t`Step ${one.step}`}
            title=${t`Step ${one.step}`} onClick=${() => onStep(one.step)}>
          ${one.src ? html`<img src=${one.src} alt="" loading="lazy" />` : html`<span class="faint">${one.step}</span>`}
          ${one.step === best && html`<span class="best-mark"><${Icon} name="check" /></span>`}
        </button>`,
      )}
    </div>
    <p class="faint strip-words">
      ${step === null || step === undefined ? "" : total ? t`${step} of ${total}` : step}
    </p>
  </div>`;
}

/**
 * Strength as a slider over pictures that are drawn: while it is dragged it mixes the two beside it, and it rests on
 * the nearest.
 *
 * @param strengths that are drawn, in order
 * @param amount where it is
 */
export function StrengthSlider({ strengths, amount, onAmount, onRest, children }) {
  const turn = (event) => {
    const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const next = strengths[strengths.indexOf(amount) + by];
    if (next !== undefined) onRest(next);
  };
  return html`<div class="strength" onKeyDown=${turn}>
    ${
      strengths.length > 1
        ? html`<${Slider} label="Strength" min=${strengths[0]} max=${strengths.at(-1)} step="any" value=${amount}
            words=${amount === 0 ? t`without` : String(Number(amount.toFixed(2)))} onInput=${onAmount}
            onChange=${() => onRest(null)} />`
        : html`<span class="faint">Strength ${amount}</span>`
    }
    ${children}
  </div>`;
}
