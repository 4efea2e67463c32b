// The page: its frame, what all views share, and the choice of the view by address.
import { get } from "./lib/api.mjs";
import { helpPage } from "./lib/help.mjs";
import { html, render, useEffect, useRef } from "./lib/html.mjs";
import { LANGUAGES, language, setLanguage, t } from "./lib/language.mjs";
import { listen } from "./lib/live.mjs";
import { link, useRoute } from "./lib/router.mjs";
import { announcement, newest, status, useStore, work } from "./lib/stores.mjs";
import { memorySize } from "./lib/words.mjs";
import { Messages } from "./parts/basics.mjs";
import { Icon } from "./parts/icons.mjs";
import { isActive, isAsked, Offers } from "./parts/jobs.mjs";
import { STEPS } from "./parts/stepper.mjs";
import { WithDraft } from "./parts/with_draft.mjs";
import { CompareView } from "./views/compare.mjs";
import { HomeView } from "./views/home.mjs";
import { JobView } from "./views/job.mjs";
import { ModelsView, ModelView } from "./views/model.mjs";
import { PhotosView } from "./views/photos.mjs";
import { RunView } from "./views/run.mjs";
import { RunsView } from "./views/runs.mjs";
import { SetsView } from "./views/sets.mjs";
import { SettingsView } from "./views/settings.mjs";
import { SweepView } from "./views/sweep.mjs";

const STATUS_EVERY_MS = 15000;
const STATUS_SOON_MS = 2000; // while the assistant starts

function Page() {
  const parts = useRoute();
  const main = useRef(null);
  const first = useRef(true);
  const [view, title] = viewOf(parts);
  const address = parts.join("/");
  useEffect(() => {
    document.title = `${title} · Lorasmith`;
    if (first.current) {
      first.current = false;
      return;
    }
    scrollTo(0, 0);
    main.current?.focus({ preventScroll: true });
    announcement.set(title);
  }, [address]);
  useEffect(watchServer, []);
  return html`
    <a class="skip" href="#main"
        onClick=${(event) => {
          event.preventDefault();
          main.current?.focus();
        }}>
      Skip to the content
    </a>
    <${Bar} at=${parts[0] ?? ""} help=${helpPage(parts)} />
    <main id="main" class=${ROOMS[parts[0] ?? ""] ?? placeOf(parts)} ref=${main} tabindex="-1">
      <${Offers} hidden=${address !== "" && address !== "runs"} />
      ${view}
    </main>
    <${Messages} />
  `;
}

const ROOMS = { "": "wall", photos: "wall", runs: "room", jobs: "room", compare: "room" };

/**
 * The class of the other views, whose rules are in the style sheet of that name.
 *
 * @param {string[]} parts
 */
const placeOf = ([name, , step]) => (name === "new" && (step ?? "photos") === "photos" ? "sheet" : "steps");

/** @param {string[]} parts */
function viewOf([name, ...rest]) {
  switch (name) {
    case undefined:
      return [html`<${HomeView} />`, t`My LoRAs`];
    case "photos":
      return [html`<${SetsView} />`, t`Photos`];
    case "new": {
      const [dataset, step = "photos", file] = rest;
      const view = { photos: PhotosView, model: ModelView, settings: SettingsView }[step];
      if (dataset && view)
        return [
          html`<${WithDraft} dataset=${dataset} view=${view} edited=${file} key=${`${dataset} ${step}`} />`,
          STEPS[step],
        ];
      break;
    }
    case "jobs":
      if (rest[0]) return [html`<${JobView} id=${rest[0]} key=${rest[0]} />`, t`Training`];
      break;
    case "runs":
      if (rest[0]) return [html`<${RunView} id=${rest[0]} key=${rest[0]} />`, rest[0].split("/").pop()];
      return [html`<${RunsView} />`, t`All runs`];
    case "models":
      return [html`<${ModelsView} />`, t`Models`];
    case "sweeps":
      if (rest[0]) return [html`<${SweepView} id=${rest[0]} key=${rest[0]} />`, rest[0]];
      break;
    case "compare":
      return [html`<${CompareView} ids=${rest} key=${rest.join(" ")} />`, t`Comparison`];
    default:
  }
  return [
    html`<section>
      <h1>Nothing here</h1><p>This address leads nowhere. <a href="#/">Start from the beginning.</a></p>
    </section>`,
    t`Nothing here`,
  ];
}

function Bar({ at, help }) {
  const server = useStore(status);
  const known = useStore(work);
  const device = server?.devices?.[0];
  const own = [...(known?.jobs.values() ?? [])].filter((job) => !isAsked(job) && isActive(job)).length;
  const busy = Math.max(0, (known?.queue.running ?? 0) + (known?.queue.pending ?? 0) - own);
  const here = (...names) => (names.includes(at) ? "page" : undefined);
  return html`<div class="top-bar" role="banner">
    <a class="brand" href="#/"><img src="pages/icon.svg" alt="" width="24" height="24" /><span>Lorasmith</span></a>
    <nav aria-label="Main">
      <a href="#/" aria-current=${here("", "jobs", "runs", "sweeps", "compare")}>
        My LoRAs${busy ? html`<span class="count" aria-label=${t`, ${busy} in the queue`}>${busy}</span>` : null}
      </a>
      <a href=${link("photos")} aria-current=${here("photos", "new")}>Photos</a>
      <a href=${link("models")} aria-current=${here("models")}>Models</a>
    </nav>
    <div class="aside">
      ${device && html`<span class="device">${deviceWords(device)}</span>`}
      <${Language} />
      ${
        server?.docs &&
        html`<a class="icon-button" href=${server.docs + help} target="_blank" rel="noreferrer"
            aria-label="Help with this view" title="Help with this view">
          <${Icon} name="help" />
        </a>`
      }
      <a class="icon-button" href="editor/" aria-label="Editor of graphs" title="Editor of graphs">
        <${Icon} name="graph" />
      </a>
    </div>
  </div>`;
}

/** The choice of the language; each is called by its own name. */
const Language = () => html`<label class="icon-button language" title="Language">
  <${Icon} name="language" />
  <select aria-label="Language" onChange=${(event) => setLanguage(event.currentTarget.value)}>
    ${LANGUAGES.map(
      (one) => html`<option key=${one} value=${one} lang=${one} selected=${one === language}>
        ${new Intl.DisplayNames(one, { type: "language" }).of(one)}
      </option>`,
    )}
  </select>
</label>`;

const deviceWords = ({ name, title, memory_bytes: memory }) =>
  name === "cpu"
    ? t`This computer · no graphics card`
    : [title || name, memory && memorySize(memory)].filter(Boolean).join(" · ");

/** Keeps the status and the jobs up to date; returns what ends it. */
function watchServer() {
  let timer = 0;
  let ended = false;
  const look = async () => {
    clearTimeout(timer);
    let wait = STATUS_EVERY_MS;
    try {
      const answer = await get(["status"]);
      status.set(answer);
      if (!answer.ready) wait = STATUS_SOON_MS;
    } catch {
      wait = STATUS_SOON_MS;
    }
    if (!ended) timer = setTimeout(look, wait);
  };
  const load = async () => {
    const asked = work.get();
    try {
      const { jobs } = await get(["jobs"], { limit: 200 });
      const queue = {
        pending: jobs.filter((job) => job.state === "pending").length,
        running: jobs.filter((job) => job.state === "running").length,
      };
      work.set((now) => {
        const isNews = ([id, job]) => job !== asked?.jobs.get(id);
        const there = jobs.filter(({ id }) => now?.jobs.has(id) || !asked?.jobs.has(id)); // others were removed since
        const found = there.map((job) => /** @type {const} */ ([job.id, newest(job, asked, now)]));
        return {
          jobs: new Map([...[...(now?.jobs ?? [])].filter(isNews), ...found]),
          queue: now && now.queue !== asked?.queue ? now.queue : queue,
        };
      });
    } catch {
      // The stream of events reports a lost connection, and loads again when it is back.
    }
  };
  const changed = (job) => {
    if (!job?.id) return;
    work.set((before) => {
      const jobs = new Map(before?.jobs ?? []);
      if (job.removed) jobs.delete(job.id);
      else jobs.set(job.id, { ...jobs.get(job.id), ...job });
      return { jobs, queue: before?.queue ?? { pending: 0, running: 0 } };
    });
  };
  const counted = (queue) => work.set((before) => ({ jobs: before?.jobs ?? new Map(), queue }));
  look();
  load();
  const stop = listen(
    "",
    { job: changed, queue: counted },
    {
      onOpen: () => {
        look();
        load();
      },
    },
  );
  return () => {
    ended = true;
    clearTimeout(timer);
    stop();
  };
}

render(html`<${Page} />`, /** @type {HTMLElement} */ (document.getElementById("page")));
