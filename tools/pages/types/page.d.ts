/** What a component is given, of which some types are known. */
type Props<T> = T & Record<string, any>;

declare namespace Api {
  /** The endpoint of a path. */
  type Of<E extends { path: string[] }, P> = E extends { path: infer Q } ? (Q extends P ? E : never) : never;
}
