import type { VNode } from "./preact.mjs";
declare const htm: {
  bind(createElement: unknown): (strings: TemplateStringsArray, ...values: unknown[]) => VNode;
};
export default htm;
