// The first view: a place for photos, the folders of photos that exist, and the latest runs.
import { address, get, post } from "../lib/api.mjs";
import { html, useState } from "../lib/html.mjs";
import { useEvents } from "../lib/live.mjs";
import { go, link } from "../lib/router.mjs";
import { useStore, work } from "../lib/stores.mjs";
import { sorted, upload } from "../lib/uploads.mjs";
import { count, slug } from "../lib/words.mjs";
import { Loading, Problem, useLoaded } from "../parts/basics.mjs";
import { DropZone } from "../parts/drop_zone.mjs";
import { Queue, jobsOfRuns } from "../parts/jobs.mjs";
import { RunCard } from "../parts/run_card.mjs";

const LATEST = 4;

export function HomeView() {
  const [datasets, datasetsError, reloadDatasets] = useLoaded((signal) => get(["datasets"], {}, signal), []);
  const [runs] = useLoaded((signal) => get(["runs"], { limit: 50 }, signal), []);
  const [error, setError] = useState(null);
  useEvents("", { dataset: reloadDatasets });

  async function take(files) {
    setError(null);
    try {
      if (!files.length) return;
      const { pictures, refused } = await sorted(files);
      const [first] = refused;
      if (!pictures.length)
        throw new Error(`There are no pictures among these files${first ? `: ${first.name} ${first.reason}` : ""}.`);
      const folders = new Set(files.map(({ path }) => path.split("/")[0]));
      const folder = folders.size === 1 && files[0].path.includes("/") ? slug([...folders][0]) : "";
      const name = await created(folder || "photos", datasets?.datasets ?? []);
      upload(name, files);
      go("new", name, "photos");
    } catch (failure) {
      setError(failure);
    }
  }

  const queued = jobsOfRuns(useStore(work)); // these are in the queue above
  const latest = (runs?.runs ?? []).filter((run) => !queued.has(run.id)).slice(0, LATEST);
  const known = (datasets?.datasets ?? []).filter((one) => !one.builtin);
  const examples = (datasets?.datasets ?? []).filter((one) => one.builtin);
  return html`
    <section class="hero">
      <h1>Turn photos into a LoRA</h1>
      <p class="lead">
        A LoRA is a small file that teaches an image model something new: a person, a pet, a thing, a style. Ten
        photos are enough.
      </p>
      <${DropZone} onFiles=${take} big />
      <${Problem} error=${error} />
    </section>
    <${Queue} />
    ${
      datasetsError
        ? html`<section><h2>Your photos</h2><${Problem} error=${datasetsError} onRetry=${reloadDatasets} /></section>`
        : !datasets
          ? html`<section><h2>Your photos</h2><${Loading} what="folders of photos" /></section>`
          : known.length > 0 &&
            html`<section aria-labelledby="known">
              <h2 id="known">Your photos</h2>
              <ul class="cards">${known.map(card)}</ul>
            </section>`
    }
    ${
      latest.length > 0 &&
      html`<section aria-labelledby="latest">
        <div class="head">
          <h2 id="latest">Latest runs</h2>
          ${runs && runs.total > 1 && html`<a href=${link("runs")}>All ${count(runs.total, "run")}</a>`}
        </div>
        <ul class="cards">${latest.map((run) => html`<li key=${run.id}><${RunCard} run=${run} /></li>`)}</ul>
      </section>`
    }
    ${
      examples.length > 0 &&
      html`<section aria-labelledby="examples">
        <h2 id="examples">No photos at hand?</h2><ul class="cards">${examples.map(card)}</ul>
      </section>`
    }
  `;
}

const card = (one) => html`<li key=${one.name}>
  <a class="card" href=${link("new", one.name, "photos")}>
    <span class="card-picture">
      ${
        one.cover &&
        html`<img src=${address(["datasets", one.name, "images", one.cover], { width: 320 })} alt="" loading="lazy" />`
      }
    </span>
    <b>${one.name}</b>
    <span class="faint">
      ${count(one.images, "picture")}, ${one.captions ? count(one.captions, "caption") : "no captions"}
    </span>
  </a>
</li>`;

/** Creates a folder of photos under a free name and returns the name. */
async function created(wanted, known) {
  const names = new Set(known.map((one) => one.name));
  for (let number = 1; ; number += 1) {
    const name = number === 1 ? wanted : `${wanted}-${number}`;
    if (names.has(name)) continue;
    try {
      return (await post(["datasets"], { name })).name ?? name;
    } catch (error) {
      if (error.status !== 409 || number > 200) throw error;
    }
  }
}
