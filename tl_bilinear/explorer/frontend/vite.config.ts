import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vitest/config";

// One script and one style sheet with fixed names: Python puts both into the page.
export default defineConfig({
  plugins: [svelte()],
  build: {
    outDir: "../asset",
    emptyOutDir: true,
    target: "es2022",
    cssCodeSplit: false,
    modulePreload: false,
    lib: { entry: "src/main.ts", formats: ["iife"], name: "explorer", fileName: () => "explorer.js", cssFileName: "explorer" },
  },
  test: { include: ["src/**/*.test.ts"] },
});
