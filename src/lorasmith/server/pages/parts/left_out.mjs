// Files that were dropped and not added, with the reason of each.
import { html } from "../lib/html.mjs";
import { useStore } from "../lib/stores.mjs";
import { leftOut } from "../lib/uploads.mjs";
import { count } from "../lib/words.mjs";
import { Button, Notice } from "./basics.mjs";

const LISTED = 4; // reasons that are in sight
const NAMED = 3; // files of one reason

export function LeftOut({ dataset }) {
  const files = useStore(leftOut)[dataset] ?? [];
  if (!files.length) return null;
  const lines = [...Map.groupBy(files, ({ reason }) => reason)].map(
    ([reason, [first, ...others]]) => html`<li key=${reason}>
      <b>${first.name}</b> ${reason}${reason.endsWith(".") ? "" : "."}
      ${
        others.length > 0 &&
        html` <span class="faint">
            Also ${others
              .slice(0, NAMED)
              .map(({ name }) => name)
              .join(", ")}
            ${others.length > NAMED ? ` and ${others.length - NAMED} more` : ""}.
          </span>
        `
      }
    </li>`,
  );
  return html`<${Notice} mood="fair">
    <div class="head">
      <b>${count(files.length, "file was", "files were")} not added</b>
      <${Button} class="small" aria-label="Close the list of files that were not added"
          onClick=${() => leftOut.set((all) => ({ ...all, [dataset]: [] }))}>
        Close
      <//>
    </div>
    <ul class="file-list">${lines.slice(0, LISTED)}</ul>
    ${
      lines.length > LISTED &&
      html`<details>
        <summary>${count(lines.length - LISTED, "more reason")}</summary>
        <ul class="file-list">${lines.slice(LISTED)}</ul>
      </details>`
    }
  <//>`;
}
