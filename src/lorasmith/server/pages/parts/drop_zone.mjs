// A place for pictures: dropped, pasted or chosen, folders too.
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { filesOf, filesOfInput } from "../lib/uploads.mjs";

/** @param onFiles called with [{file, path}]; pictures may be dropped anywhere on the page while this is shown */
export function DropZone({ onFiles, big }) {
  const files = useRef(null);
  const folder = useRef(null);
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
      take.current(await filesOf(event.dataTransfer));
    };
    const pasted = (event) => {
      const some = [...(event.clipboardData?.files ?? [])];
      if (some.length) take.current(some.map((file) => ({ file, path: file.name })));
    };
    const listeners = { dragenter: entered, dragleave: left, dragover: allowed, drop: dropped, paste: pasted };
    for (const [name, listener] of Object.entries(listeners)) addEventListener(name, listener);
    return () => {
      for (const [name, listener] of Object.entries(listeners)) removeEventListener(name, listener);
    };
  }, []);

  const chosen = (event) => {
    take.current(filesOfInput(event.currentTarget));
    event.currentTarget.value = "";
  };
  return html`<div class=${`drop-zone ${big ? "big" : ""} ${over ? "over" : ""}`}>
    ${big && html`<svg class="drop-picture" viewBox="0 0 64 48" aria-hidden="true"><rect x="2" y="8" width="36" height="36" rx="4" /><rect x="14" y="4" width="46" height="38" rx="4" /><circle cx="27" cy="16" r="4" /><path d="M16 38l13-13 8 8 9-11 13 16" /></svg>`}
    <p><b>${over ? "Let go to add them" : big ? "Drop photos or a folder here" : "Drop more photos anywhere here"}</b></p>
    <div class="actions">
      <button type="button" class=${`button ${big ? "primary" : ""}`} onClick=${() => files.current.click()}>Choose photos</button>
      <button type="button" class="button" onClick=${() => folder.current.click()}>Choose a folder</button>
    </div>
    <input ref=${files} type="file" multiple accept="image/*,.heic,.heif,.avif,.jxl,.txt" class="unseen" tabindex="-1" aria-label="Photos" onChange=${chosen} />
    <input ref=${folder} type="file" multiple webkitdirectory class="unseen" tabindex="-1" aria-label="A folder of photos" onChange=${chosen} />
  </div>`;
}
