import { href, parse, type Route } from "./route";

export const router: { route: Route } = $state({ route: parse(location.hash) });

// In a notebook's frame (about:srcdoc) there is no address to keep the state in: it is kept here alone.
const framed = location.protocol === "about:";

window.addEventListener("hashchange", () => {
  router.route = parse(location.hash);
});

if (framed) {
  document.addEventListener("click", (event) => {
    const link = (event.target as Element).closest?.("a")?.getAttribute("href");
    if (!link?.startsWith("#/") || event.defaultPrevented) return;
    event.preventDefault();
    router.route = parse(link);
    scrollTo(0, 0);
  });
}

/** Change parts of the query without a new entry in the history. */
export function refine(changes: Record<string, string | number>): void {
  const { path, query } = router.route;
  const link = href(path, { ...query, ...changes });
  if (!framed) history.replaceState(null, "", link);
  router.route = parse(link);
}

/** Go to a place, as a link would. */
export function go(path: (string | number)[], query: Record<string, string | number> = {}): void {
  if (framed) router.route = parse(href(path, query));
  else location.hash = href(path, query);
}
