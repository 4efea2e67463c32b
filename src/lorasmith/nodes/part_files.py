"""Checks from file headers, before anything is encoded, that the files that a graph trains with belong together.

Links are followed to the nodes that load: those of the model, of the text encoders that made the conditioning, and of
the autoencoder that made the latents. What cannot be followed (a file name from another node, a choice among several
models) is checked by the node that uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasmith.core.folders import Folders
from lorasmith.families.loading import check_encoders, load_structure
from lorasmith.families.part_loading import autoencoder_part
from lorasmith.nodes.loaders import ANY_TYPE
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow.graph import Graph, Link
from lorasmith.workflow.sockets import ANY, MATCH

_LOADERS = {
    "CheckpointLoaderSimple": ("checkpoints", ("ckpt_name",)),
    "UNETLoader": ("diffusion_models", ("unet_name",)),
    "CLIPLoader": ("text_encoders", ("clip_name",)),
    "DualCLIPLoader": ("text_encoders", ("clip_name1", "clip_name2")),
    "TripleCLIPLoader": ("text_encoders", ("clip_name1", "clip_name2", "clip_name3")),
    "QuadrupleCLIPLoader": ("text_encoders", ("clip_name1", "clip_name2", "clip_name3", "clip_name4")),
    "VAELoader": ("vae", ("vae_name",)),
}
"""Kind of folder and inputs with names of files, by node."""


@dataclass(frozen=True)
class _Loaded:
    """Files that a node loads, and the type of text encoders that are loaded apart."""

    paths: tuple[Path, ...]
    clip_type: str | None


def check_part_files(
    graph: Graph, folders: Folders, *, model: Link, conditioning: Link, latents: Link, loras: Sequence[Path]
) -> None:
    """Check that a model is trained on its own encoders' encodings, and continues LoRAs of its own.

    ModelError or LoraError if a file is for another model.
    """
    base = _loaded(graph, model, "MODEL", folders)
    if base is None:
        return

    def apart(link: Link, carried: str, wanted: str) -> set[_Loaded]:
        found = (_loaded(graph, one, wanted, folders) for one in _makers(graph, link, carried, wanted))
        return {one for one in found if one is not None and one != base}  # a checkpoint's own parts fit it

    encoders, autoencoders = apart(conditioning, "CONDITIONING", "CLIP"), apart(latents, "LATENT", "VAE")
    if not (encoders or autoencoders or loras):
        return
    structure = load_structure(base.paths[0])
    for one in encoders:
        check_encoders(structure, one.paths, one.clip_type)
    for one in autoencoders:
        autoencoder_part(one.paths[0], structure.family)
    for path in loras:
        Lora.load(path, structure)


def _loaded(graph: Graph, link: Link, wanted: str, folders: Folders) -> _Loaded | None:
    """The files of the node that a model or a part of it comes from; None if unknown until it runs."""
    while (member := graph.nodes[link.node_id]).node.id not in _LOADERS:
        onward = [one for _, one in member.links() if _type(graph, one) in (wanted, ANY, MATCH)]
        if len(onward) != 1:
            return None
        (link,) = onward
    kind, inputs = _LOADERS[member.node.id]
    names = [member.inputs[name] for name in inputs]
    if any(isinstance(name, Link) for name in names):
        return None
    clip_type = member.inputs.get("type", ANY_TYPE) if kind == "text_encoders" else None
    return _Loaded(tuple(folders.find(kind, name) for name in names), clip_type)


def _makers(graph: Graph, link: Link, carried: str, wanted: str) -> Iterator[Link]:
    """The links of type `wanted` into the nodes that make what comes through a link of type `carried`."""
    waiting, seen = [link], {link}
    while waiting:
        for _, one in graph.nodes[waiting.pop().node_id].links():
            if (received := _type(graph, one)) == wanted:
                yield one
            elif received in (carried, ANY, MATCH) and one not in seen:
                seen.add(one)
                waiting.append(one)


def _type(graph: Graph, link: Link) -> str:
    return graph.nodes[link.node_id].node.outputs[link.output].type
