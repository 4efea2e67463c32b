// All sets of photos as tiles, the examples last.
import { address, get } from "../lib/api.mjs";
import { html } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { useEvents } from "../lib/live.mjs";
import { link } from "../lib/router.mjs";
import { count } from "../lib/words.mjs";
import { Loading, Problem, useLoaded } from "../parts/basics.mjs";
import { NewTile } from "../parts/new_set.mjs";

const TILE_PX = 320;

export function SetsView() {
  const [found, error, reload] = useLoaded((signal) => get(["datasets"], {}, signal), []);
  useEvents("", { dataset: reload });
  return html`<section aria-labelledby="sets">
    <h1 id="sets">Photos</h1>
    <${Problem} error=${error} onRetry=${reload} />
    ${!found && !error && html`<${Loading} what="sets of photos" />`}
    ${
      found &&
      html`<ul class="covers sets">
        <li><${NewTile} /></li>
        ${found.datasets.map((one) => html`<${SetTile} key=${one.name} set=${one} />`)}
      </ul>`
    }
  </section>`;
}

const coversOf = (set) => set.covers.map((file) => address(["datasets", set.name, "images", file], { width: TILE_PX }));

/** Up to four pictures of a set; none of one that is not there. */
export function useCovers(name) {
  const [found] = useLoaded((signal) => (name ? get(["datasets"], { name }, signal) : Promise.resolve(null)), [name]);
  const set = found?.datasets[0];
  return set ? coversOf(set) : [];
}

/**
 * A set as four of its pictures, or as one where it has fewer.
 *
 * @param {Props<{ set: Api.DatasetRow }>} props
 */
export function SetTile({ set }) {
  const covers = coversOf(set);
  const shown = covers.length < 4 ? covers.slice(0, 1) : covers;
  return html`<li>
    <a class=${`cover ${shown.length > 1 ? "four" : ""}`} href=${link("new", set.name, "photos")}>
      ${shown.map((src) => html`<img key=${src} src=${src} alt="" loading="lazy" decoding="async" />`)}
      <span class="cover-words">
        <b>${set.name}</b><span>${set.builtin ? t`example · ` : ""}${count(set.images, "picture")}</span>
      </span>
    </a>
  </li>`;
}
