import { inNotebook } from "./model";
import { href, parse, type Route } from "./route";

export const router: { route: Route } = $state({ route: parse(location.hash) });

// In a notebook's frame (about:srcdoc) there is no address to keep the state in: it is kept here alone.
const framed = location.protocol === "about:";

window.addEventListener("hashchange", () => {
  router.route = parse(location.hash);
});

// In a notebook's widget Python knows the place, and may change it.
if (inNotebook()) {
  addEventListener("message", ({ source, data }) => {
    if (source === parent && data?.tlBilinear === "place") router.route = parse(data.place);
  });
  parent.postMessage({ tlBilinear: "ready" }, "*");
}

function move(link: string): void {
  router.route = parse(link);
  if (inNotebook()) parent.postMessage({ tlBilinear: "place", place: link }, "*");
}

if (framed) {
  document.addEventListener("click", (event) => {
    const link = (event.target as Element).closest?.("a")?.getAttribute("href");
    if (!link?.startsWith("#/") || event.defaultPrevented) return;
    event.preventDefault();
    move(link);
    scrollTo(0, 0);
  });
}

/** Change parts of the query without a new entry in the history. */
export function refine(changes: Record<string, string | number>): void {
  const { path, query } = router.route;
  const link = href(path, { ...query, ...changes });
  if (!framed) history.replaceState(null, "", link);
  move(link);
}

/** Go to a place, as a link would. */
export function go(path: (string | number)[], query: Record<string, string | number> = {}): void {
  if (framed) move(href(path, query));
  else location.hash = href(path, query);
}
