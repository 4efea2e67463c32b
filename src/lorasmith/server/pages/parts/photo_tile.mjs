// A picture of the contact sheet, with its mask, what is trained of it, and a dot if something is remarked about it.
import { address } from "../lib/api.mjs";
import { html, useMemo, useRef, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { capital, count } from "../lib/words.mjs";
import { Icon } from "./icons.mjs";

export const THUMBNAIL = 480; // pixels
const USUAL = 1; // width by height where it is not known

/** The address of a photo, reduced; another one when it was cropped, as its name may stay. */
export const sourceOf = (dataset, image, width) =>
  address(["datasets", dataset, "images", image.file], {
    width,
    v: image.crop
      ? Object.values(image.crop)
          .map((one) => one.toFixed(4))
          .join(" ")
      : image.bytes,
  });

/** @param {number} version of the masks, whose names stay when they are painted again */
export const maskOf = (dataset, image, width, version) =>
  address(["datasets", dataset, "images", image.file], { width, mask: "true", v: version });

/** The picture before of a pair, of `before.mjs`, by its name. */
export const controlOf = (dataset, file, version) =>
  address(["datasets", dataset, "controls", file], { width: THUMBNAIL, v: version });

const share = (number) => `${(100 * number).toFixed(2)}%`;

/** What is not trained of a picture, shaded: what is cut off, and what is outside of its mask. */
export function Shades({ crop, mask }) {
  const isCut = crop && (crop.width <= 0.995 || crop.height <= 0.995);
  return html`
    ${mask && html`<span class="mask-shade" style=${{ "--mask": `url("${mask}")` }}></span>`}
    ${
      isCut &&
      html`<span class="crop" title="The part that is trained"
        style=${{ left: share(crop.x), top: share(crop.y), width: share(crop.width), height: share(crop.height) }}>
      </span>`
    }
  `;
}

/** What a drag of a picture before carries. */
const DRAGGED = "application/x-lorasmith-control";

/**
 * @param {Props<{ image: Api.PictureRow }>} props
 *   `image`: a photo of the dataset, or `upload`, one on its way there
 *   `picture`: address of a copy of one that was left out
 *   `facts`: its {crop} of the check; null to draw none
 *   `words`: of `PAIRS` for a pair, else null
 *   `actions`: {onChoose(file, event), onOpen(file), onPair(control, file)}; null for what is on its way
 */
export function PhotoTile(props) {
  const { dataset, image, upload, picture, preview, caption, remarks, facts, version, words, isChosen, isAt } = props;
  const [unseen, setUnseen] = useState([]); // addresses that the browser could not show
  const [over, setOver] = useState(false);
  const latest = useRef(props.actions); // what is drawn is kept while nothing of it changes
  latest.current = props.actions;
  const canPair = Boolean(props.actions?.onPair);
  return useMemo(() => {
    const name = image?.file ?? upload.name;
    const sources = upload
      ? [upload.preview]
      : picture
        ? [picture]
        : [...(preview && !image.crop ? [preview] : []), sourceOf(dataset, image, THUMBNAIL)];
    const source = sources.find((one) => !unseen.includes(one));
    const ratio = image?.width && image.height ? image.width / image.height : USUAL;
    const kind = picture ? "pale" : (upload?.state ?? "");
    const control = words && image ? image.controls[0] : null;
    const missing =
      words && image && (!control ? t`No ${words.other}` : control.problem || (control.fixed && control.file));
    const badge = picture ? t`Left out` : upload && (upload.state === "sending" ? t`Sending…` : t`Waiting…`);
    const said = [
      upload?.isBefore ? t`Before: ${name}` : name,
      missing,
      badge,
      caption,
      remarks && count(remarks, "hint"),
    ];
    return html`<li class=${`tile ${kind} ${words ? "paired" : ""}`} role="option" data-file=${name}
        style=${{ "--ratio": ratio * (words && image ? 2 : 1) }} tabindex=${isAt ? 0 : -1}
        aria-selected=${isChosen ? "true" : "false"} aria-disabled=${upload ? "true" : undefined}
        aria-label=${said.filter(Boolean).join(", ")}
        onClick=${(event) => latest.current?.onChoose(name, event)} onDblClick=${() => latest.current?.onOpen?.(name)}>
      ${
        words &&
        image &&
        html`<div class=${`half before ${over ? "over" : ""}`} data-before=${picture ? undefined : name}
            onDragOver=${(event) => {
              if (!canPair || !event.dataTransfer.types.includes(DRAGGED)) return;
              event.preventDefault();
              setOver(true);
            }} onDragLeave=${() => setOver(false)}
            onDrop=${(event) => {
              setOver(false);
              const control = event.dataTransfer.getData(DRAGGED);
              if (!control || !canPair) return;
              event.preventDefault();
              latest.current?.onPair(control, name);
            }}>
          ${
            missing
              ? html`<span class="missing">${missing}</span>`
              : control &&
                html`<img key=${control.file} src=${controlOf(dataset, control.file, version)} loading="lazy"
                  alt=${`${capital(words.other)}: ${control.file}`} draggable=${canPair ? "true" : "false"}
                  onDragStart=${(event) => event.dataTransfer.setData(DRAGGED, control.file)} />`
          }
        </div>`
      }
      <div class="half">
        ${
          source
            ? html`<img src=${source} alt="" loading="lazy" draggable="false"
              onError=${() => setUnseen((all) => [...all, source])} />`
            : html`<span class="missing">${name}</span>`
        }
        ${
          image &&
          !picture &&
          html`<${Shades} crop=${facts?.crop} mask=${image.mask && maskOf(dataset, image, THUMBNAIL, version)} />`
        }
      </div>
      ${badge && html`<span class="badge pill">${badge}</span>`}
      ${remarks > 0 && html`<span class="dot-mark"></span>`}
      ${image?.mask && html`<span class="badge mask-mark"><${Icon} name="brush" /></span>`}
    </li>`;
  }, [
    ...[dataset, image, upload, picture, preview, caption, remarks, version, words, isChosen, isAt, unseen, over],
    ...[facts?.crop, canPair],
  ]);
}
