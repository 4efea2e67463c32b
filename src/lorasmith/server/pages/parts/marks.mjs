// What somebody keeps of a run: its title, a star and a note; and its removal, which can be undone.
import { post, put, remove } from "../lib/api.mjs";
import { html, useState } from "../lib/html.mjs";
import { say } from "../lib/stores.mjs";
import { Button, Dialog, Field, Problem } from "./basics.mjs";
import { nameOfRun } from "./run_card.mjs";

/** A button that stars a run. */
export function Star({ run, onChange }) {
  const star = async () => {
    try {
      await put(["runs", run.id, "marks"], { starred: !run.starred });
      await onChange();
    } catch (failure) {
      say(failure.message, { mood: "bad" });
    }
  };
  return html`<button type="button" class="icon-button star" aria-label=${`Star ${nameOfRun(run)}`}
      aria-pressed=${run.starred ? "true" : "false"} title=${run.starred ? "Starred" : "Star"} onClick=${star}>
    ${run.starred ? "★" : "☆"}
  </button>`;
}

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
  const [error, setError] = useState(null);
  const store = async () => {
    try {
      await put(["runs", run.id, "marks"], { title, note });
      onDone();
      onClose();
    } catch (failure) {
      setError(failure);
    }
  };
  return html`<${Dialog} title="Name and note" onClose=${onClose}>
    <${Field} label="Name" optional help="The folder and the LoRA keep theirs.">
      ${(attributes) => html`<input ...${attributes} type="text" maxlength="100" value=${title}
        placeholder=${run.id.split("/").pop()} onInput=${(event) => setTitle(event.currentTarget.value)} />`}
    <//>
    <${Field} label="Note" optional>
      ${(attributes) => html`<textarea ...${attributes} rows="4" maxlength="4000" value=${note}
        onInput=${(event) => setNote(event.currentTarget.value)}></textarea>`}
    <//>
    <${Problem} error=${error} />
    <div class="actions end">
      <${Button} onClick=${onClose}>Cancel<//><${Button} kind="primary" onClick=${store}>Store<//>
    </div>
  <//>`;
}

/** Moves a run to the removed things; `onDone` is called then, and with true when it is back. */
export async function removeRun(run, onDone) {
  try {
    const { removed } = await remove(["runs", run.id]);
    onDone(false);
    const undo = async () => {
      try {
        await post(["runs", run.id, "restore"], { removed });
        onDone(true);
      } catch (failure) {
        say(failure.message, { mood: "bad" });
      }
    };
    say(`${nameOfRun(run)} was moved to the removed files.`, { undo });
  } catch (failure) {
    say(failure.message, { mood: "bad" });
  }
}
