// A place for pictures: dropped, pasted or chosen, folders too.
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { canDrop, filesOf, filesOfInput, useAccept } from "../lib/uploads.mjs";
import { Icon } from "./icons.mjs";

/**
 * Takes pictures that are dropped or pasted anywhere on the page; returns whether some are held over it.
 *
 * @param onFiles called with [{file, path}], and with the place that they were dropped on (its `data-before`: "" for
 *   the zone of the other pictures of pairs, or a picture's name), null for any other
 */
export function useDrops(onFiles) {
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
  return over;
}

export const DROP_HERE = canDrop ? t`Drop photos or a folder here` : t`Your photos`;

/** The place for the first pictures. @param over whether some are held over the page */
export const Zone = ({ over, onFiles }) => html`<div class=${`drop-zone big ${over ? "over" : ""}`}>
  <${Icon} name="plus" /><p><b>${over ? t`Let go to add them` : DROP_HERE}</b></p>
  <${ChooseFiles} kind="primary" onFiles=${(found) => onFiles(found, null)} />
</div>`;

/** The zones of pairs: the left one is for the other pictures. @param pairs words of `PAIRS` */
export const PairZones = ({ over, pairs, onFiles }) => html`<div class="pair-zones">
  ${pairs.zones.map(
    ([text, help], index) => html`<div key=${text} class=${`drop-zone ${over ? "over" : ""}`}
        data-before=${index ? undefined : ""}>
      <p><b>${text}</b> <span class="faint">${help}</span></p>
      <${ChooseFiles} what=${index ? pairs.main : pairs.others} isNamed
        onFiles=${(found) => onFiles(found, index ? null : "")} />
    </div>`,
  )}
</div>`;

/**
 * Buttons that choose pictures, or a folder of them.
 *
 * @param isMore whether there are some already; `what` they are called, `isNamed` where several of these are on a page
 */
export function ChooseFiles({ kind = "", isMore = false, what = "", isNamed = false, onFiles }) {
  const files = useRef(null);
  const folder = useRef(null);
  const accept = useAccept(true);
  const photos = isMore ? t`Add photos` : t`Choose photos`;
  const directory = isMore ? t`Add a folder` : t`Choose a folder`;
  const chosen = (event) => {
    onFiles(filesOfInput(event.currentTarget));
    event.currentTarget.value = "";
  };
  return html`<div class="actions">
    <button type="button" class=${`button small ${kind}`} aria-label=${isNamed ? `${photos}: ${what}` : undefined}
        onClick=${() => files.current.click()}>
      ${photos}
    </button>
    <button type="button" class="button small" aria-label=${isNamed ? `${directory}: ${what}` : undefined}
        onClick=${() => folder.current.click()}>
      ${directory}
    </button>
    <input ref=${files} type="file" multiple accept=${accept} hidden onChange=${chosen} />
    <input ref=${folder} type="file" multiple webkitdirectory hidden onChange=${chosen} />
  </div>`;
}
