// A place for pictures: dropped, pasted or chosen, folders too.
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { filesOf, filesOfInput, useAccept } from "../lib/uploads.mjs";
import { capital } from "../lib/words.mjs";

/**
 * @param onFiles called with [{file, path}], and with the place that they were dropped on (its `data-before`: "" for
 *   the zone of the other pictures of pairs, or a picture's name), null for any other: pictures may be dropped anywhere
 *   on the page while this is shown
 * @param pairs words of `PAIRS` for two zones; null for one
 */
export function DropZone({ onFiles, big, pairs }) {
  const [over, setOver] = useState(false);
  const take = useRef(onFiles);
  take.current = onFiles;

  useEffect(() => {
    let depth = 0;
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    const entered = (event) => hasFiles(event) && (depth += 1) && setOver(true);
    const left = (event) => hasFiles(event) && (depth -= 1) <= 0 && setOver(false);
    const allowed = (event) => hasFiles(event) && event.preventDefault();
    const dropped = async (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      depth = 0;
      setOver(false);
      const before = event.target.closest?.("[data-before]")?.dataset.before ?? null;
      take.current(await filesOf(event.dataTransfer), before);
    };
    const pasted = (event) => {
      const some = [...(event.clipboardData?.files ?? [])];
      if (some.length)
        take.current(
          some.map((file) => ({ file, path: file.name })),
          null,
        );
    };
    const listeners = { dragenter: entered, dragleave: left, dragover: allowed, drop: dropped, paste: pasted };
    for (const [name, listener] of Object.entries(listeners)) addEventListener(name, listener);
    return () => {
      for (const [name, listener] of Object.entries(listeners)) removeEventListener(name, listener);
    };
  }, []);

  if (!pairs) {
    return html`<${Zone} big=${big} over=${over} onFiles=${(found) => onFiles(found, null)} what="photos"
      text=${over ? "Let go to add them" : big ? "Drop photos or a folder here" : "Drop more photos anywhere here"} />`;
  }
  return html`<div class="pair-zones">
    ${pairs.zones.map(
      ([text, help], index) => html`<${Zone} key=${text} before=${index === 0} over=${over}
        onFiles=${(found) => onFiles(found, index ? null : "")} what=${index ? pairs.main : pairs.others}
        text=${text} help=${help} />`,
    )}
  </div>`;
}

function Zone({ before, big, over, onFiles, text, help, what }) {
  const files = useRef(null);
  const folder = useRef(null);
  const accept = useAccept(true);
  const chosen = (event) => {
    onFiles(filesOfInput(event.currentTarget));
    event.currentTarget.value = "";
  };
  return html`<div class=${`drop-zone ${big ? "big" : ""} ${over ? "over" : ""}`}
      data-before=${before ? "" : undefined}>
    ${
      big &&
      html`<svg class="drop-picture" viewBox="0 0 64 48" aria-hidden="true">
        <rect x="2" y="8" width="36" height="36" rx="4" /><rect x="14" y="4" width="46" height="38" rx="4" />
        <circle cx="27" cy="16" r="4" /><path d="M16 38l13-13 8 8 9-11 13 16" />
      </svg>`
    }
    <p class=${help ? "zone-title" : big ? "" : "by-mouse"}>
      <b>${text}</b>${help && html`<span class="faint">${help}</span>`}
    </p>
    <div class="actions">
      <button type="button" class=${`button ${big ? "primary" : ""}`}
          aria-label=${help ? `Choose ${what}` : undefined} onClick=${() => files.current.click()}>
        Choose photos
      </button>
      <button type="button" class="button" aria-label=${help ? `Choose a folder of ${what}` : undefined}
          onClick=${() => folder.current.click()}>
        Choose a folder
      </button>
    </div>
    <input ref=${files} type="file" multiple accept=${accept} class="unseen" tabindex="-1"
      aria-label=${capital(what)} onChange=${chosen} />
    <input ref=${folder} type="file" multiple webkitdirectory class="unseen" tabindex="-1"
      aria-label=${`A folder of ${what}`} onChange=${chosen} />
  </div>`;
}
