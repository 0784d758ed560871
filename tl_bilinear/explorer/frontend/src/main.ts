import { mount } from "svelte";
import App from "./App.svelte";
import "./app.css";
import { listen } from "./lib/bundle";

listen();
const target = document.getElementById("explorer")!;
target.replaceChildren();
mount(App, { target });
