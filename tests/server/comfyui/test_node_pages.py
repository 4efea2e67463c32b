from __future__ import annotations

from lorasmith.server.comfyui.graph_answers import node_page
from lorasmith.workflow import NodeContext, Output, node, socket
from tests.server.fake_server import TOYS


def test_a_page_has_what_the_declaration_says() -> None:
    page = node_page(TOYS["Show"])
    assert page.startswith("# Show\n\nShow a number.\n\n*Output node.*\n\n## Inputs\n")
    assert "| `how` | choice, default 'plain', one of plain, bold |  |" in page
    assert "## Outputs" not in page


def test_cells_stay_cells() -> None:
    from lorasmith.core.registry import Registry

    nodes = Registry("node")  # type: ignore[var-annotated]

    @node(
        "Odd",
        "Odd",
        "toys",
        outputs=[Output("INT", "count", is_list=True, tooltip="How many.")],
        aliases=["Older"],
        registry=nodes,
    )
    def odd(
        context: NodeContext, *, a: str = socket("STRING", default="x|y", optional=True, tooltip="One|two\nthree.")
    ) -> tuple[list[int]]:
        """Some."""
        return ([],)

    page = node_page(nodes["Odd"])
    assert "| `a` | STRING, default 'x\\|y' | One\\|two three. |" in page
    assert "| count | list of INT | How many. |" in page
    assert "Older names: `Older`" in page
