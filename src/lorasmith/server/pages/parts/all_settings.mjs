// Every setting, made from its declaration: a control that fits its type, its help, and whether it was changed.
import { html, useEffect, useState } from "../lib/html.mjs";
import { t, translated } from "../lib/language.mjs";
import { count, nameWords, valueWords } from "../lib/words.mjs";
import { Field } from "./basics.mjs";

/**
 * Declared settings and presets, with their texts in the language of the page.
 *
 * @param {Api.SettingsAnswer} answer
 */
export const inWords = ({ groups, presets }) => ({
  groups: groups.map(({ title, settings }) => ({
    title: translated(title),
    settings: settings.map((one) => ({ ...one, label: translated(one.label), help: translated(one.help) })),
  })),
  presets: presets.map((one) => ({ ...one, title: translated(one.title), summary: translated(one.summary) })),
});

/**
 * @param {Props<{ groups: Api.SettingGroup[] }>} props
 *   `groups`: declared settings; `hidden` names those that are asked for elsewhere
 *   `base`: values of the chosen preset; `own` other values, of which those of the names `given` were not changed here
 *   `onChange`: called with the changed values
 */
export function AllSettings({ groups, hidden, base, own, given, error, onChange }) {
  const [wanted, setWanted] = useState("");
  const isChanged = (name) => name in own && !given.includes(name);
  const changed = Object.keys(own).filter(isChanged).length;
  const matching = (one) =>
    !hidden.has(one.name) &&
    (!wanted || `${one.name} ${one.label} ${one.help}`.toLowerCase().includes(wanted.toLowerCase()));
  const shown = groups
    .map((group) => ({ ...group, settings: group.settings.filter(matching) }))
    .filter((group) => group.settings.length);
  const set = (name, value) => {
    const next = { ...own };
    if (value === undefined) delete next[name];
    else next[name] = value;
    onChange(next);
  };
  const undoAll = () => onChange(Object.fromEntries(Object.entries(own).filter(([name]) => !isChanged(name))));
  const control = (one) => html`<${Setting} key=${one.name} setting=${one} preset=${base[one.name]}
    value=${own[one.name]} isMarked=${isChanged(one.name)} error=${error}
    onChange=${(value) => set(one.name, value)} />`;
  const main = shown.flatMap((group) => group.settings.filter((one) => one.main));
  return html`<section class="all-settings">
    <details>
      <summary>
        <h2>All settings</h2>${changed > 0 && html`<span class="tag">${count(changed, "change")}</span>`}
      </summary>
      <div class="tools">
        <label class="search">
          <span class="unseen">Search settings</span>
          <input type="search" placeholder="Search" value=${wanted}
            onInput=${(event) => setWanted(event.currentTarget.value)} />
        </label>
        ${changed > 0 && html`<button type="button" class="button small" onClick=${undoAll}>Undo all changes</button>`}
      </div>
      ${!shown.length && html`<p class="faint">No setting has these words.</p>`}
      ${
        main.length > 0 &&
        html`<fieldset><legend>The most important</legend><div class="fields two">${main.map(control)}</div></fieldset>`
      }
      ${shown.map((group) => {
        const rest = group.settings.filter((one) => !one.main);
        const touched = rest.filter((one) => isChanged(one.name)).length;
        return (
          rest.length > 0 &&
          html`<details class="group" key=${group.title} open=${wanted !== "" || touched > 0}>
            <summary>
              ${group.title}${touched > 0 && html` <span class="tag">${count(touched, "change")}</span>`}
            </summary>
            <div class="fields two" role="group" aria-label=${group.title}>${rest.map(control)}</div>
          </details>`
        );
      })}
    </details>
  </section>`;
}

/** Shows the first field whose text is not a value, and gives it the focus; whether there is one. */
export function shownInvalid() {
  const field = /** @type {HTMLElement | null} */ (document.querySelector('.all-settings [aria-invalid="true"]'));
  for (let box = field?.closest("details"); box; box = box.parentElement?.closest("details")) box.open = true;
  field?.focus();
  return field !== null;
}

/** @param {Props<{ setting: Api.SettingAnswer }>} props */
function Setting({ setting, preset, value, isMarked, error, onChange }) {
  const standard = preset ?? setting.default;
  const current = value ?? standard;
  const isChanged = value !== undefined;
  const [typed, setTyped] = useState(null); // what stands in the field while it is typed, or is not a valid value
  const [isWrong, setIsWrong] = useState(false);
  const problem = isWrong
    ? rangeOf(setting)
    : isChanged && error?.message?.toLowerCase().startsWith(setting.name)
      ? error.message
      : null;
  const label = html`
    ${setting.label || nameWords(setting.name)}${isMarked && html` <span class="tag">changed</span>`}
  `;
  const choose = (next) => onChange(next === standard ? undefined : next);
  useEffect(() => void (isWrong || setTyped(null)), [value]); // chosen elsewhere, too
  const back = () => {
    setTyped(null);
    setIsWrong(false);
    onChange(undefined);
  };
  const type = (event) => {
    const text = event.currentTarget.value;
    if (text.trim() === "") {
      back();
      return;
    }
    const found = typedValue(setting, text);
    const valid = found !== undefined;
    setTyped(valid ? null : text);
    setIsWrong(!valid);
    if (valid) choose(found);
  };
  const reset =
    isChanged && html`<button type="button" class="as-link" onClick=${back}>Back to ${valueWords(standard)}</button>`;
  const help = html`${setting.help} ${reset}`;
  if (setting.type === "boolean") {
    return html`<${Field} label=${label} help=${help} error=${problem} class="switch">
      ${(attributes) =>
        html`<input ...${attributes} type="checkbox" checked=${current === true}
          onChange=${(event) => choose(event.currentTarget.checked)} />`}
    <//>`;
  }
  if (setting.choices?.length) {
    return html`<${Field} label=${label} help=${help} error=${problem}>
      ${(attributes) =>
        html`<select ...${attributes} value=${current ?? ""}
            onChange=${(event) => choose(event.currentTarget.value || undefined)}>
          ${(standard === null || standard === undefined) && html`<option value="">automatic</option>`}
          ${setting.choices.map((choice) => html`<option key=${choice} value=${choice}>${choice}</option>`)}
        </select>`}
    <//>`;
  }
  return html`<${Field} label=${label} help=${help} error=${problem}>
    ${(attributes) =>
      html`<input ...${attributes} type="text" inputmode=${{ integer: "numeric", number: "decimal" }[setting.type]}
        autocomplete="off" spellcheck=${false} value=${typed ?? (isChanged ? value : (standard ?? ""))}
        placeholder=${standard === null || standard === undefined ? t`automatic` : ""}
        onInput=${(event) => setTyped(event.currentTarget.value)} onChange=${type} />`}
  <//>`;
}

/** The value that a text is for a setting; undefined if it is none. */
export function typedValue({ type, choices, min, max }, text) {
  if (type === "boolean") return { on: true, off: false }[text];
  if (choices?.length) return choices.find((one) => one.toLowerCase() === text.toLowerCase());
  if (type === "text") return text;
  const found = Number(text);
  const isOutside =
    !Number.isFinite(found) ||
    (type === "integer" && !Number.isInteger(found)) ||
    (min !== null && found < min) ||
    (max !== null && found > max);
  return isOutside ? undefined : found;
}

/** What values a setting takes, in a sentence. */
export function rangeOf({ type, choices, min, max }) {
  if (type === "boolean") return t`Must be on or off.`;
  if (choices?.length) return t`Must be one of ${choices.join(", ")}.`;
  const what = type === "integer" ? t`a whole number` : t`a number`;
  if (min !== null && max !== null) return t`Must be ${what} between ${min} and ${max}.`;
  if (min !== null) return t`Must be ${what} of at least ${min}.`;
  return max !== null ? t`Must be ${what} of at most ${max}.` : t`Must be ${what}.`;
}
