export function number(value: number, digits = 3): string {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e-3 && size < 1e5 ? size.toPrecision(digits) : size.toExponential(digits - 1);
  const plain = size >= 1000 && size < 1e5 ? String(Math.round(size)) : text;
  return (value < 0 ? "−" : "") + plain;
}

export function signed(value: number, digits = 3): string {
  return value > 0 ? `+${number(value, digits)}` : number(value, digits);
}

export function percent(share: number, digits = 1): string {
  return Number.isFinite(share) ? `${(100 * share).toFixed(digits)} %` : "–";
}

/** Blue for positive, red for negative, white for zero; share of the largest from -1 to 1. */
export function colour(share: number): string {
  const size = Math.min(1, Math.abs(share)) * 0.75;
  return share >= 0 ? `rgba(33, 102, 172, ${size})` : `rgba(178, 24, 43, ${size})`;
}

/** Save text as a file. */
export function download(name: string, text: string, kind = "text/csv"): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: kind }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

/** Rows as CSV. A cell that a spreadsheet would run as a formula gets an apostrophe in front. */
export function csv(rows: (string | number)[][]): string {
  const cell = (value: string | number) => {
    let text = String(value);
    if (typeof value === "string" && /^[=+\-@\t]/.test(text)) text = `'${text}`;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

/** So many draws of a null, in words. */
export function draws(count: number): string {
  return count === 1 ? "one draw" : `${count} draws`;
}
