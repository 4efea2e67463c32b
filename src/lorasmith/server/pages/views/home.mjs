// The wall of LoRAs: the one that learns first and largest, then all others as their best pictures.
import { fileOfRun, get, post } from "../lib/api.mjs";
import { currentDraft } from "../lib/drafts.mjs";
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { t, translated } from "../lib/language.mjs";
import { go, link } from "../lib/router.mjs";
import { said, useStore, work } from "../lib/stores.mjs";
import { capital, whole } from "../lib/words.mjs";
import { Button, Drawer, Loading, Problem, Ring, isPassing, useLoaded } from "../parts/basics.mjs";
import { Icon } from "../parts/icons.mjs";
import { Queue, isActive, isAsked, isQueued, jobsOfRuns, titleOf } from "../parts/jobs.mjs";
import { timeLeft, useView } from "../parts/live_run.mjs";
import { DROP_HERE } from "../parts/drop_zone.mjs";
import { NewTile } from "../parts/new_set.mjs";
import { Cover, nameOfRun, shortName } from "../parts/run_card.mjs";
import { Stage } from "../parts/stage.mjs";
import { SetTile, useCovers } from "./sets.mjs";
import { Sweeps } from "./sweep.mjs";

const FIRST = 60; // runs of the first answer; the others follow
const LARGE_PX = 1024;
const STRIP = 5; // earlier pictures below the newest
const STRIP_PX = 128;
const FEW = 6; // runs below which they fill the window, the first one largest
const SEARCHED = 8; // runs from which on they are searched
const EXAMPLE = "fox";
const AGAIN_MS = 1000;

const KINDS = {
  subject: t`Subjects`,
  style: t`Styles`,
  edit: t`Edits`,
  slider: t`Sliders`,
};

export function HomeView() {
  const [isAll, setAll] = useState(false);
  const [found, error, reload] = useLoaded((signal) => get(["runs"], isAll ? {} : { limit: FIRST }, signal), [isAll]);
  const known = useStore(work);
  const ended = [...(known?.jobs.values() ?? [])].filter((job) => job.ended).length;
  const before = useRef(ended);
  useEffect(() => {
    if (found && ended !== before.current) reload();
    before.current = ended;
  }, [ended]);
  useEffect(() => {
    if (found && found.total > found.runs.length + found.damaged.length) setAll(true);
  }, [found]);
  const jobs = jobsOfRuns(known);
  const trains = trainingOf(known);
  const live = trains ? null : found?.runs.find((run) => run.state === "running" && !run.job); // of the command line
  if (!found || !known)
    return html`
      <${Problem} error=${error} onRetry=${reload} />${!error && html`<${Loading} what="your LoRAs" />`}
      <ul class="covers"><li><${NewTile} /></li></ul>
    `;
  const isBegun = [...known.jobs.values()].some((job) => job.kind === "train" && isQueued(job));
  if (!found.runs.length && !isBegun) return html`<${FirstOpen} />`;
  return html`<${Wall} runs=${found.runs} jobs=${jobs} trains=${trains} live=${live} reload=${reload} />`;
}

/** The training that runs, else the one that is next. */
const trainingOf = (known) =>
  [...(known?.jobs.values() ?? [])]
    .filter((job) => job.kind === "train" && isActive(job))
    .sort((a, b) => Number(b.state === "running") - Number(a.state === "running") || a.number - b.number)[0];

/** @param {Props<{ runs: Api.RunRow[], jobs: Map<string, Api.JobAnswer>, trains: Api.JobAnswer | undefined }>} props */
function Wall({ runs, jobs, trains, live, reload }) {
  const [kind, setKind] = useState("");
  const [words, setWords] = useState("");
  const [isOpen, setOpen] = useState(false);
  const large = trains?.run ?? live?.id;
  const isShown = (run) =>
    run.id !== large &&
    (!kind || (kind === "starred" ? run.starred : run.teaches === kind)) &&
    (!words || `${nameOfRun(run)} ${run.id} ${run.subject} ${run.model} ${run.note}`.toLowerCase().includes(words));
  const shown = runs.filter(isShown).sort((a, b) => Number(b.starred) - Number(a.starred));
  const kinds = Object.keys(KINDS).filter((one) => runs.some((run) => run.teaches === one));
  const chips = [
    ["", t`All`],
    ...(kinds.length > 1 ? kinds.map((one) => [one, KINDS[one]]) : []),
    ...(runs.some((run) => run.starred) ? [["starred", t`Starred`]] : []),
  ];
  const isFew = (shown.length > 0 || trains || live) && runs.length < FEW;
  const cover = (run) => html`<${Cover} key=${run.id} run=${run} state=${jobs.get(run.id)?.state ?? run.state}
      isLarge=${isFew} onChange=${reload} />`;
  return html`
    <h1 class="unseen">My LoRAs</h1>
    <div class="wall-head">
      ${
        chips.length > 1 &&
        html`<div class="chips" role="group" aria-label="Which">
          ${chips.map(
            ([one, text]) => html`<button type="button" class="chip" key=${one} aria-pressed=${kind === one}
                onClick=${() => setKind(one)}>
              ${text}
            </button>`,
          )}
        </div>`
      }
      <div class="wall-tools">
        ${
          runs.length >= SEARCHED &&
          html`<label class="find">
            <span class="unseen">Find</span><${Icon} name="search" />
            <input type="search" placeholder="Find" value=${words}
              onInput=${(event) => setWords(event.currentTarget.value.toLowerCase())} />
          </label>`
        }
        ${runs.length > 1 && html`<a class="button small" href=${link("runs")}>Compare</a>`}
        <${OpenDrawer} onClick=${() => setOpen(true)} />
      </div>
    </div>
    <ul class=${`covers ${isFew ? "few" : ""}`}>
      ${
        trains || live
          ? html`<${Learning} key="learning" job=${trains} run=${runs.find((run) => run.id === large)} />`
          : isFew && cover(shown[0])
      }
      <li key="new"><${NewTile} /></li>
      ${shown.slice(isFew && !(trains || live) ? 1 : 0).map(cover)}
    </ul>
    ${!shown.length && (kind || words) && html`<p class="faint">None of these.</p>`}
    ${isOpen && html`<${WallDrawer} onClose=${() => setOpen(false)} />`}
  `;
}

/** The jobs that somebody waits for are counted on it. */
function OpenDrawer({ onClick }) {
  const known = useStore(work);
  const waiting = [...(known?.jobs.values() ?? [])].filter((job) => isAsked(job) && isActive(job)).length;
  return html`<button type="button" class="button small" onClick=${onClick}>
    Queue${waiting ? html` <span class="count">${waiting}</span>` : ""}
  </button>`;
}

/** What is looked up beside the wall: the queue, sets of photos, sweeps. */
function WallDrawer({ onClose }) {
  const [sets] = useLoaded((signal) => get(["datasets"], {}, signal), []);
  const own = (sets?.datasets ?? []).filter((one) => !one.builtin);
  return html`<${Drawer} title="Queue, photos, sweeps" onClose=${onClose}>
    <${Queue} empty="Nothing runs or waits." />
    ${
      own.length > 0 &&
      html`<section aria-labelledby="own-sets">
        <div class="head"><h2 id="own-sets">Photos</h2><a href=${link("photos")}>All</a></div>
        <ul class="covers small">${own.slice(0, 6).map((one) => html`<${SetTile} key=${one.name} set=${one} />`)}</ul>
      </section>`
    }
    <${Sweeps} />
  <//>`;
}

/**
 * The LoRA that learns, as large as four others: its newest picture over the one before, how far it is, and how long it
 * takes yet.
 *
 * @param {Props<{ job: Api.JobAnswer | undefined, run: Api.RunRow | undefined }>} props
 */
function Learning({ job, run }) {
  const id = job?.run ?? run?.id;
  const view = useView(job ? `jobs/${job.id}` : `runs/${id}`);
  const drawn = pictures(view);
  const newest = drawn.at(-1);
  const src =
    newest && id ? fileOfRun(id, newest.file, LARGE_PX) : run?.cover ? fileOfRun(id, run.cover, LARGE_PX) : "";
  const photos = useCovers(src ? "" : job?.request?.dataset);
  const earlier = useRef({ now: "", before: "" });
  if (earlier.current.now !== src) earlier.current = { now: src, before: earlier.current.now };
  const { step = 0, steps = 0 } = view ?? run ?? {};
  const isWaiting = job?.state === "pending";
  const doing = isWaiting ? t`Waiting for its turn` : [t`Learning`, timeLeft(view)].filter(Boolean).join(" · ");
  const words = job?.request?.trigger || job?.request?.settings?.trigger || run?.subject;
  return html`<li class="learning" aria-label="Learning">
    <a class="cover" href=${job ? link("jobs", job.id) : link("runs", id)}>
      ${earlier.current.before && html`<img key=${earlier.current.before} src=${earlier.current.before} alt="" />`}
      ${
        src &&
        html`<img key=${src} class="newest" src=${src} alt=${newest ? t`Step ${newest.step}: ${newest.prompt}` : ""} />`
      }
      ${
        photos.length === 4 &&
        html`<span class="cover four">${photos.map((one) => html`<img key=${one} src=${one} alt="" />`)}</span>`
      }
      <span class="badge">
        <span class=${`dot ${isWaiting ? "" : "busy"}`}></span>${doing}
      </span>
      <span class="cover-words">
        <b>${shortName(run ?? { label: titleOf(job) })}</b>
        <span>
          ${[words, step ? t`step ${whole(step)} of ${whole(steps)}` : standing(view, isWaiting)]
            .filter(Boolean)
            .join(" — ")}
        </span>
        ${
          drawn.length > 1 &&
          html`<span class="cover-strip">
            ${drawn
              .slice(-STRIP)
              .map(({ file }) => html`<img key=${file} src=${fileOfRun(id, file, STRIP_PX)} alt="" />`)}
          </span>`
        }
      </span>
      ${
        steps > 0 &&
        html`<${Ring} share=${step / steps} label=${t`${whole((100 * step) / steps)} % done`}>
          ${whole((100 * step) / steps)}
        <//>`
      }
    </a>
  </li>`;
}

const standing = (view, isWaiting) =>
  isWaiting ? "" : capital(translated(view?.preparation?.at(-1) ?? "") || t`getting ready…`);

/** The pictures of the first prompt by step: of the base model, then with the LoRA at its full strength. */
function pictures(view) {
  const first = (view?.previews ?? []).filter((one) => one.number === 1);
  const base = first.find((one) => one.strength === 0);
  return [...(base ? [base] : []), ...first.filter((one) => one.strength === 1)];
}

/** Before there is any LoRA: what one does, the example in one click, and the place for pictures. */
function FirstOpen() {
  const [sets] = useLoaded((signal) => get(["datasets"], {}, signal), []);
  const examples = (sets?.datasets ?? []).filter((one) => one.builtin);
  const own = (sets?.datasets ?? []).filter((one) => !one.builtin);
  return html`
    <div class="first">
      <div class="first-words">
        <h1>Teach it something of yours</h1>
        <p>
          A person, a pet, a thing, or the way you draw: about ten pictures are enough, and an image model can draw it
          in any scene.
        </p>
        ${
          examples.some((one) => one.name === EXAMPLE) &&
          html`<${Button} kind="primary" class="large" busyText="Starting…" onClick=${trainExample}>
            <${Icon} name="play" /> Try it with the fox
          <//>`
        }
        <${NewTile} title=${DROP_HERE} text="" />
      </div>
      <div class="first-picture">
        <${Stage} left="pages/first/without.webp" layers=${[{ src: "pages/first/with.webp" }]}
          titles=${[t`without`, t`with its LoRA`]} prompt=${FIRST_PROMPT} />
        <p>
          “${FIRST_PROMPT}”, drawn by the built-in model: without, and with a LoRA that learnt from sixteen drawings of
          a style.
        </p>
      </div>
    </div>
    ${
      [...own, ...examples].length > 0 &&
      html`<section aria-labelledby="sets">
        <h2 id="sets">${own.length ? t`Photos` : t`No photos at hand?`}</h2>
        <ul class="covers">${[...own, ...examples].map((one) => html`<${SetTile} key=${one.name} set=${one} />`)}</ul>
      </section>`
    }
  `;
}

const FIRST_PROMPT = "a lion";

/** Trains the built-in example on the built-in model, quickly, and shows it; waits until the server can. */
const trainExample = () =>
  said(async () => {
    for (;;) {
      try {
        const [{ models }, { trigger }] = await Promise.all([get(["models"]), currentDraft(EXAMPLE)]);
        const model = models.find((one) => one.builtin)?.name ?? "";
        const chosen = { dataset: EXAMPLE, name: EXAMPLE, model, trigger, preset: "quick", evaluate: true };
        const job = await post(["jobs"], { kind: "train", settings: {}, ...chosen });
        return go("jobs", job.id);
      } catch (error) {
        if (!isPassing(error)) throw error;
        await new Promise((later) => setTimeout(later, AGAIN_MS));
      }
    }
  });
