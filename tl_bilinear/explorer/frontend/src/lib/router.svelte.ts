import { href, parse, type Route } from "./route";

export const router: { route: Route } = $state({ route: parse(location.hash) });

window.addEventListener("hashchange", () => {
  router.route = parse(location.hash);
});

/** Change parts of the query without a new entry in the history. */
export function refine(changes: Record<string, string | number>): void {
  const { path, query } = router.route;
  history.replaceState(null, "", href(path, { ...query, ...changes }));
  router.route = parse(location.hash);
}

/** Go to a place, as a link would. */
export function go(path: (string | number)[], query: Record<string, string | number> = {}): void {
  location.hash = href(path, query);
}
