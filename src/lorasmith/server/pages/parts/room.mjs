// The room for the pictures of a run, while it trains and afterwards: one picture, its steps, its strength, a prompt.
import { fileOfRun, get, post, sentence } from "../lib/api.mjs";
import { html, useEffect, useMemo, useRef, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { useEvents } from "../lib/live.mjs";
import { announcement, said, say } from "../lib/stores.mjs";
import { capital, count, duration } from "../lib/words.mjs";
import { Advice } from "./advice.mjs";
import { Button, Field, Panel, Problem, useLoaded } from "./basics.mjs";
import { Engineers } from "./engineers.mjs";
import { Icon } from "./icons.mjs";
import { JobProgress } from "./job_progress.mjs";
import { act, isActive } from "./jobs.mjs";
import { PromptBar } from "./prompt_bar.mjs";
import {
  between,
  evaluationScenes,
  gridScenes,
  nearest,
  pictureAt,
  previewScenes,
  stepsOf,
  strengthsOf,
  tryScenes,
} from "./scenes.mjs";
import { Stage, StrengthSlider, Strip } from "./stage.mjs";
import { heardFiles, useJobsAbout, useTries } from "./tries.mjs";

const MOST_IDEAS = 8;

/**
 * @param {Props<{ run: Api.RunAnswer | null, id: string | null, view: any, isRunning: boolean }>} props
 *   `run`: null before it is there; `id`: of the run, which may be known before
 *   `view`: of a run that trains
 *   `title`: what is said of it, for the handle of the panel on a phone
 *   `panel`: called with what is shown, {step, file, picture}, for what stands at the right of the pictures
 *   `empty`: in place of a picture, before there is one
 *   `total`: steps that are planned
 *   `onEnd`: when there is another recommendation
 */
export function Room({ run, id, view, isRunning, title, panel, empty, total, onEnd }) {
  const about = id ? { ...run, id } : null;
  const jobs = useJobsAbout(id);
  const ended = (kind) => jobs.filter((job) => isOf(job, kind) && job.state === "completed").map((job) => job.id);
  const evaluations = ended("evaluate").join();
  const hasLora = Boolean(run?.lora) && !isRunning;
  const [found, evaluationError] = useLoaded(
    async (signal) => (hasLora && id ? get(["runs", id, "evaluation"], {}, signal) : null),
    [id, hasLora, evaluations],
  );
  const [gallery] = useLoaded(
    async (signal) => (hasLora && id ? get(["runs", id, "gallery"], {}, signal) : null),
    [id, hasLora, ended("grid").join()],
  );
  const tries = useTries(about, view, isRunning);
  useEffect(() => {
    if (evaluations) onEnd();
  }, [evaluations]);

  const previews = useMemo(
    () => previewScenes((view ?? run)?.previews ?? [], run?.pairs),
    [(view ?? run)?.previews, run?.pairs],
  );
  // The answer to what the prompt bar asks takes seconds of the processor, which the first picture of the LoRA needs.
  const isFirstAwaited = previews.length > 0 && !previews.some((one) => one.cells.length);
  const evaluated = found?.evaluation ? evaluationScenes(found.evaluation, found.folder) : [];
  const drawn = tryScenes(tries);
  const grids = gridScenes(gallery?.grids ?? []);
  const [main] = [...evaluated, ...previews, ...drawn, ...grids];
  const all = [...drawn, ...grids, ...evaluated, ...previews];

  const [key, setKey] = useState("");
  const [chosen, setChosen] = useState(null);
  const [amount, setAmount] = useState(1);
  const [isDragged, setDragged] = useState(false);
  const [given, setGiven] = useState("");
  const [isDrawer, setDrawer] = useState(false);
  const scene = all.find((one) => one.key === key) ?? main;
  const best = run?.recommended?.is_judged ? run.recommended.step : null;
  const steps = scene ? stepsOf(scene) : [];
  const byDefault = !isRunning && steps.includes(best) ? best : (steps.at(-1) ?? null);
  const step = steps.includes(chosen) ? chosen : byDefault;
  const strengths = scene ? strengthsOf(scene, step) : [];
  const resting = nearest(
    strengths.filter((one) => one !== 0 || amount === 0),
    amount,
  );
  const at = isDragged ? amount : (resting ?? 0);
  const { below, above, share } = between(strengths, at);
  const source = (file) => fileOfRun(id ?? "", file);
  const layer = (strength) => scene && source(pictureAt(scene, step, strength) ?? "");
  const isNewest = isRunning && chosen === null; // the next one replaces it; prompts are drawn with the weights of now
  const sketch = isNewest && scene === previews[0] && view?.sketch;
  const layers = [
    { src: layer(below), share: 1 },
    ...(share > 0 ? [{ src: layer(above), share }] : []),
    ...(sketch ? [{ src: sketch, share: 1 }] : []),
  ];
  const beside = scene?.given.find((one) => one.title === given);
  const left = !steps.length ? null : (beside?.file ?? scene?.base ?? null);
  const leftTitle = beside ? capital(beside.title) : t`Without`;
  const rightTitle = !steps.length
    ? t`Without your LoRA`
    : [step === null ? t`With it` : t`Step ${step}`, ...(at === 1 ? [] : [t`strength ${Number(at.toFixed(2))}`])].join(
        ", ",
      );

  const strip = steps.length > 1 ? scene : ([main, ...previews].find((one) => one && stepsOf(one).length > 1) ?? scene);
  const shots = strip
    ? stepsOf(strip).map((one) => {
        const file = pictureAt(strip, one, nearest(strengthsOf(strip, one).filter(Boolean), 1) ?? 0);
        return { step: one, src: file && source(file) };
      })
    : [];
  const pickStep = (wanted) => {
    if (!steps.includes(wanted)) setKey(strip?.key ?? "");
    setChosen(isRunning && wanted === shots.at(-1)?.step ? null : wanted);
  };
  const pickScene = (wanted) => {
    setKey(wanted.key);
    scrollTo(0, 0);
  };
  const newest = useRef(/** @type {number | null} */ (null));
  useEffect(() => {
    const last = shots.at(-1)?.step ?? null;
    if (isRunning && newest.current !== null && last !== newest.current)
      announcement.set(t`A new picture, of step ${last}.`);
    newest.current = last;
  }, [shots.length]);
  useEffect(() => {
    if (key && scene?.key === key) announcement.set(t`Shown: ${scene.prompt}`);
  }, [key, scene?.key]);
  useEffect(() => {
    for (const one of strengths) new Image().src = layer(one); // so that dragging shows them at once
  }, [scene?.key, step, strengths.length]);

  const saves = view?.saves ?? run?.saves ?? [];
  const kept = isNewest ? null : saves.find((one) => one.step === step);
  const lora = kept?.file ?? (isRunning ? "" : (run?.recommended?.file ?? ""));
  const subject = run?.subject ?? "";
  const withSubject = (wish) => (wish.includes(subject) ? wish : `${subject}, ${wish}`);
  const ideas = subject
    ? Object.values(gallery?.kinds ?? {})
        .flat()
        .map(withSubject)
        .slice(0, MOST_IDEAS)
    : [];
  const evaluating = jobs.find((job) => job.kind === "evaluate" && isActive(job));
  const shown = { step, file: lora, picture: layers[0].src || null };
  const others = [...previews.filter((one) => !evaluated.some((two) => two.prompt === one.prompt)), ...evaluated];
  return html`<div class=${`studio ${shots.length ? "" : "stripless"}`}>
    <div class="studio-picture">
      ${
        shots.length > 0 &&
        html`<${Strip} shots=${shots} step=${step} best=${best} total=${total}
          onStep=${pickStep} />`
      }
      ${
        scene
          ? html`<${Stage} left=${left && source(left)} layers=${layers} titles=${[leftTitle, rightTitle]}
              prompt=${scene.prompt} fades=${isRunning}>
            ${sketch && html`<span class="easel-pill next" aria-hidden="true">the next one, being drawn</span>`}
          <//>`
          : html`<div class="easel-place">${empty}</div>`
      }
    </div>
    <div class="studio-tools">
      ${
        scene &&
        steps.length > 0 &&
        html`<${StrengthSlider} strengths=${strengths} amount=${at}
            onAmount=${(value) => {
              setDragged(true);
              setAmount(value);
            }}
            onRest=${(value) => {
              setDragged(false);
              setAmount(value ?? nearest(strengths, amount));
            }}>
          ${
            scene.given.length > 0 &&
            html`<select aria-label="On the left" value=${given}
                onChange=${(event) => setGiven(event.currentTarget.value)}>
              <option value="">Without</option>
              ${scene.given.map(
                (one) => html`<option key=${one.title} value=${one.title}>
                  ${capital(one.title)}</option>`,
              )}
            </select>`
          }
        <//>`
      }
      ${
        scene &&
        html`<p class="studio-prompt faint" role="status">
          ${tries.some((one) => one.files.length < 2 && (one.job ? isActive(one.job) : !one.error)) ? t`Drawing… ` : ""}
          ${scene.prompt}${scene.note ? ` · ${sentence(scene.note)}` : ""}</p>`
      }
      ${
        about &&
        (hasLora || (isRunning && view?.step > 0 && !isFirstAwaited)) &&
        html`<${PromptBar} run=${{ ...about, saves }} isTraining=${isRunning} ideas=${ideas} lora=${lora}
          amount=${resting} onDrawn=${(made) => setKey(`try ${made}`)}
          onGrid=${
            isRunning
              ? null
              : (prompt) =>
                  said(async () => {
                    await post(["runs", about.id, "gallery"], {
                      wish: prompt,
                      ...(subject ? {} : { subject: prompt }),
                    });
                    setKey(`grid ${withSubject(prompt)}`);
                    say(t`It is drawn with the LoRA of each step.`);
                  })
          } />`
      }
    </div>
    <${Panel} title=${title}>
      ${panel(shown)}
      ${evaluating && html`<${Evaluating} job=${evaluating} found=${found} />`}
      ${hasLora && found && !found.evaluation && !evaluating && html`<${AskEvaluation} id=${id} found=${found} />`}
      <${Problem} error=${evaluationError} />
      <${Tiles} title="You drew" shown=${scene} tries=${tries} scenes=${[...drawn, ...grids]} run=${about} best=${best}
        grids=${jobs.filter((job) => isOf(job, "grid") && isActive(job))} onScene=${pickScene} />
      ${
        others.length > 1 &&
        html`<${Tiles} title="Drawn for you" shown=${scene} tries=${[]} scenes=${others} run=${about} best=${best}
          grids=${[]} onScene=${pickScene} />`
      }
      ${run && !isRunning && html`<${Advice} run=${run} />`}
      <button type="button" class="engineer-line" onClick=${() => setDrawer(true)}>
        <span>For engineers</span><span class="faint">losses, files, commands <${Icon} name="forward" /></span>
      </button>
    <//>
    ${
      isDrawer &&
      html`<${Engineers} run=${run} view=${isRunning ? view : null} scene=${scene} found=${found}
          onClose=${() => setDrawer(false)}>
        ${
          found?.evaluation &&
          !evaluating &&
          html`<div class="actions"><${Button} onClick=${() => evaluate(id, "")}>Evaluate again<//></div>
            <${Effort} found=${found} />`
        }
      <//>`
    }
  </div>`;
}

const isOf = (job, kind) =>
  kind === "grid" ? job.kind === "draw" && typeof job.wish === "string" : job.kind === kind && job.wish === null;

const evaluate = (id, subject) => said(() => post(["runs", id, "evaluation"], { subject }));

function Evaluating({ job, found }) {
  return html`<div class="evaluating" role="group" aria-label="Evaluation">
    <p>
      ${
        job.state === "running"
          ? t`Finding out which step is best.`
          : t`Which step is best is found out when nothing else is to be done.`
      }
    </p>
    ${found && html`<${Effort} found=${found} />`}
    ${job.state === "running" && html`<${JobProgress} job=${job} label="Finding the best step" />`}
    <${Button} class="small" onClick=${() => act(job, "cancel", { pause: false })}>Cancel<//>
  </div>`;
}

/** @param {Props<{ id: string | null, found: Api.EvaluationAnswer }>} props */
function AskEvaluation({ id, found }) {
  const { subject } = found;
  const [word, setWord] = useState("");
  return html`<div class="evaluating" role="group" aria-label="Evaluation">
    ${subject === "" && html`<${SubjectField} value=${word} onValue=${setWord} />`}
    <${Button} class="small" disabled=${subject === "" && !word.trim()} onClick=${() => evaluate(id, word.trim())}>
      Which step is best?
    <//>
    <${Effort} found=${found} />
  </div>`;
}

/** What an evaluation takes, before it begins. */
function Effort({ found: { pictures, seconds } }) {
  if (!pictures) return null;
  const time = seconds === null ? "" : duration(seconds, { about: true });
  return html`<p class="faint effort">
    ${time ? html`It draws ${count(pictures, "picture")}, in ${time}.` : html`It draws ${count(pictures, "picture")}.`}
  </p>`;
}

/** What a run without a trigger learnt, where its captions do not say it either. */
const SubjectField = ({ value, onValue }) => html`<${Field} label="What should I draw?"
    help="The word for what was learnt, such as “a fox”.">
  ${(attributes) => html`<input ...${attributes} type="text" maxlength="1000" value=${value}
    onInput=${(event) => onValue(event.currentTarget.value)} />`}
<//>`;

/** Scenes to choose from, those that are being drawn first. */
function Tiles({ title, shown, tries, scenes, run, best, grids, onScene }) {
  const waiting = tries.filter((one) => one.files.length < 2);
  if (!waiting.length && !scenes.length && !grids.length) return null;
  return html`<section class="scenes" aria-label=${title}>
    <h2>${title}</h2>
    <ul>
      ${waiting.map((one) => html`<li key=${one.id}><${Waiting} one=${one} /></li>`)}
      ${grids.map((job) => html`<li key=${job.id}><${Waiting} one=${{ prompt: job.wish, job }} /></li>`)}
      ${scenes.map((scene) => {
        const steps = stepsOf(scene);
        const step = steps.includes(best) ? best : (steps.at(-1) ?? null);
        const file = pictureAt(scene, step, nearest(strengthsOf(scene, step).filter(Boolean), 1) ?? 0);
        const one = tries.find((other) => scene.key === `try ${other.id}`);
        return html`<li key=${scene.key}>
          <button type="button" class="scene-tile" aria-pressed=${scene.key === shown?.key} title=${scene.prompt}
              aria-label=${`${scene.prompt || t`No prompt`}${one ? t`, seed ${one.seed}` : ""}`}
              onClick=${() => onScene(scene)}>
            ${file && html`<img src=${fileOfRun(run.id, file)} alt="" loading="lazy" />`}
            <span>${scene.prompt || t`No prompt`}</span>
          </button>
          ${one?.job && isActive(one.job) && html`<${Waiting} one=${one} isBegun />`}
        </li>`;
      })}
    </ul>
  </section>`;
}

/** A drawing that is not done yet, or has failed. */
function Waiting({ one, isBegun = false }) {
  const { job } = one;
  useEvents(job?.state === "running" && one.files ? `jobs/${job.id}` : null, {
    progress: ({ files }) => files && heardFiles(job.id, files),
  });
  const error = one.error ?? (job?.state === "failed" ? (job.error?.message ?? t`It failed`) : "");
  return html`<div class=${isBegun ? "drawn-rest" : "drawn-waiting"}>
    ${!isBegun && html`<b>${one.prompt || t`No prompt`}</b>`}
    ${error && html`<${Problem} error=${{ message: sentence(error) }} />`}
    ${!job && !error && html`<span class="faint" role="status">Takes a moment; training goes on afterwards.</span>`}
    ${job?.state === "pending" && html`<span class="faint" role="status">It waits for its turn.</span>`}
    ${job?.state === "running" && html`<${JobProgress} job=${job} label="Drawing" />`}
    ${
      job &&
      isActive(job) &&
      html`<${Button} class="small" onClick=${() => act(job, "cancel", { pause: false })}>
        ${isBegun ? t`Enough` : t`Cancel`}
      <//>`
    }
  </div>`;
}
