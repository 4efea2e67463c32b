// The way from photos to a LoRA: which step this is, and the bar that leads on.
import { html } from "../lib/html.mjs";
import { link } from "../lib/router.mjs";

const STEPS = ["photos", "model", "settings", "training", "result"];
const TITLES = { photos: "Photos", model: "Model", settings: "Settings", training: "Training", result: "Result" };

/** @param at name of the step; `dataset` makes the steps before it links; `addresses` those of other steps */
export function Stepper({ at, dataset, addresses = {} }) {
  const now = STEPS.indexOf(at);
  return html`<nav class="stepper" aria-label="Steps to a LoRA">
    <ol>
      ${STEPS.map((step, index) => {
        const address = addresses[step] ?? (dataset && index < 3 ? link("new", dataset, step) : null);
        const state = index < now ? "done" : index === now ? "now" : "ahead";
        const inside = html`
          <span class="step-number" aria-hidden="true">${index < now ? "✓" : index + 1}</span>
          <span class="step-title">${TITLES[step]}</span>
        `;
        return html`<li class=${state} key=${step} aria-current=${index === now ? "step" : undefined}>
          ${address && index !== now ? html`<a href=${address}>${inside}</a>` : html`<span>${inside}</span>`}
        </li>`;
      })}
    </ol>
  </nav>`;
}

/** The bar at the lower edge with what comes next. */
export const NextBar = ({ children, note }) => html`<div class="next-bar">
  <p class="next-note">${note}</p><div class="actions">${children}</div>
</div>`;
