// SPDX-License-Identifier: GPL-3.0-only
// Copyright 2026 The Lorasmith developers
//
// This program is free software: you can redistribute it and/or modify it under the terms of the GNU General Public
// License, version 3, as published by the Free Software Foundation. It is distributed WITHOUT ANY WARRANTY; the text of
// the licence is in LICENSE-GPL-3.0.txt of the package. It holds for this file alone, which runs as part of ComfyUI's
// editor and imports its modules.

// Shows a running training on the node Train LoRA: loss curve, figures and the latest previews. It listens to messages
// `lorasmith.training` of the WebSocket, `{prompt_id, node, view}`: what is shown of the training, the whole in the first
// message of a connection, then what has changed. It is neither part of the prompt nor of the saved workflow.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { defaultGraph } from "../../scripts/defaultGraph.js";

const NODE_TYPE = "TrainLoraNode";
const FIRST_TEMPLATE = "single_subject";
const WIDGET = "lorasmith_training";
const MESSAGE = "lorasmith.training";
const HEIGHT = 250; // pixels of the widget
const GAP = 4; // pixels that the editor adds to the height of a widget
const READABLE = 0.6; // scale below which the editor draws no text
const TITLE = 30; // height of a node's title
const FILLED = 0.75; // share of the window that the editor fits a graph into
const BACK = "Lorasmith.Back";
const COLORS = { raw: "#7f9fc2", trend: "#4f9be8", heldOut: "#f08a3c", grid: "#7f7f7f55", text: "#9aa4ad" };

const MOST_TRAININGS = 30;

// What is known of the last runs, by prompt and node.
const trainings = new Map();

function decimals(number) {
  return number >= 0.001 && number < 1000 ? number.toPrecision(3) : number.toExponential(2);
}

function figuresOf(view) {
  const step = view.step ? [view.steps ? `step ${view.step} of ${view.steps}` : `step ${view.step}`] : [];
  return [...step, ...view.metrics.map((one) => one.line)].join(" · ");
}

// The latest pictures with the LoRA, and those without it to compare.
function latestPreviews(view) {
  const drawn = view.previews.filter((one) => one.strength !== 0);
  const { step, strength } = drawn.at(-1) ?? {};
  return [
    ...view.previews.filter((one) => one.strength === 0),
    ...drawn.filter((one) => one.step === step && one.strength === strength),
  ];
}

function pictureUrl(view, preview) {
  const file = preview.file.split("/").map(encodeURIComponent).join("/");
  return `/lorasmith/v1/runs/${encodeURIComponent(view.run)}/files/${file}`;
}

// The elements of one node's panel.
class Panel {
  constructor(node) {
    this.root = element("div", "lorasmith-training");
    this.figures = element("div", "lorasmith-figures", this.root);
    this.canvas = element("canvas", "lorasmith-curve", this.root);
    this.pictures = element("div", "lorasmith-previews", this.root);
    this.foot = element("div", "lorasmith-foot", this.root);
    this.state = element("div", "lorasmith-state", this.foot);
    this.more = element("button", "lorasmith-more", this.foot);
    this.more.type = "button";
    this.more.addEventListener("click", () => {
      showAdvanced(node, !node.showAdvanced);
      this.schedule();
    });
    this.node = node;
    this.shownPictures = "";
    Object.assign(this.root.style, {
      display: "flex",
      flexDirection: "column",
      gap: "4px",
      boxSizing: "border-box",
      width: "100%",
      height: "100%",
      minHeight: `${HEIGHT}px`,
      padding: "6px 8px",
      overflow: "hidden",
      borderRadius: "6px",
      background: "var(--comfy-input-bg, #222)",
      color: "var(--input-text, #ddd)",
      font: "11px/1.35 Inter, system-ui, sans-serif",
    });
    Object.assign(this.figures.style, { fontVariantNumeric: "tabular-nums", minHeight: "30px", flex: "none" });
    Object.assign(this.canvas.style, { width: "100%", flex: "1 1 0", minHeight: "60px" });
    Object.assign(this.pictures.style, { display: "none", gap: "4px", height: "76px", flex: "none", overflow: "hidden" });
    Object.assign(this.foot.style, { display: "flex", gap: "8px", flex: "none", alignItems: "baseline" });
    Object.assign(this.more.style, {
      flex: "none",
      padding: "1px 6px",
      border: "1px solid var(--border-color, #555)",
      borderRadius: "4px",
      background: "none",
      color: "inherit",
      font: "inherit",
      cursor: "pointer",
    });
    Object.assign(this.state.style, {
      flex: "1 1 0",
      opacity: "0.8",
      whiteSpace: "nowrap",
      overflow: "hidden",
      textOverflow: "ellipsis",
    });
    this.canvas.setAttribute("role", "img");
    new ResizeObserver(() => this.schedule()).observe(this.canvas);
    this.show(undefined);
  }

  // Draw `training` in the next frame, however many events arrive before it.
  show(training) {
    this.training = training;
    this.schedule();
  }

  schedule() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = undefined;
      this.draw();
    });
  }

  draw() {
    const training = this.training;
    const view = training?.view;
    const figures = view ? figuresOf(view) : "";
    this.figures.textContent = view ? figures : "Loss and previews appear here while the node trains.";
    this.state.textContent = training?.end || view?.status || "";
    this.state.title = this.state.textContent;
    this.more.textContent = this.node.showAdvanced ? "Fewer settings" : "More settings";
    this.canvas.setAttribute("aria-label", view ? `Loss curve: ${figures}` : "No loss yet");
    this.drawPictures(view ?? { previews: [] });
    drawCurve(this.canvas, view);
  }

  drawPictures(view) {
    const shown = latestPreviews(view).slice(0, 8);
    const key = JSON.stringify([view.run, shown]);
    if (key === this.shownPictures) return;
    this.shownPictures = key;
    this.pictures.style.display = shown.length ? "flex" : "none";
    this.pictures.replaceChildren(
      ...shown.map((one) => {
        const label = one.strength === 0 ? "without LoRA" : `step ${one.step}`;
        const figure = element("figure", "lorasmith-preview");
        Object.assign(figure.style, { margin: "0", display: "flex", flexDirection: "column", alignItems: "center" });
        const image = element("img", "", figure);
        image.src = pictureUrl(view, one);
        image.alt = `${label}: ${one.prompt}`;
        image.title = image.alt;
        Object.assign(image.style, { height: "60px", borderRadius: "4px", display: "block" });
        const caption = element("figcaption", "", figure);
        caption.textContent = label;
        Object.assign(caption.style, { fontSize: "10px", lineHeight: "14px", opacity: "0.8" });
        return figure;
      }),
    );
  }
}

function element(tag, className, parent) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  parent?.append(made);
  return made;
}

function drawCurve(canvas, view) {
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width || !height) return;
  // A canvas whose size is set is cleared, so one that keeps its size is cleared by hand.
  const [columns, rows] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== columns || canvas.height !== rows) Object.assign(canvas, { width: columns, height: rows });
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  if (!view || !(view.curve.length || view.validations.length)) return;
  const points = view.curve.filter(([, loss]) => loss !== null);
  const heldOut = view.validations.filter((one) => one.loss !== null);

  const [left, right, top, bottom] = [40, width - 8, 6, height - 14];
  const [low, high] = range(points, heldOut);
  const lastStep = Math.max(view.steps, view.step, 1);
  const x = (step) => left + ((right - left) * step) / lastStep;
  const y = (loss) => bottom - ((bottom - top) * (Math.min(Math.max(loss, low), high) - low)) / (high - low || 1);

  context.font = "10px Inter, system-ui, sans-serif";
  context.fillStyle = COLORS.text;
  context.strokeStyle = COLORS.grid;
  context.lineWidth = 1;
  for (const share of [0, 0.5, 1]) {
    const loss = low + (high - low) * share;
    line(context, [[left, y(loss)], [right, y(loss)]]);
    context.textAlign = "right";
    context.fillText(decimals(loss), left - 4, y(loss) + 3);
  }
  context.textAlign = "left";
  context.fillText("0", left, height - 2);
  context.textAlign = "right";
  context.fillText(String(lastStep), right, height - 2);

  context.save();
  context.beginPath();
  context.rect(left - 3, top - 3, right - left + 6, bottom - top + 6);
  context.clip();
  context.strokeStyle = COLORS.raw;
  context.globalAlpha = 0.45;
  line(context, points.map(([step, loss]) => [x(step), y(loss)]));
  context.globalAlpha = 1;
  context.strokeStyle = COLORS.trend;
  context.lineWidth = 2;
  line(context, points.map(([step, , mean]) => [x(step), y(mean)]));
  context.strokeStyle = COLORS.heldOut;
  context.lineWidth = 1.5;
  line(context, heldOut.map(({ step, loss }) => [x(step), y(loss)]));
  context.fillStyle = COLORS.heldOut;
  for (const { step, loss, best } of heldOut) {
    context.beginPath();
    context.arc(x(step), y(loss), best ? 4 : 2.5, 0, 2 * Math.PI);
    context.fill();
  }
  context.restore();
}

// Lowest and highest loss of the axis: of the means and the held-out losses, and of most single losses, so that one
// outlier does not flatten the curve.
function range(points, heldOut) {
  const single = points.map(([, loss]) => loss).sort((a, b) => a - b);
  const kept = [
    ...(single.length ? [single[Math.floor(single.length * 0.02)], single[Math.ceil((single.length - 1) * 0.98)]] : []),
    ...points.map(([, , mean]) => mean),
    ...heldOut.map(({ loss }) => loss),
  ];
  let [low, high] = [Infinity, -Infinity];
  for (const loss of kept) [low, high] = [Math.min(low, loss), Math.max(high, loss)];
  const margin = (high - low || Math.abs(high) || 1) * 0.05;
  return [Math.max(0, low - margin), high + margin];
}

function line(context, points) {
  context.beginPath();
  for (const [x, y] of points) context.lineTo(x, y);
  context.stroke();
}

// The node with an id as in a prompt: `12:5` is node 5 in the subgraph of node 12.
function nodeOf(executionId) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const part of String(executionId).split(":")) {
    node = graph?.getNodeById?.(Number.isNaN(Number(part)) ? part : Number(part));
    graph = node?.subgraph;
  }
  return node?.lorasmithPanel ? node : undefined;
}

// The last training of a node in the graph that is open; another graph may have a node with the same id.
function trainingOf(executionId) {
  const graphId = (app.rootGraph ?? app.graph)?.id;
  const mine = [...trainings.values()].filter(
    (one) => one.nodeId === String(executionId) && (!one.workflowId || !graphId || one.workflowId === graphId),
  );
  return mine.at(-1);
}

function update(executionId) {
  nodeOf(executionId)?.lorasmithPanel.show(trainingOf(executionId));
}

// Panels of nodes that were loaded after their training started, as when another workflow was open.
function updateAll() {
  for (const training of trainings.values()) update(training.nodeId);
}

function endAll(promptId, end) {
  for (const training of trainings.values()) {
    if (training.promptId !== promptId || training.view.outcome) continue;
    training.end = end;
    update(training.nodeId);
  }
}

function onTraining({ detail }) {
  const { node: nodeId, prompt_id: promptId, view } = detail ?? {};
  if (nodeId === undefined || promptId === undefined) return;
  const key = `${promptId} ${nodeId}`;
  let training = trainings.get(key);
  if (!training) {
    training = { promptId, nodeId: String(nodeId), workflowId: undefined, view: {}, end: "" };
    trainings.set(key, training);
    if (trainings.size > MOST_TRAININGS) trainings.delete(trainings.keys().next().value);
    learnWorkflow(training);
  }
  Object.assign(training.view, view);
  training.end = "";
  update(nodeId);
}

// Ask the server which graph a training belongs to.
async function learnWorkflow(training) {
  try {
    const answer = await api.fetchApi(`/jobs/${encodeURIComponent(training.promptId)}`);
    if (answer.ok) training.workflowId = (await answer.json()).workflow_id;
  } catch (error) {
    console.warn("Lorasmith: the graph of the training is not known", error);
  }
  update(training.nodeId);
}

// Show or hide the settings that the node declares as advanced. On its canvas the editor leaves gaps for advanced widgets
// that are out of sight; older releases do for hidden ones, too, unless these say that they have no height.
function showAdvanced(node, shown) {
  node.showAdvanced = shown;
  for (const widget of node.widgets) {
    if (!optionsOf(node, widget)?.advanced) continue;
    widget.options.advanced = false; // or nodes drawn by Vue had a second button for these
    widget.hidden = !shown;
    if (!("lorasmithSize" in widget)) {
      Object.defineProperty(widget, "lorasmithSize", { value: widget.computeSize, enumerable: false });
    }
    widget.computeSize = shown ? widget.lorasmithSize : () => [0, -GAP];
  }
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, node.size[0]), height]);
  node.setDirtyCanvas(true, true);
}

// Older releases bring names of outputs that this node no longer has.
function nameOutputs(node) {
  const names = node.constructor.nodeData?.output_name ?? [];
  for (const [index, output] of node.outputs.entries()) {
    if (output.localized_name) output.localized_name = names[index] ?? output.name;
  }
}

function optionsOf(node, widget) {
  const { required, optional } = node.constructor.nodeData?.input ?? {};
  return (optional?.[widget.name] ?? required?.[widget.name])?.[1];
}

// Whether an advanced setting differs from its default: it is never out of sight.
function isTuned(node) {
  return node.widgets.some((widget) => {
    const options = optionsOf(node, widget);
    return options?.advanced && widget.value !== options.default;
  });
}

// The prompt that is being loaded, if what is loaded is a prompt.
let loading;

// The editor gives a node of an unknown class no outputs when it loads a prompt, so that what it fed would run without.
function keepLinksOfUnknownNodes(prompt) {
  const nodes = new Map((app.rootGraph ?? app.graph).nodes.map((node) => [String(node.id), node]));
  for (const [id, { inputs }] of Object.entries(prompt)) {
    for (const [name, value] of Object.entries(inputs ?? {})) {
      if (!Array.isArray(value)) continue;
      const [source, target, slot] = [nodes.get(String(value[0])), nodes.get(id), value[1]];
      const index = target?.inputs?.findIndex((input) => input.name === name) ?? -1;
      if (!source?.last_serialization || index < 0 || target.inputs[index].link != null) continue;
      while (source.outputs.length <= slot) source.addOutput("*", "*");
      source.connect(slot, target, index);
      source.last_serialization.outputs = source.outputs.map(({ name, type, links }) => ({ name, type, links }));
    }
  }
}

// The editor rounds the numbers of a prompt to the steps of their widgets, such as 0.5625 megapixels to 0.56.
function keepNumbers(prompt) {
  const nodes = new Map((app.rootGraph ?? app.graph).nodes.map((node) => [String(node.id), node]));
  for (const [id, { inputs }] of Object.entries(prompt)) {
    for (const widget of nodes.get(id)?.widgets ?? []) {
      if (typeof inputs?.[widget.name] === "number") widget.value = inputs[widget.name];
    }
  }
}

// Where "Back to Lorasmith" leads: to the run whose graph was opened, else home.
let back = new URL("../", location.href);

// The editor fits a graph that it opens into the window. Where its text could not be read then, the training is fitted.
function fitReadably(canvas) {
  const { ds } = canvas;
  const fit = ds.fitToBounds;
  ds.fitToBounds = function (bounds, ...options) {
    fit.call(this, bounds, ...options);
    const train = this.scale < READABLE && (app.rootGraph ?? app.graph).nodes.find((node) => node.lorasmithPanel);
    if (!train || canvas.graph !== train.graph) return;
    const { pos: [x, y], size: [width, height] } = train;
    const most = (FILLED * canvas.canvas.clientHeight) / READABLE; // its beginning, where the window is low
    fit.call(this, [x, y - TITLE, width, Math.min(height + TITLE, most)], ...options);
  };
}

// Whether the open graph is the one that the editor opens when it has none, as it is.
function isFirstGraph() {
  const { nodes, links } = (app.rootGraph ?? app.graph).serialize();
  const first = new Map(defaultGraph.nodes.map((node) => [node.id, node]));
  const isSame = ({ id, type, widgets_values: values }) => {
    const before = first.get(id);
    const known = before?.widgets_values ?? []; // nodes have further values here, such as what a seed becomes
    return before?.type === type && known.every((value, index) => value === values?.[index]);
  };
  return nodes.length === first.size && links.length === defaultGraph.links.length && nodes.every(isSame);
}

// The run that the page's "Open in editor" names in the address: its graph is opened once, in place of the last one.
async function openRun() {
  const address = new URL(location.href);
  const run = address.searchParams.get("run");
  if (!run) return;
  address.searchParams.delete("run");
  history.replaceState(history.state, "", address);
  back = new URL(`../#/runs/${encodeURIComponent(run)}`, address);
  const { workflow } = app.extensionManager;
  const before = isFirstGraph() ? workflow.activeWorkflow : undefined;
  try {
    const answer = await fetch(`/lorasmith/v1/runs/${encodeURIComponent(run)}/graph`);
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error.message);
    await app.loadApiJson(found, run.split("/").pop());
    if (before?.isTemporary && before !== workflow.activeWorkflow) await workflow.closeWorkflow(before);
  } catch (error) {
    app.extensionManager.toast.add({ severity: "error", summary: "The graph of this run cannot be opened", detail: error.message });
  }
}

// The editor opens its last graph after extensions are set up.
function whenGraphIsOpen(then) {
  if (app.vueAppReady && app.extensionManager?.workflow?.activeWorkflow) then();
  else setTimeout(() => whenGraphIsOpen(then), 200);
}

// Before the editor connects, as the first message of a connection has all of a training, and later ones what changed.
api.addEventListener(MESSAGE, onTraining);

app.registerExtension({
  name: "Lorasmith.Training",

  commands: [{ id: BACK, label: "Back to Lorasmith", icon: "pi pi-arrow-left", function: () => location.assign(back) }],
  menuCommands: [{ path: ["File"], commands: [BACK] }],
  actionBarButtons: [
    {
      icon: "icon-[lucide--arrow-left]",
      label: "Lorasmith",
      tooltip: "Back to Lorasmith",
      onClick: () => location.assign(back),
    },
  ],

  // The graph that the editor opens when it has none, and as "Load default": its own needs models that are not here.
  async init() {
    const load = app.loadApiJson;
    app.loadApiJson = async function (prompt, ...rest) {
      loading = prompt;
      try {
        const loaded = await load.call(this, prompt, ...rest);
        keepNumbers(prompt);
        return loaded;
      } finally {
        loading = undefined;
      }
    };
    if (new URL(location.href).searchParams.has("run")) {
      await app.extensionManager?.setting?.set("Comfy.TutorialCompleted", true); // no list of templates above the graph
    }
    try {
      const answer = await fetch(api.fileURL(`/templates/${FIRST_TEMPLATE}.json`));
      if (answer.ok) Object.assign(defaultGraph, await answer.json());
    } catch (error) {
      console.warn("Lorasmith: the first template is not available", error);
    }
  },

  afterConfigureGraph() {
    if (loading) keepLinksOfUnknownNodes(loading);
  },

  setup() {
    fitReadably(app.canvas);
    whenGraphIsOpen(openRun);
    api.addEventListener("execution_error", ({ detail }) => endAll(detail.prompt_id, "Failed."));
    api.addEventListener("execution_interrupted", ({ detail }) =>
      endAll(detail.prompt_id, "Cancelled; running again resumes it."),
    );
  },

  nodeCreated(node) {
    if ((node.comfyClass ?? node.constructor?.comfyClass) !== NODE_TYPE) return;
    const panel = new Panel(node);
    const widget = node.addDOMWidget(WIDGET, WIDGET, panel.root, {
      serialize: false, // not in the prompt
      hideOnZoom: false,
      getValue: () => undefined,
      setValue: () => {},
      getMinHeight: () => HEIGHT,
    });
    widget.serialize = false; // nor in the workflow's widgets_values
    Object.defineProperty(node, "lorasmithPanel", { value: panel, enumerable: false });
    showAdvanced(node, false);
    nameOutputs(node);
  },

  loadedGraphNode(node) {
    if (!node.lorasmithPanel) return;
    nameOutputs(node);
    if (node.showAdvanced || isTuned(node)) showAdvanced(node, true);
    queueMicrotask(updateAll);
  },
});
