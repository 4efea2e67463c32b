// Pictures that become a new set of photos: dropped anywhere on the page, pasted, or chosen.
import { get, post } from "../lib/api.mjs";
import { isArchive, withoutArchive } from "../lib/archives.mjs";
import { html, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { go } from "../lib/router.mjs";
import { canDrop, sorted, upload } from "../lib/uploads.mjs";
import { slug } from "../lib/words.mjs";
import { Problem } from "./basics.mjs";
import { ChooseFiles, useDrops } from "./drop_zone.mjs";
import { Icon } from "./icons.mjs";

const CAMERAS = new Set(
  "dsc dscf dscn img image imgp photo photos picture pxl screenshot untitled whatsapp".split(" "),
);
const today = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });

/** The tile that makes a new set; the whole window takes drops while it is shown. */
export function NewTile({ title = t`New`, text = canDrop ? t`Drop pictures anywhere` : "" }) {
  const [error, setError] = useState(null);
  const take = async (files) => {
    setError(null);
    try {
      if (files.length) go("new", await newSet(files), "photos");
    } catch (failure) {
      setError(failure);
    }
  };
  const isOver = useDrops((files) => take(files));
  return html`<div class=${`new-tile ${isOver ? "over" : ""}`}>
    <${Icon} name="plus" />
    <p><b>${isOver ? t`Let go to add them` : title}</b>${text && html`<span>${text}</span>`}</p>
    <${ChooseFiles} onFiles=${take} /><${Problem} error=${error} />
  </div>`;
}

/** Begins to send files to a new set, and returns its name. */
async function newSet(files) {
  const { pictures, refused } = await sorted(files);
  const [first] = refused;
  if (!pictures.length)
    throw new Error(t`There are no pictures among these files${first ? `: ${first.name} ${first.reason}` : ""}.`);
  const folders = new Set(files.map(({ path }) => path.split("/")[0]));
  const isFolder = files[0].path.includes("/") || isArchive(files[0].path);
  const folder = folders.size === 1 && isFolder ? slug(withoutArchive([...folders][0])) : "";
  const name = await created(folder || sharedWord(pictures) || slug(`photos ${today.format(new Date())}`));
  upload(name, files);
  return name;
}

/** The first word that most names of pictures share, other than a camera's. */
function sharedWord(pictures) {
  const words = pictures.map(({ path }) =>
    slug(
      path
        .split("/")
        .pop()
        .replace(/\.[^.]*$/, ""),
    ).split("-"),
  );
  return words
    .flat()
    .find(
      (one) =>
        /^\p{L}{3,}$/u.test(one) &&
        !CAMERAS.has(one) &&
        words.filter((all) => all.includes(one)).length > words.length / 2,
    );
}

/** Creates a folder of photos under a free name and returns the name. */
async function created(wanted) {
  const names = new Set((await get(["datasets"])).datasets.map((one) => one.name));
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
