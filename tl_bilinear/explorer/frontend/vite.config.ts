import { existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { svelte } from "@sveltejs/vite-plugin-svelte";
import type { Plugin } from "vite";
import { defineConfig } from "vitest/config";

/** Puts the licences of all that is bundled in front of the program, as they ask for. */
function licences(): Plugin {
  return {
    name: "licences",
    generateBundle(_, bundle) {
      for (const chunk of Object.values(bundle)) {
        if (chunk.type !== "chunk") continue;
        const texts = new Map<string, string>();
        for (const id of Object.keys(chunk.modules).filter((id) => id.includes("/node_modules/"))) {
          let folder = dirname(id.split("?")[0]);
          while (!existsSync(join(folder, "package.json")) || !("version" in packageOf(folder))) folder = dirname(folder);
          const { name, version, license } = packageOf(folder);
          const file = readdirSync(folder).find((each) => /^licen[cs]e/i.test(each));
          if (!file) throw new Error(`${name} ${version} has no licence file`);
          texts.set(`${name} ${version} (${license})`, readFileSync(join(folder, file), "utf8").trim());
        }
        const all = [...texts].sort().map(([name, text]) => `${name}\n\n${text}`).join("\n\n----\n\n");
        chunk.code = `/*!\nThis program contains:\n\n${all.replaceAll("*/", "* /")}\n*/\n${chunk.code}`;
      }
    },
  };
}

function packageOf(folder: string): Record<string, string> {
  return JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
}

// One script and one style sheet with fixed names: Python puts both into the page.
export default defineConfig({
  plugins: [svelte(), licences()],
  build: {
    outDir: "../asset",
    emptyOutDir: true,
    target: "es2022",
    cssCodeSplit: false,
    modulePreload: false,
    lib: {
      entry: "src/main.ts",
      formats: ["iife"],
      name: "explorer",
      fileName: () => "explorer.js",
      cssFileName: "explorer",
    },
  },
  test: { include: ["src/**/*.test.ts"] },
});
