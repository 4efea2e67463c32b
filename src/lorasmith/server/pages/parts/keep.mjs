// "Keep this one": the file, a copy for ComfyUI, a picture to share that is seen before it is saved, and a folder for
// the hub.
import { address, fileOfRun, post } from "../lib/api.mjs";
import { html, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { say } from "../lib/stores.mjs";
import { bytes, whole } from "../lib/words.mjs";
import { Button, Dialog, Field, Loading, Problem } from "./basics.mjs";
import { HubFolder } from "./hub_folder.mjs";
import { Icon } from "./icons.mjs";
import { nameOfRun } from "./run_card.mjs";

/**
 * @param {Props<{ run: Api.RunAnswer, file: string, step: number | null, picture: string | null }>} props
 *   `file`: the LoRA that is kept, of `step`
 */
export function Keep({ run, file, step, picture, onClose, onDone }) {
  const last = run.saves.length ? Math.max(...run.saves.map((one) => one.step)) : null;
  const size = run.saves.find((one) => one.file === file)?.bytes ?? run.recommended?.bytes ?? 0;
  const [name, setName] = useState("");
  const [shared, setShared] = useState(""); // "picture" or "folder"
  const [isBroken, setBroken] = useState(false);
  const [isThere, setThere] = useState(false);
  const [error, setError] = useState(null);
  const hasCard = run.recommended?.is_judged || run.previews.length > 0;
  const card = address(["runs", run.id, "card"]);
  const install = async () => {
    setError(null);
    try {
      const body = { step: step === last ? null : step, name: name.trim() };
      const { installed, was_there: wasThere } = await post(["runs", run.id, "install"], body);
      say(
        wasThere
          ? t`${installed} was in the folder models/loras already.`
          : t`Copied as ${installed} into the folder models/loras.`,
      );
      onDone();
      onClose();
    } catch (failure) {
      setError(failure);
    }
  };
  return html`<${Dialog} title=${step ? t`Keep step ${whole(step)}` : t`Keep it`} onClose=${onClose} wide="keep-dialog">
    ${shared === "folder" && html`<${HubFolder} run=${run} step=${step} onBack=${() => setShared("")} />`}
    ${
      shared === "picture" &&
      html`
          ${
            isBroken
              ? html`<p>There are no pictures for it yet. Draw some first.</p>`
              : html`<img class="share-card" src=${card} alt="The picture to share" 
                  onError=${() => setBroken(true)} onLoad=${() => setThere(true)} />`
          }
          ${!isBroken && !isThere && html`<${Loading} what="the picture" />`}
          <div class="actions end">
            <${Button} onClick=${() => setShared("")}>Back<//>
            ${
              !isBroken &&
              html`<a class="button primary" href=${card} download=${`${nameOfRun(run)}.png`}>Save the picture</a>`
            }
          </div>
        `
    }
    ${
      !shared &&
      html`
          <div class="keep">
            ${picture && html`<img src=${picture} alt="" />`}
            <div>
              ${run.subject && html`<p>Write ${html`<b>${run.subject}</b>`} in your prompts.</p>`}
              <div class="keep-ways">
                <a class="button primary" href=${fileOfRun(run.id, file)} download autofocus>
                  <${Icon} name="download" /> Download the file <small>${bytes(size)}</small>
                </a>
                <${Button} onClick=${install}><${Icon} name="check" /> Copy to ComfyUI<//>
                ${
                  hasCard &&
                  html`<${Button} onClick=${() => setShared("picture")}><${Icon}
                    name="share" /> Share a picture<//>`
                }
                <${Button} onClick=${() => setShared("folder")}><${Icon} name="share" /> Share it on Hugging Face<//>
              </div>
              <p class="faint">The file is called ${file}. Here it is in the folder ${run.id}.</p>
              ${
                run.lora?.installed &&
                html`<p class="faint">ComfyUI has it already, as ${run.lora.installed} in the folder models/loras.</p>`
              }
              <${Field} label="Name in ComfyUI" optional>
                ${(attributes) => html`<input ...${attributes} type="text" maxlength="100" value=${name}
                  placeholder=${file} onInput=${(event) => setName(event.currentTarget.value)} />`}
              <//>
              <${Problem} error=${error} />
            </div>
          </div>
        `
    }
  <//>`;
}
