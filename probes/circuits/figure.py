"""A circuit as a figure: heads by layer, edges by what they move."""

from __future__ import annotations

import plotly.graph_objects as go

from headscope.interp.plots.style import ACCENT, CONTRAST, INK, MUTED, figure, show_text
from headscope.probes.circuits.circuit import Circuit, Edge
from headscope.probes.patching.nodes import LOGITS, Node


def circuit_figure(circuit: Circuit, title: str = "") -> go.Figure:
    """Heads at their layer (upwards) and index, MLPs at the right, the logits on top; an edge's width is its weight.

    Edges that raise the share of the difference moved are blue, those against it red. Without edges only nodes are
    drawn, which says that none were measured.
    """
    layers, width = circuit.size
    said = f"{len(circuit.heads)} of {layers * width} heads, {len(circuit.edges)} edges measured above the threshold"
    fig = figure(title or circuit.name, said, inner=max(320, 18 * layers), showlegend=False)
    largest = max((abs(edge.weight) for edge in circuit.edges), default=1.0)
    for edge in circuit.edges:
        _draw_edge(fig, circuit, edge, largest)
    weights = dict(zip(circuit.heads, circuit.heads.weights, strict=True))
    fig.add_scatter(
        x=[head for _, head in circuit.heads],
        y=[layer for layer, _ in circuit.heads],
        mode="markers+text",
        marker={"size": 14, "color": [ACCENT if weights[pair] >= 0 else CONTRAST for pair in circuit.heads]},
        text=[f"L{layer}H{head}" for layer, head in circuit.heads],
        customdata=[weights[pair] for pair in circuit.heads],
        textposition="top center",
        hovertemplate="%{text}: %{customdata:.3f}<extra></extra>",
    )
    others: list[tuple[float, int, str]] = [(width, layer, f"L{layer}MLP") for layer in circuit.mlps or ()]
    others += [(_end(circuit), layers, LOGITS)] if circuit.edges else []
    for x, y, name in others:
        fig.add_scatter(x=[x], y=[y], mode="markers+text", text=[name], textposition="top center",
                        marker={"size": 12, "symbol": "square", "color": INK}, hoverinfo="text")  # fmt: skip
    fig.update_xaxes(title="head", range=[-0.7, width + 0.7], dtick=1, showgrid=False)
    fig.update_yaxes(title="layer", range=[-0.7, layers + 1.2], showgrid=True)
    return fig


def _draw_edge(fig: go.Figure, circuit: Circuit, edge: Edge, largest: float) -> None:
    ends = [_place(circuit, edge.sender), _place(circuit, edge.receiver)]
    size = abs(edge.weight) / largest
    colour = (ACCENT if edge.weight > 0 else CONTRAST) if size > 0.1 else MUTED
    words = show_text(f"{edge.sender} to {edge.receiver}: {edge.weight:.3f}")
    fig.add_scatter(x=[x for x, _ in ends], y=[y for _, y in ends], mode="lines", hoverinfo="text", text=words,
                    line={"width": 0.5 + 4 * size, "color": colour}, opacity=0.6)  # fmt: skip


def _place(circuit: Circuit, name: str) -> tuple[float, float]:
    if name == LOGITS:
        return _end(circuit), float(circuit.size[0])
    node = Node.of(name)
    return float(circuit.size[1] if node.head is None else node.head), float(node.layer)


def _end(circuit: Circuit) -> float:
    return (circuit.size[1] - 1) / 2
