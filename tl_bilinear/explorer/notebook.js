// The page in a frame of a notebook, and what passes between it and Python. The frame is a place of its
// own: its styles stay in it, and it cannot reach the notebook but by these messages.
export default {
  render({ model, el }) {
    const frame = document.createElement("iframe");
    frame.title = "explorer";
    frame.setAttribute("sandbox", "allow-scripts allow-forms allow-downloads");
    frame.style.cssText = `width: 100%; height: ${model.get("_height")}px; border: 1px solid #d9dee5`;
    frame.srcdoc = new TextDecoder().decode(model.get("_page"));
    el.append(frame);

    const say = (message) => frame.contentWindow?.postMessage(message, "*");
    const move = () => say({ tlBilinear: "place", place: model.get("place") });
    const heard = ({ source, data }) => {
      if (source !== frame.contentWindow) return;
      if (data?.tlBilinear === "ask") model.send(data);
      if (data?.tlBilinear === "ready" && model.get("place")) move();
      if (data?.tlBilinear === "place" && data.place !== model.get("place")) {
        model.set("place", data.place);
        model.save_changes();
      }
    };
    window.addEventListener("message", heard);
    model.on("msg:custom", say);
    model.on("change:place", move);
    return () => {
      window.removeEventListener("message", heard);
      model.off("msg:custom", say);
      model.off("change:place", move);
    };
  },
};
