// What somebody keeps of a run: its title, a star and a note; and its removal, which can be undone.
import { post, put, remove } from "../lib/api.mjs";
import { html, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { said, say } from "../lib/stores.mjs";
import { Field, Question } from "./basics.mjs";
import { Icon } from "./icons.mjs";
import { nameOfRun } from "./run_card.mjs";

/**
 * A button that stars a run.
 *
 * @param {Props<{ run: Api.RunAnswer | Api.RunRow }>} props
 */
export function Star({ run, onChange }) {
  const star = () =>
    said(async () => {
      await put(["runs", run.id, "marks"], { starred: !run.starred });
      await onChange();
    });
  return html`<button type="button" class="icon-button star" aria-label=${t`Star ${nameOfRun(run)}`}
      aria-pressed=${run.starred ? "true" : "false"} title=${run.starred ? t`Starred` : t`Star`} onClick=${star}>
    <${Icon} name="star" filled=${run.starred} />
  </button>`;
}

/** @param {Props<{ run: Api.RunAnswer | Api.RunRow }>} props */
export function EditMarks({ run, onClose, onDone }) {
  const [title, setTitle] = useState(
    run.label ===
      run.id
        .split("/")
        .slice(run.id.startsWith("output/") ? 2 : 1)
        .join("/")
      ? ""
      : run.label,
  );
  const [note, setNote] = useState(run.note ?? "");
  const store = async () => {
    await put(["runs", run.id, "marks"], { title, note });
    onDone();
  };
  return html`<${Question} title="Name and note" yes="Store" onYes=${store} onClose=${onClose}>
    <${Field} label="Name" optional help="The folder and the LoRA keep theirs.">
      ${(attributes) => html`<input ...${attributes} type="text" maxlength="100" value=${title}
        placeholder=${run.id.split("/").pop()} onInput=${(event) => setTitle(event.currentTarget.value)} />`}
    <//>
    <${Field} label="Note" optional>
      ${(attributes) => html`<textarea ...${attributes} rows="4" maxlength="4000" value=${note}
        onInput=${(event) => setNote(event.currentTarget.value)}></textarea>`}
    <//>
  <//>`;
}

/** Moves a run to the removed things; `onDone` is called then, and with true when it is back. */
export const removeRun = (run, onDone) =>
  said(async () => {
    const { removed } = await remove(["runs", run.id]);
    onDone(false);
    const undo = async () => {
      await post(["runs", run.id, "restore"], { removed });
      onDone(true);
    };
    say(t`${nameOfRun(run)} was moved to the removed files.`, { undo: () => said(undo) });
  });
