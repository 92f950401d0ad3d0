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
      const figure = JSON.parse(await unpack(plot.dataset.from));
      await Plotly.newPlot(plot, figure.data, figure.layout, config);
    } catch (error) {
      fail(plot, `This figure cannot be drawn (${error}).`);
    }
  }
  document.documentElement.dataset.drawn = "true";
})();
