// The way from photos to a LoRA: which step this is, and the bar that leads on.
import { html } from "../lib/html.mjs";
import { link } from "../lib/router.mjs";
import { capital } from "../lib/words.mjs";

const STEPS = ["photos", "model", "settings", "training", "result"];

/** @param at name of the step; `dataset` makes the steps before it links; `addresses` those of other steps */
export const Stepper = ({ at, dataset, addresses = {} }) => html`<nav class="stepper" aria-label="Steps to a LoRA">
  <ol>
    ${STEPS.map((step, index) => {
      const address = addresses[step] ?? (dataset && index < 3 ? link("new", dataset, step) : null);
      return html`<li key=${step} class=${step === at ? "now" : ""} aria-current=${step === at ? "step" : undefined}>
        ${address && step !== at ? html`<a href=${address}>${capital(step)}</a>` : capital(step)}
      </li>`;
    })}
  </ol>
</nav>`;

/** The bar at the lower edge with what comes next. */
export const NextBar = ({ children, note }) => html`<div class="next-bar">
  <p class="next-note">${note}</p><div class="actions">${children}</div>
</div>`;
