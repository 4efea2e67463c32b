// What the page uses of it. What begins with null or an empty list may be replaced by anything, unless its type is given.
type Next<T> = (next: T | ((before: T) => T)) => void;
export function useState(initial: null): [any, Next<any>];
export function useState(initial: never[]): [any[], Next<any[]>];
export function useState<T>(initial: T | (() => T)): [T, Next<T>];
export function useRef(initial: null): { current: any };
export function useRef<T>(initial: T): { current: T };
export function useMemo<T>(make: () => T, keys: unknown[]): T;
export function useCallback<T extends Function>(callback: T, keys: unknown[]): T;
export function useEffect(effect: () => unknown, keys?: unknown[]): void;
export function useLayoutEffect(effect: () => unknown, keys?: unknown[]): void;
export function useId(): string;
