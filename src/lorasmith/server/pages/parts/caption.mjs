// The words of one photo, stored as they are typed.
import { html, useEffect, useId, useRef, useState } from "../lib/html.mjs";
import { nameOf, textsOf, withText } from "../lib/json_caption.mjs";
import { t } from "../lib/language.mjs";
import { Elsewhere } from "./basics.mjs";

const STORE_AFTER_MS = 900;

/** Whether a caption was not stored because it is another one now than this page has shown. */
export const isStale = (failure) => failure.kind === "StaleCaptionError";

/**
 * A caption, or the texts of one in JSON, stored a moment after typing, and when the field is left; one that was
 * changed elsewhere waits for a choice.
 */
export function Caption({ name, caption, trigger, isEdited, onCaption }) {
  const [text, setText] = useState(null); // null: as stored
  const [failed, setFailed] = useState(null); // why it was not stored
  const [isWhole, setWhole] = useState(() => textsOf(caption) === null); // whether it is one field, even if in JSON
  const [other, setOther] = useState(null); // what was stored elsewhere meanwhile
  const waits = useRef(false);
  const id = useId();
  const timer = useRef(0);
  const latest = useRef(null);
  const field = useRef(null);
  useEffect(() => {
    if (!isEdited) return;
    field.current?.focus({ preventScroll: true });
    field.current?.scrollIntoView({ block: "center" });
  }, [isEdited]);
  const begun = useRef(null); // the caption that was there when typing began, whatever arrives meanwhile
  latest.current = text;
  if (text === null) begun.current = caption;
  const store = async () => {
    clearTimeout(timer.current);
    const typed = latest.current;
    if (typed === null || typed === begun.current || waits.current) return;
    try {
      await onCaption(typed, begun.current);
      begun.current = typed;
      setFailed(null);
      if (latest.current === typed) setText(null);
    } catch (failure) {
      waits.current = isStale(failure);
      if (waits.current) setOther((begun.current = Object.values(failure.details)[0]));
      else setFailed(failure);
    }
  };
  const choose = (mine) => {
    waits.current = false;
    setOther(null);
    if (mine) return store();
    setText(null);
  };
  useEffect(() => () => void store(), []);
  const type = (typed) => {
    setText(typed);
    latest.current = typed;
    clearTimeout(timer.current);
    timer.current = setTimeout(store, STORE_AFTER_MS);
  };
  const shown = text ?? caption;
  const texts = textsOf(shown) ?? [];
  const areFields = texts.length > 0 && !isWhole;
  return html`
    ${
      areFields
        ? html`<fieldset class="texts">
            <legend class="unseen">Caption of ${name}</legend>
            ${texts.map(
              (one, index) => html`<label key=${index}>
                <span>${nameOf(one.path)}</span>
                <textarea ref=${index ? undefined : field} rows="2" class="caption" value=${one.text}
                  onInput=${(event) => type(withText(shown, one, event.currentTarget.value))}
                  onBlur=${store}></textarea>
              </label>`,
            )}
          </fieldset>`
        : html`<label class="unseen" for=${id}>Caption of ${name}</label>
            <textarea ref=${field} id=${id} rows="4" class="caption" value=${shown}
              placeholder=${trigger ? t`Only “${trigger}”` : t`What is in the picture?`}
              onInput=${(event) => type(event.currentTarget.value)} onBlur=${store}
              aria-invalid=${failed ? "true" : undefined}></textarea>`
    }
    ${
      texts.length > 0 &&
      html`<button type="button" class="as-link" onClick=${() => setWhole(!isWhole)}>
        ${isWhole ? t`Show its fields` : t`Show it as JSON`}
      </button>`
    }
    ${other !== null && html`<${Elsewhere} there=${other} onChoose=${choose} what="caption" />`}
    ${
      failed &&
      html`<p class="field-error" role="alert">
        This caption is not
        stored. ${failed.message} <button type="button" class="as-link" onClick=${store}>Try again</button>
      </p>`
    }
  `;
}
