// Curves over training steps, drawn by uPlot in the page's own colours.
import { html, useEffect, useRef } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { measured, whole } from "../lib/words.mjs";
import UPlot from "../vendor/uplot.mjs";

const HEIGHT = 260;
const NARROW_HEIGHT = 200;

/**
 * A plot of lines that may have different steps.
 *
 * @param lines [{label, xs, ys, color (a CSS variable), width, points, dash}]
 * @param label what the plot shows, for those who do not see it
 * @param axis what the lines are of, beside their axis
 * @param marks [{x, label}] vertical lines
 */
export function Curves({ lines, label, axis = t`Loss`, marks = [] }) {
  const host = useRef(null);
  const plot = useRef(null);
  const shape = lines.map((line) => `${line.label}|${line.color}`).join("\n");
  const latest = useRef(marks);
  latest.current = marks;

  const drawn = useRef(lines);
  drawn.current = lines;

  useEffect(() => {
    const box = host.current;
    const draw = () => {
      plot.current?.destroy();
      plot.current = new UPlot(options(box, drawn.current, axis, latest), joined(drawn.current), box);
    };
    draw();
    const size = new ResizeObserver(() => plot.current?.setSize(sizeOf(box)));
    size.observe(box);
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    scheme.addEventListener("change", draw);
    return () => {
      size.disconnect();
      scheme.removeEventListener("change", draw);
      plot.current?.destroy();
      plot.current = null;
    };
  }, [shape]);
  useEffect(() => plot.current?.setData(joined(lines)), [lines, marks.length]);
  return html`<div class="plot" ref=${host} role="img" aria-label=${label}></div>`;
}

function joined(lines) {
  const tables = lines.map((line) => [line.xs.length ? line.xs : [0], line.xs.length ? line.ys : [null]]);
  return UPlot.join(
    tables,
    tables.map((table) => table.slice(1).map(() => 1)),
  );
}

const sizeOf = (host) => ({
  width: Math.max(240, host.clientWidth),
  height: host.clientWidth < 520 ? NARROW_HEIGHT : HEIGHT,
});

function options(host, lines, name, marks) {
  const style = getComputedStyle(host);
  const color = (name) => style.getPropertyValue(name).trim();
  const font = `12px ${style.fontFamily}`;
  const axis = { stroke: color("--faint"), grid: { stroke: color("--grid"), width: 1 }, ticks: { show: false }, font };
  return {
    ...sizeOf(host),
    padding: [10, 12, 0, 0],
    scales: { x: { time: false, range: (_, low, high) => [Math.min(low ?? 0, 0), Math.max(high ?? 1, 1)] } },
    axes: [
      {
        ...axis,
        label: t`Step`,
        labelFont: font,
        labelSize: 18,
        values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? whole(tick) : "")),
        size: 32,
      },
      {
        ...axis,
        label: name,
        labelFont: font,
        labelSize: 18,
        size: 54,
        values: (_, ticks) => ticks.map((tick) => String(Number(tick.toPrecision(6)))),
      },
    ],
    cursor: { points: { size: 7 }, drag: { x: true, y: false } },
    legend: { live: true },
    series: [
      { label: t`Step`, value: (_, step) => (step === null ? "–" : whole(step)) },
      ...lines.map((line) => ({
        label: line.label,
        stroke: color(line.color),
        width: line.width ?? 2,
        dash: line.dash,
        spanGaps: true,
        points: { show: line.points ?? false, size: 6, fill: color(line.color) },
        value: (_, value) => (value === null || value === undefined ? "–" : measured(value)),
      })),
    ],
    hooks: {
      draw: [
        (plot) => {
          for (const mark of marks.current) {
            const x = Math.round(plot.valToPos(mark.x, "x", true));
            plot.ctx.save();
            plot.ctx.strokeStyle = color("--good");
            plot.ctx.setLineDash([4, 4]);
            plot.ctx.beginPath();
            plot.ctx.moveTo(x, plot.bbox.top);
            plot.ctx.lineTo(x, plot.bbox.top + plot.bbox.height);
            plot.ctx.stroke();
            if (mark.label) {
              const isLeft = x > plot.bbox.left + plot.bbox.width / 2;
              plot.ctx.fillStyle = color("--good");
              plot.ctx.font = `${12 * devicePixelRatio}px ${style.fontFamily}`;
              plot.ctx.textAlign = isLeft ? "right" : "left";
              plot.ctx.fillText(
                mark.label,
                x + (isLeft ? -6 : 6) * devicePixelRatio,
                plot.bbox.top + 12 * devicePixelRatio,
              );
            }
            plot.ctx.restore();
          }
        },
      ],
    },
  };
}

/** Colours that lines of different runs take, one after another. */
export const LINE_COLORS = ["--line-1", "--line-2", "--line-3", "--line-4", "--line-5", "--line-6"];
