// Views of a training that is not started yet: shown when the server's draft of it is here, or when there is no such
// folder.
import { loadDraft } from "../lib/drafts.mjs";
import { html } from "../lib/html.mjs";
import { Loading, Problem, useLoaded } from "./basics.mjs";

/** @param view the component to show, with `dataset` and other properties */
export function WithDraft({ dataset, view: View, ...props }) {
  const [isLoaded, error, reload] = useLoaded((signal) => loadDraft(dataset, signal).then(() => true), [dataset]);
  if (isLoaded) return html`<${View} dataset=${dataset} ...${props} />`;
  if (error?.status === 404) {
    return html`<section>
      <h1>No photos here</h1>
      <p>There is no folder of photos that is called “${dataset}”. It may have been removed or renamed.</p>
      <div class="actions"><a class="button primary" href="#/">Choose or add photos</a></div>
    </section>`;
  }
  return html`<section>
    ${error ? html`<h1>Photos</h1><${Problem} error=${error} onRetry=${reload} />` : html`<${Loading} what="photos" />`}
  </section>`;
}
