// Runs side by side: curves over each other, pictures of the same prompts, and the settings that differ.
import { fileOfRun, get } from "../lib/api.mjs";
import { html, useMemo, useState } from "../lib/html.mjs";
import { link } from "../lib/router.mjs";
import { measured, valueWords, whole } from "../lib/words.mjs";
import { Loading, Problem, useLoaded } from "../parts/basics.mjs";
import { Curves, LINE_COLORS } from "../parts/curves.mjs";
import { Lightbox } from "../parts/pictures.mjs";
import { nameOfRun } from "../parts/run_card.mjs";

export const MOST_COMPARED = LINE_COLORS.length;

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
  const names = runs.map(nameOfRun);
  return html`
    <section>
      <p class="kicker"><a href=${link("runs")}>Runs</a> / comparison</p><h1>${names.length} runs compared</h1>
      <ul class="legend">
        ${runs.map(
          (run, index) => html`<li key=${run.id}>
            <span class=${`swatch line-${index + 1}`}></span>
            <a href=${link("runs", run.id)}>${names[index]}</a> <span class="faint">${run.id}</span>
          </li>`,
        )}
      </ul>
    </section>
    <${ComparedCurves} runs=${runs} names=${names} />
    <${ComparedPictures} runs=${runs} names=${names} />
    <${Table} title="What came of them" runs=${runs} names=${names} rows=${outcomes(runs)} />
    <${Table} title="Settings that differ" runs=${runs} names=${names} rows=${different(runs)}
      none="All settings are the same." />
  `;
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
    <${Curves} key=${what} lines=${lines} label=${`Loss of ${names.join(", ")} over steps`} />
  </section>`;
}

/** @param {Props<{ runs: Api.RunAnswer[] }>} props */
function ComparedPictures({ runs, names }) {
  const [large, setLarge] = useState(null);
  const last = runs.map((run) => {
    const drawn = run.previews.filter((one) => one.strength !== 0);
    const step = Math.max(...drawn.map((one) => one.step));
    const strengths = [...new Set(drawn.filter((one) => one.step === step).map((one) => one.strength))];
    const strength = strengths.includes(1) ? 1 : strengths[0];
    return new Map(
      drawn.filter((one) => one.step === step && one.strength === strength).map((one) => [one.prompt, one]),
    );
  });
  const prompts = [...new Set(last.flatMap((one) => [...one.keys()]))];
  if (!prompts.length) return null;
  const source = (shot) => fileOfRun(shot.run, shot.file);
  const shots = prompts.flatMap((prompt) =>
    runs.flatMap((run, index) => {
      const shot = last[index].get(prompt);
      return shot ? [{ ...shot, run: run.id, title: names[index] }] : [];
    }),
  );
  return html`<section aria-labelledby="pictures">
    <h2 id="pictures">Pictures at the end</h2>
    <div class="scroll" tabindex="0" role="region" aria-label="Pictures side by side">
      <table class="pictures">
        <thead><tr>${names.map((name) => html`<th scope="col" key=${name}>${name}</th>`)}</tr></thead>
        <tbody>
          ${prompts.map(
            (prompt) => html`
              <tr class="prompt-row" key=${`${prompt} words`}>
                <th scope="rowgroup" colspan=${runs.length}>${prompt || "No prompt"}</th>
              </tr>
              <tr key=${prompt}>
                ${runs.map((run, index) => {
                  const shot = shots.find((one) => one.run === run.id && one.prompt === prompt);
                  return html`<td key=${run.id}>
                    ${
                      shot
                        ? html`<button type="button" class="picture" onClick=${() => setLarge(shots.indexOf(shot))}>
                          <img src=${source(shot)} alt=${`${names[index]}: ${prompt}`} loading="lazy" />
                        </button>`
                        : html`<span class="missing">Not drawn</span>`
                    }
                  </td>`;
                })}
              </tr>
            `,
          )}
        </tbody>
      </table>
    </div>
    ${
      large !== null &&
      html`<${Lightbox} start=${large} onClose=${() => setLarge(null)}
        shots=${shots.map((shot) => ({ ...shot, file: source(shot) }))} source=${(file) => file} />`
    }
  </section>`;
}

/** @param {Props<{ runs: Api.RunAnswer[] }>} props */
function Table({ title, runs, names, rows, none }) {
  return html`<section aria-label=${title}>
    <h2>${title}</h2>
    ${
      !rows.length
        ? html`<p class="faint">${none}</p>`
        : html`<div class="scroll" tabindex="0" role="region" aria-label=${`${title}, as a table`}>
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
    ["State", (run) => run.status],
    ["Steps", (run) => whole(run.step)],
    ["Model", (run) => run.model],
    ["Training loss", (run) => (run.loss === null ? "–" : measured(run.loss))],
    ["Lowest held-out loss", (run) => (run.held_out === null ? "–" : measured(run.held_out))],
    ["Best step", (run) => (run.best_step === null ? "–" : whole(run.best_step))],
    ["Verdict", (run) => run.verdict],
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
