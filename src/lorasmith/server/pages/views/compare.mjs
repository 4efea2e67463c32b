// Runs beside one another: the same prompt from the same noise, large, under a divider.
import { fileOfRun, get } from "../lib/api.mjs";
import { html, useMemo, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { link } from "../lib/router.mjs";
import { measured, valueWords, whole } from "../lib/words.mjs";
import { Drawer, Loading, Panel, Problem, useLoaded } from "../parts/basics.mjs";
import { Curves, LINE_COLORS } from "../parts/curves.mjs";
import { Icon } from "../parts/icons.mjs";
import { nameOfRun } from "../parts/run_card.mjs";
import { nearest, pictureAt, previewScenes, stepsOf, strengthsOf } from "../parts/scenes.mjs";
import { Stage } from "../parts/stage.mjs";

export const MOST_COMPARED = LINE_COLORS.length;
const MOST_OFFERED = 24;

export function CompareView({ ids }) {
  const wanted = ids.slice(0, MOST_COMPARED);
  const [runs, error, reload] = useLoaded(
    (signal) => Promise.all(wanted.map((id) => get(["runs", id], {}, signal))),
    [wanted.join("\n")],
  );
  if (error && !runs)
    return html`<section>
      <h1>Comparison</h1><${Problem} error=${error} onRetry=${reload} /><a href=${link("runs")}>All runs</a>
    </section>`;
  if (!runs) return html`<section><${Loading} what="runs" /></section>`;
  return html`<${Compared} runs=${runs} />`;
}

/** @param {Props<{ runs: Api.RunAnswer[] }>} props */
function Compared({ runs }) {
  const names = runs.map(nameOfRun);
  const scenes = useMemo(() => runs.map((run) => previewScenes(run.previews)), [runs]);
  const prompts = [...new Set(scenes.flatMap((all) => all.map((one) => one.prompt)))];
  const shared = prompts.filter((prompt) => scenes.every((all) => all.some((one) => one.prompt === prompt)));
  const [prompt, setPrompt] = useState(shared[0] ?? prompts[0]);
  const [sides, setSides] = useState(runs.length > 1 ? ["0", "1"] : ["base", "0"]);
  const [isDrawer, setDrawer] = useState(false);
  const shot = (side) => {
    const place = side === "base" ? scenes.findIndex((all) => all.some((one) => one.prompt === prompt)) : Number(side);
    const same = scenes[place]?.find((one) => one.prompt === prompt);
    const scene = same ?? (shared.length ? null : scenes[place]?.[0]);
    if (!scene) return null;
    const step = stepsOf(scene).at(-1);
    const strengths = strengthsOf(scene, step).filter(Boolean);
    const file = side === "base" ? scene.base : pictureAt(scene, step, nearest(strengths, 1));
    return file && fileOfRun(runs[place].id, file);
  };
  const titleOf = (side) => (side === "base" ? t`Without` : names[Number(side)]);
  const [left, right] = sides.map(shot);
  const choose = (place, side) => setSides((before) => before.map((one, index) => (index === place ? side : one)));
  return html`<div class="studio compared">
    <div class="studio-picture">
      ${
        right
          ? html`<${Stage} left=${left} layers=${[{ src: right, share: 1 }]} titles=${sides.map(titleOf)}
              prompt=${prompt} />`
          : html`<div class="easel-place"><p class="easel-words">
              ${prompts.length ? t`It did not draw this prompt.` : t`They have drawn nothing.`}</p></div>`
      }
    </div>
    <div class="studio-tools">
      <div class="sides">
        ${[t`Left`, t`Right`].map(
          (label, place) => html`<label key=${label}>
            <span>${label}</span>
            <select value=${sides[place]} onChange=${(event) => choose(place, event.currentTarget.value)}>
              <option value="base">Without</option>
              ${names.map((name, index) => html`<option key=${runs[index].id} value=${String(index)}>${name}</option>`)}
            </select>
          </label>`,
        )}
      </div>
      ${
        prompts.length > 0 &&
        !shared.length &&
        html`<p class="faint">They drew no prompt in common: each shows its own.</p>`
      }
      ${
        shared.length > 0 &&
        html`<div class="ideas" role="group" aria-label="Prompts">
          ${prompts.map(
            (one) => html`<button type="button" class="chip" key=${one} aria-pressed=${one === prompt}
                onClick=${() => setPrompt(one)}>
              ${one || t`No prompt`}
            </button>`,
          )}
        </div>`
      }
    </div>
    <${Panel} title=${runs.length > 1 ? t`Which one do you like?` : t`Compare it with another`}>
      <h1 class="verdict">${runs.length > 1 ? t`Which one do you like?` : t`Compare it with another`}</h1>
      <section class="scenes" aria-label="Compared">
        <ul>
          ${runs.map(
            (run, index) => html`<li key=${run.id}>
              <button type="button" class="scene-tile" aria-pressed=${sides[1] === String(index)}
                  aria-label=${t`Show ${names[index]} on the right`} onClick=${() => choose(1, String(index))}>
                ${shot(String(index)) && html`<img src=${shot(String(index))} alt="" loading="lazy" />`}
                <span>${names[index]}</span>
              </button>
              <a href=${link("runs", run.id)} aria-label=${t`Open it: ${names[index]}`}>Open it</a>
            </li>`,
          )}
        </ul>
      </section>
      ${runs.length < MOST_COMPARED && html`<${Others} runs=${runs} />`}
      <button type="button" class="engineer-line" onClick=${() => setDrawer(true)}>
        <span>For engineers</span><span class="faint">losses, settings <${Icon} name="forward" /></span>
      </button>
    <//>
    ${
      isDrawer &&
      html`<${Drawer} title="For engineers" onClose=${() => setDrawer(false)}>
        <ul class="legend">
          ${runs.map(
            (run, index) => html`<li key=${run.id}>
              <span class=${`swatch line-${index + 1}`}></span>${names[index]} <span class="faint">${run.id}</span>
            </li>`,
          )}
        </ul>
        <${ComparedCurves} runs=${runs} names=${names} />
        <${Table} title="Settings that differ" runs=${runs} names=${names} rows=${different(runs)}
          none="All settings are the same." />
        <${Table} title="What came of them" runs=${runs} names=${names} rows=${outcomes(runs)} />
      <//>`
    }
  </div>`;
}

/**
 * Other runs to compare with.
 *
 * @param {Props<{ runs: Api.RunAnswer[] }>} props
 */
function Others({ runs }) {
  const [found] = useLoaded((signal) => get(["runs"], { limit: MOST_OFFERED }, signal), []);
  const others = (found?.runs ?? []).filter((one) => one.cover && !runs.some((run) => run.id === one.id));
  if (!others.length) return null;
  return html`<section class="scenes" aria-label="Add another">
    <h2>Add another</h2>
    <ul>
      ${others.map(
        (one) => html`<li key=${one.id}>
          <a class="scene-tile" href=${link("compare", ...runs.map((run) => run.id), one.id)}>
            <img src=${fileOfRun(one.id, one.cover ?? "")} alt="" loading="lazy" /><span>${nameOfRun(one)}</span>
          </a>
        </li>`,
      )}
    </ul>
  </section>`;
}

/** @param {Props<{ runs: Api.RunAnswer[] }>} props */
function ComparedCurves({ runs, names }) {
  const held = runs.filter((run) => run.validations.length).length > 0;
  const [what, setWhat] = useState(held ? "held" : "smooth");
  const lines = useMemo(
    () =>
      runs
        .map((run, index) => {
          const points = what === "held" ? run.validations.map((one) => [one.step, one.loss]) : run.smooth;
          return {
            label: names[index],
            xs: points.map(([step]) => step),
            ys: points.map(([, loss]) => loss),
            color: LINE_COLORS[index],
            width: 2,
            points: what === "held",
          };
        })
        .filter((line) => line.xs.length),
    [runs, what],
  );
  if (!lines.length) return null;
  return html`<section aria-labelledby="curves">
    <div class="head">
      <h2 id="curves">Loss</h2>
      ${
        held &&
        html`<label class="short">
          Show <select value=${what} onChange=${(event) => setWhat(event.currentTarget.value)}>
            <option value="held">on held-out photos</option><option value="smooth">in training</option>
          </select>
        </label>`
      }
    </div>
    <${Curves} key=${what} lines=${lines} label=${t`Loss of ${names.join(", ")} over steps`} />
  </section>`;
}

/** @param {Props<{ runs: Api.RunAnswer[] }>} props */
function Table({ title, runs, names, rows, none }) {
  return html`<section aria-label=${title}>
    <h2>${title}</h2>
    ${
      !rows.length
        ? html`<p class="faint">${none}</p>`
        : html`<div class="scroll" tabindex="0" role="region" aria-label=${t`${title}, as a table`}>
          <table>
            <thead><tr><td></td>${names.map((name) => html`<th scope="col" key=${name}>${name}</th>`)}</tr></thead>
            <tbody>
              ${rows.map(
                ([name, values]) => html`<tr key=${name}>
                  <th scope="row">${name}</th>
                  ${values.map((value, index) => html`<td key=${runs[index].id}>${value}</td>`)}
                </tr>`,
              )}
            </tbody>
          </table>
        </div>`
    }
  </section>`;
}

function outcomes(runs) {
  const rows = [
    [t`State`, (run) => run.status],
    [t`Steps`, (run) => whole(run.step)],
    [t`Model`, (run) => run.model],
    [t`Training loss`, (run) => (run.loss === null ? "–" : measured(run.loss))],
    [t`Lowest held-out loss`, (run) => (run.held_out === null ? "–" : measured(run.held_out))],
    [t`Best step`, (run) => (run.best_step === null ? "–" : whole(run.best_step))],
    [t`Verdict`, (run) => run.verdict],
  ];
  return rows.map(([name, of]) => [name, runs.map(of)]);
}

/** Settings that are not the same in all runs: [name, values in words]. */
export function different(runs) {
  const tables = runs.map((run) => new Map(run.settings.map((one) => [one.name, one.value])));
  const all = [...new Set(tables.flatMap((table) => [...table.keys()]))];
  const rows = all.map((name) => [name, tables.map((table) => (table.has(name) ? valueWords(table.get(name)) : "–"))]);
  return rows.filter(([, values]) => new Set(values).size > 1);
}
