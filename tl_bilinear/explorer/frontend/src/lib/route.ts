// The address after "#" is the state: #/panel/place/number?token=3.45&k=2

export interface Route {
  path: string[];
  query: Record<string, string>;
}

export function parse(hash: string): Route {
  const [path, query] = hash.replace(/^#\/?/, "").split("?");
  const decode = (text: string) => {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  };
  return {
    path: path.split("/").filter(Boolean).map(decode),
    query: Object.fromEntries(new URLSearchParams(query ?? "")),
  };
}

export function href(path: (string | number)[], query: Record<string, string | number> = {}): string {
  const tail = new URLSearchParams(
    Object.entries(query).filter(([, v]) => v !== "").map(([k, v]) => [k, String(v)]),
  ).toString();
  return `#/${path.map((part) => encodeURIComponent(String(part))).join("/")}${tail ? `?${tail}` : ""}`;
}
