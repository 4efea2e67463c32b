// What the page uses of it.
export interface VNode {
  type: unknown;
  props: any;
  key: unknown;
}
export function createElement(type: unknown, props: unknown, ...children: unknown[]): VNode;
export function render(node: VNode, parent: Element): void;
export const Fragment: (props: { children?: unknown }) => VNode;
