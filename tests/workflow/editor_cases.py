"""Small graphs in the editor's format, one for each thing that it does; what the editor makes of them is recorded."""

from __future__ import annotations

from typing import Any

TYPES = {
    "PrimitiveString": ["STRING"],
    "PrimitiveInt": ["INT"],
    "StringConcatenate": ["STRING"],
    "StringReplace": ["STRING"],
    "LoraModelLoader": ["MODEL"],
    "CheckpointLoaderSimple": ["MODEL", "CLIP", "VAE"],
    "LoraLoader": ["MODEL", "CLIP"],
    "EmptyLatentImage": ["LATENT"],
    "KSampler": ["LATENT"],
    "VAEDecode": ["IMAGE"],
    "CLIPTextEncode": ["CONDITIONING"],
    "Reroute": ["*"],
    "PrimitiveNode": ["STRING"],
}
INPUTS = {"MODEL": ("model",), "CLIP": ("clip",), "VAE": ("vae",), "LATENT": ("samples", "latent_image")}


def made(key: int, kind: str, values: Any = None, *, mode: int = 0, title: str = "", **links: int | None) -> Any:
    """A node; `links` are its inputs, by the id of their link. Those of values are inputs in place of widgets."""
    inputs = [
        {"name": name, "type": _type(name), "link": link, **({"widget": {"name": name}} if _is_value(name) else {})}
        for name, link in links.items()
    ]
    return {
        "id": key,
        "type": kind,
        "pos": [key * 300, 0],
        "size": [200, 100],
        "flags": {},
        "order": key,
        "mode": mode,
        "inputs": inputs,
        "outputs": [{"name": one, "type": one, "links": []} for one in TYPES.get(kind, ["STRING"])],
        "properties": {},
        "widgets_values": [] if values is None else values,
        **({"title": title} if title else {}),
    }


def joined(key: int, a: str = "a", b: str = "b", **more: Any) -> Any:
    """A node that joins two texts."""
    return made(key, "StringConcatenate", [a, b, "-"], **more)


def shown(key: int, link: int) -> Any:
    """An output node."""
    node = made(key, "PreviewAny", [])
    node["inputs"] = [{"name": "source", "type": "*", "link": link}]
    node["outputs"] = [{"name": "STRING", "type": "STRING", "links": []}]
    return node


def graph(nodes: list[Any], links: list[list[Any]], *, subgraphs: list[Any] | None = None, **more: Any) -> Any:
    """A file of version 0.4."""
    return {
        "last_node_id": 100,
        "last_link_id": 100,
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
        **({"definitions": {"subgraphs": subgraphs}} if subgraphs else {}),
        **more,
    }


def subgraph(number: int, nodes: list[Any], links: list[list[Any]], inputs: list[str], outputs: int = 1) -> Any:
    """A definition; links from its inputs come from node -10, those to its outputs lead to node -20."""
    uuid = f"00000000-0000-4000-8000-{number:012}"
    objects = [_link(*one) for one in links]
    return {
        "id": uuid,
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": 100, "lastLinkId": 100, "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": f"Subgraph {number}",
        "inputNode": {"id": -10, "bounding": [0, 0, 100, 100]},
        "outputNode": {"id": -20, "bounding": [900, 0, 100, 100]},
        "inputs": [
            {
                "id": f"00000000-0000-4000-9000-{number:06}{place:06}",
                "name": name,
                "type": _type(name),
                "linkIds": [one["id"] for one in objects if (one["origin_id"], one["origin_slot"]) == (-10, place)],
            }
            for place, name in enumerate(inputs)
        ],
        "outputs": [
            {
                "id": f"00000000-0000-4000-a000-{number:06}{place:06}",
                "name": f"out{place}",
                "type": "STRING",
                "linkIds": [one["id"] for one in objects if (one["target_id"], one["target_slot"]) == (-20, place)],
            }
            for place in range(outputs)
        ],
        "widgets": [],
        "nodes": nodes,
        "groups": [],
        "links": objects,
        "extra": {},
    }


def instance(key: int, number: int, values: Any = None, *, proxies: Any = None, mode: int = 0, **links: Any) -> Any:
    """An instance of a subgraph."""
    node = made(key, f"00000000-0000-4000-8000-{number:012}", values, mode=mode, **links)
    if proxies is not None:
        node["properties"]["proxyWidgets"] = proxies
    return node


def _link(key: int, origin: int, origin_slot: int, target: int, target_slot: int, kind: str) -> dict[str, Any]:
    ends = {"origin_id": origin, "origin_slot": origin_slot, "target_id": target, "target_slot": target_slot}
    return {"id": key, **ends, "type": kind}


def _type(name: str) -> str:
    kinds = {one: kind for kind, names in INPUTS.items() for one in names}
    if name in ("positive", "negative"):
        return "CONDITIONING"
    return "INT" if name in ("seed", "steps", "width") else kinds.get(name, "*" if name == "" else "STRING")


def _is_value(name: str) -> bool:
    return _type(name) in ("STRING", "INT")


TEXT = "STRING"
JOIN = subgraph(
    1, [joined(21, "in1", "in2", string_a=1)], [[1, -10, 0, 21, 0, TEXT], [2, 21, 0, -20, 0, TEXT]], ["first"]
)
"""A subgraph of one node; its input `first` stands for a widget."""
BOTH = subgraph(
    2,
    [joined(22, "x1", "x2", string_a=1), joined(23, "y1", "y2", string_a=3, string_b=4)],
    [
        [1, -10, 0, 22, 0, TEXT],
        [3, 22, 0, 23, 0, TEXT],
        [4, -10, 1, 23, 1, TEXT],
        [5, 23, 0, -20, 0, TEXT],
        [6, 22, 0, -20, 1, TEXT],
    ],
    ["first", "second"],
    outputs=2,
)
PLAIN = subgraph(3, [joined(27, "in1", "in2")], [[2, 27, 0, -20, 0, TEXT]], [])
"""A subgraph without inputs, whose widgets only `proxyWidgets` reaches."""
OUTER = subgraph(
    4,
    [instance(25, 1, ["middle"], first=1), joined(26, "z1", "z2", string_a=2)],
    [[1, -10, 0, 25, 0, TEXT], [2, 25, 0, 26, 0, TEXT], [3, 26, 0, -20, 0, TEXT]],
    ["text"],
)
"""A subgraph with an instance of another; its input leads into that."""
OUTER_PLAIN = subgraph(
    5,
    [instance(25, 1, ["middle"], first=None), joined(26, "z1", "z2", string_a=2)],
    [[2, 25, 0, 26, 0, TEXT], [3, 26, 0, -20, 0, TEXT]],
    [],
)
PRIMITIVE = subgraph(
    6,
    [made(33, "PrimitiveNode", ["held", "fixed"]), joined(34, "a", "b", string_a=1, string_b=2)],
    [[1, 33, 0, 34, 0, TEXT], [2, 33, 0, 34, 1, TEXT], [3, 34, 0, -20, 0, TEXT]],
    [],
)
TWICE = subgraph(8, [joined(31, "one"), joined(32, "two")], [[1, 31, 0, -20, 0, TEXT], [2, 32, 0, -20, 0, TEXT]], [])
TWICE["outputs"][0]["linkIds"] = [2, 1]
BYPASSED = subgraph(
    7,
    [joined(33, mode=4, string_a=1), joined(34, string_a=2)],
    [[1, -10, 0, 33, 0, TEXT], [2, 33, 0, 34, 0, TEXT], [3, 34, 0, -20, 0, TEXT]],
    ["text"],
)
IMAGES = [
    made(1, "CheckpointLoaderSimple", ["lorasmith-tiny.safetensors"]),
    made(2, "CLIPTextEncode", ["a fox"], clip=2),
    made(3, "EmptyLatentImage", [64, 64, 1]),
]

CASES: dict[str, Any] = {
    "plain": graph([joined(1), shown(2, 1)], [[1, 1, 0, 2, 0, TEXT]]),
    "titles": graph([joined(1, title="Mine"), shown(2, 1)], [[1, 1, 0, 2, 0, TEXT]]),
    "an input in place of a widget": graph(
        [made(1, "PrimitiveString", ["x"]), joined(2, string_b=1), shown(3, 2)],
        [[1, 1, 0, 2, 0, TEXT], [2, 2, 0, 3, 0, TEXT]],
    ),
    "reroutes": graph(
        [joined(1), made(2, "Reroute", **{"": 1}), made(3, "Reroute", **{"": 2}), shown(4, 3)],
        [[1, 1, 0, 2, 0, "*"], [2, 2, 0, 3, 0, "*"], [3, 3, 0, 4, 0, "*"]],
    ),
    "a reroute of nothing": graph(
        [made(2, "Reroute", **{"": None}), joined(1, string_a=1), shown(4, 3)],
        [[1, 2, 0, 1, 0, "*"], [3, 1, 0, 4, 0, TEXT]],
    ),
    "a primitive node": graph(
        [made(9, "PrimitiveNode", ["held"]), joined(1, string_a=1), joined(2, string_a=2, string_b=3), shown(4, 4)],
        [[1, 9, 0, 1, 0, TEXT], [2, 9, 0, 2, 0, TEXT], [3, 1, 0, 2, 1, TEXT], [4, 2, 0, 4, 0, TEXT]],
    ),
    "a primitive node behind a reroute": graph(
        [made(9, "PrimitiveNode", ["held"]), made(8, "Reroute", **{"": 1}), joined(1, string_a=2), shown(4, 4)],
        [[1, 9, 0, 8, 0, "*"], [2, 8, 0, 1, 0, TEXT], [4, 1, 0, 4, 0, TEXT]],
    ),
    "a primitive node at an instance": graph(
        [made(7, "PrimitiveNode", ["held"]), instance(9, 1, ["outer"], first=5), shown(2, 1)],
        [[1, 9, 0, 2, 0, TEXT], [5, 7, 0, 9, 0, TEXT]],
        subgraphs=[JOIN],
    ),
    "an output with two links": graph([instance(9, 8, []), shown(2, 1)], [[1, 9, 0, 2, 0, TEXT]], subgraphs=[TWICE]),
    "bypassed": graph(
        [joined(1), made(2, "StringReplace", ["", "a", "b"], mode=4, string=1), shown(3, 2)],
        [[1, 1, 0, 2, 0, TEXT], [2, 2, 0, 3, 0, TEXT]],
    ),
    "bypassed, the input of the same number": graph(
        [
            *IMAGES[:1],
            made(5, "LoraLoader", ["a.safetensors", 1.0, 1.0], mode=4, model=1, clip=2),
            made(2, "CLIPTextEncode", ["a fox"], clip=3),
            made(3, "EmptyLatentImage", [64, 64, 1]),
            made(
                6,
                "KSampler",
                [7, "fixed", 2, 1.0, "euler", "normal", 1.0],
                model=4,
                positive=5,
                negative=6,
                latent_image=7,
            ),
            made(8, "VAEDecode", [], samples=8, vae=9),
            made(9, "PreviewImage", [], images=10),
        ],
        [
            [1, 1, 0, 5, 0, "MODEL"],
            [2, 1, 1, 5, 1, "CLIP"],
            [3, 5, 1, 2, 0, "CLIP"],
            [4, 5, 0, 6, 0, "MODEL"],
            [5, 2, 0, 6, 1, "CONDITIONING"],
            [6, 2, 0, 6, 2, "CONDITIONING"],
            [7, 3, 0, 6, 3, "LATENT"],
            [8, 6, 0, 8, 0, "LATENT"],
            [9, 1, 2, 8, 1, "VAE"],
            [10, 8, 0, 9, 0, "IMAGE"],
        ],
    ),
    "bypassed without an input that fits": graph(
        [
            *IMAGES[:2],
            made(4, "CLIPTextEncode", ["b"], mode=4, clip=3),
            made(5, "ConditioningZeroOut", [], conditioning=4),
            shown(6, 5),
        ],
        [
            [2, 1, 1, 2, 0, "CLIP"],
            [3, 1, 1, 4, 0, "CLIP"],
            [4, 4, 0, 5, 0, "CONDITIONING"],
            [5, 5, 0, 6, 0, "CONDITIONING"],
        ],
    ),
    "muted": graph(
        [joined(1, mode=2), joined(2, string_a=1), shown(3, 2)], [[1, 1, 0, 2, 0, TEXT], [2, 2, 0, 3, 0, TEXT]]
    ),
    "notes": graph(
        [joined(1), shown(2, 1), made(3, "Note", ["read me"]), made(4, "MarkdownNote", ["# read me"])],
        [[1, 1, 0, 2, 0, TEXT]],
    ),
    "a seed and what follows it": graph(
        [made(1, "PrimitiveInt", [5, "increment"]), shown(2, 1)], [[1, 1, 0, 2, 0, "INT"]]
    ),
    "values that are missing": graph([made(1, "StringConcatenate", ["only"]), shown(2, 1)], [[1, 1, 0, 2, 0, TEXT]]),
    "link objects": graph([joined(1), shown(2, 1)], [_link(1, 1, 0, 2, 0, TEXT)], version=1),  # type: ignore[list-item]
    "a subgraph with its own values": graph(
        [instance(9, 1, [], first=None), shown(2, 1)], [[1, 9, 0, 2, 0, TEXT]], subgraphs=[JOIN]
    ),
    "a subgraph with a value of the instance": graph(
        [instance(9, 1, ["outer"], first=None), shown(2, 1)], [[1, 9, 0, 2, 0, TEXT]], subgraphs=[JOIN]
    ),
    "a subgraph with a link": graph(
        [made(1, "PrimitiveString", ["linked"]), instance(9, 1, ["outer"], first=2), shown(2, 1)],
        [[1, 9, 0, 2, 0, TEXT], [2, 1, 0, 9, 0, TEXT]],
        subgraphs=[JOIN],
    ),
    "two instances": graph(
        [
            instance(9, 2, ["p", "q"], first=None, second=None),
            instance(8, 2, ["r", None], first=None, second=4),
            shown(2, 1),
            shown(3, 2),
            shown(4, 3),
        ],
        [[1, 9, 0, 2, 0, TEXT], [2, 8, 0, 3, 0, TEXT], [3, 8, 1, 4, 0, TEXT], [4, 9, 1, 8, 1, TEXT]],
        subgraphs=[BOTH],
    ),
    "widgets by proxies, with inputs": graph(
        [
            instance(9, 2, ["q", "p"], proxies=[["23", "string_b"], ["22", "string_a"]], first=None, second=None),
            shown(2, 1),
        ],
        [[1, 9, 0, 2, 0, TEXT]],
        subgraphs=[BOTH],
    ),
    "widgets by proxies, without inputs": graph(
        [instance(9, 3, ["p", "+"], proxies=[["27", "string_b"], ["27", "delimiter"]]), shown(2, 1)],
        [[1, 9, 0, 2, 0, TEXT]],
        subgraphs=[PLAIN],
    ),
    "two instances, one with proxies": graph(
        [instance(9, 3, ["p"], proxies=[["27", "string_b"]]), instance(8, 3, []), shown(2, 1), shown(3, 2)],
        [[1, 9, 0, 2, 0, TEXT], [2, 8, 0, 3, 0, TEXT]],
        subgraphs=[PLAIN],
    ),
    "nested, the inner instance's value": graph(
        [instance(9, 4, [], text=None), shown(2, 1)], [[1, 9, 0, 2, 0, TEXT]], subgraphs=[JOIN, OUTER]
    ),
    "nested, the outer instance's value": graph(
        [instance(9, 4, ["outermost"], text=None), shown(2, 1)], [[1, 9, 0, 2, 0, TEXT]], subgraphs=[JOIN, OUTER]
    ),
    "nested, by proxies": graph(
        [instance(9, 5, ["outermost"], proxies=[["25", "first"]]), shown(2, 1)],
        [[1, 9, 0, 2, 0, TEXT]],
        subgraphs=[JOIN, OUTER_PLAIN],
    ),
    "nested, by proxies of an older spelling": graph(
        [instance(9, 5, ["outermost"], proxies=[["25", "21: string_a"]]), shown(2, 1)],
        [[1, 9, 0, 2, 0, TEXT]],
        subgraphs=[JOIN, OUTER_PLAIN],
    ),
    "a primitive node by proxies": graph(
        [instance(9, 6, ["p"], proxies=[["33", "value"]]), shown(2, 1)], [[1, 9, 0, 2, 0, TEXT]], subgraphs=[PRIMITIVE]
    ),
    "a primitive node in a subgraph": graph(
        [instance(9, 6, []), shown(2, 1)], [[1, 9, 0, 2, 0, TEXT]], subgraphs=[PRIMITIVE]
    ),
    "set aside by the editor": graph(
        [
            {
                **instance(9, 1, ["outer"], first=None),
                "properties": {
                    "proxyWidgetErrorQuarantine": [
                        {
                            "originalEntry": ["-1", "first"],
                            "reason": "missingSourceNode",
                            "hostValue": "aside",
                            "attemptedAtVersion": 1,
                        }
                    ]
                },
            },
            shown(2, 1),
        ],
        [[1, 9, 0, 2, 0, TEXT]],
        subgraphs=[JOIN],
    ),
    "a bypassed instance": graph(
        [joined(1), instance(9, 1, ["outer"], mode=4, first=1), shown(2, 2)],
        [[1, 1, 0, 9, 0, TEXT], [2, 9, 0, 2, 0, TEXT]],
        subgraphs=[JOIN],
    ),
    "a muted instance": graph(
        [instance(9, 1, ["outer"], mode=2, first=None), joined(1, string_a=1), shown(2, 2)],
        [[1, 9, 0, 1, 0, TEXT], [2, 1, 0, 2, 0, TEXT]],
        subgraphs=[JOIN],
    ),
    "a bypassed node in a subgraph": graph(
        [made(1, "PrimitiveString", ["linked"]), instance(9, 7, [], text=1), shown(2, 2)],
        [[1, 1, 0, 9, 0, TEXT], [2, 9, 0, 2, 0, TEXT]],
        subgraphs=[BYPASSED],
    ),
}
