// The way from photos to a LoRA: which step this is, and the bar that leads on.
import { html } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { link } from "../lib/router.mjs";

/** What the steps are called. */
export const STEPS = {
  photos: t`Photos`,
  model: t`Model`,
  settings: t`Settings`,
  training: t`Training`,
  result: t`Result`,
};

/** @param at name of the step; `dataset` makes the steps before it links; `addresses` those of other steps */
export const Stepper = ({ at, dataset, addresses = {} }) => html`<nav class="stepper" aria-label="Steps to a LoRA">
  <ol>
    ${Object.entries(STEPS).map(([step, title], index) => {
      const address = addresses[step] ?? (dataset && index < 3 ? link("new", dataset, step) : null);
      return html`<li key=${step} class=${step === at ? "now" : ""} aria-current=${step === at ? "step" : undefined}>
        ${address && step !== at ? html`<a href=${address}>${title}</a>` : title}
      </li>`;
    })}
  </ol>
</nav>`;

/** The bar at the lower edge with what comes next. */
export const NextBar = ({ children, note }) => html`<div class="next-bar">
  <p class="next-note">${note}</p><div class="actions">${children}</div>
</div>`;
