// Unpacks plotly.js and the figures that travel in this page, and draws them. Nothing is requested from anywhere.
(async () => {
  const unpack = async (id) => {
    const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };
  const config = {
    responsive: true,
    displaylogo: false,
    plotlyServerURL: "",
    modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]],
  };
  const night = matchMedia("(prefers-color-scheme: dark)");
  night.addEventListener("change", () => location.reload());
  // headscope's own colours (interp/plots/style.py) and what they are on a dark page
  const dark = {
    "#1f2933": "#e4e7eb", "#52606d": "#aab4bf", "#e4e7eb": "#39424c", "#9aa5b1": "#6b7682", "#a3adb8": "#7b8794",
    "#1f6f8b": "#5fb3d0", "#c8553d": "#e8836d", '"white"': '"#15191e"',
  };
  const tinted = (text) =>
    night.matches ? text.replace(/#[0-9a-f]{6}|"white"/g, (colour) => dark[colour] || colour) : text;
  const fitted = (layout, room) => {
    if (layout.width > room) delete layout.width;  // a fixed width would be cut off
    if (room < 520) {
      layout.title = { ...layout.title, font: { size: 14 } };
      layout.margin = { ...layout.margin, l: 8, r: 8 };
      layout.legend = { ...layout.legend, orientation: "h", x: 0, y: -0.25, xanchor: "left", yanchor: "top" };
      const axis = layout.xaxis || {};
      const step = Math.ceil((22 * (axis.tickvals || []).length) / room);
      for (const key of ["tickvals", "ticktext"]) if (step > 1) axis[key] = axis[key].filter((_, i) => i % step === 0);
    }
    return layout;
  };
  // on paper nothing can be unfolded
  addEventListener("beforeprint", () => document.querySelectorAll("main > details").forEach((one) => (one.open = true)));
  const fail = (plot, words) => {
    const note = document.createElement("p");
    note.className = "failed";
    note.textContent = words;
    plot.replaceChildren(note);
  };
  const plots = document.querySelectorAll(".plot");
  try {
    const library = document.createElement("script");
    library.textContent = await unpack("plotly");
    document.head.append(library);
  } catch (error) {
    plots.forEach((plot) => fail(plot, `This figure cannot be drawn: a browser of 2023 or later is needed (${error}).`));
    return;
  }
  for (const plot of plots) {
    try {
      const figure = JSON.parse(tinted(await unpack(plot.dataset.from)));
      await Plotly.newPlot(plot, figure.data, fitted(figure.layout, plot.clientWidth), {
        ...config,
        displayModeBar: plot.clientWidth < 520 ? false : "hover",  // it would cover the title
      });
    } catch (error) {
      fail(plot, `This figure cannot be drawn (${error}).`);
    }
  }
  document.documentElement.dataset.drawn = "true";
})();
