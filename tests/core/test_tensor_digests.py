"""A digest covers everything that a tensor is, and nothing else."""

from __future__ import annotations

import torch

from lorasmith.core.tensor_digests import digest_of_tensors


def test_names_shapes_dtypes_bytes_and_order_count() -> None:
    tensor = torch.arange(6, dtype=torch.float32)
    changed = tensor.clone()
    changed[5] = -0.0
    cases = [
        [("a", tensor)],
        [("b", tensor)],
        [("a", tensor.reshape(2, 3))],
        [("a", tensor.view(torch.int32))],
        [("a", tensor), ("b", tensor)],
        [("b", tensor), ("a", tensor)],
        [("a", tensor[:3]), ("a", tensor[3:])],
        [("a", changed)],
        [("a", tensor[:0])],
        [("a\ud800", tensor)],
        [],
    ]
    digests = [digest_of_tensors(one) for one in cases]
    assert len({*digests, digest_of_tensors([], beginning=1)}) == len(cases) + 1


def test_memory_layout_and_history_do_not_count() -> None:
    tensor = torch.randn(2, 3, 4, 4)
    same = [tensor.to(memory_format=torch.channels_last), tensor.clone().requires_grad_(), tensor.transpose(0, 1).mT.mT]
    assert digest_of_tensors([("a", same[0])]) == digest_of_tensors([("a", same[1])])
    assert digest_of_tensors([("a", same[0])]) == digest_of_tensors([("a", same[2].transpose(0, 1))])
    assert digest_of_tensors([("a", torch.tensor(1.5))]) != digest_of_tensors([("a", torch.tensor([1.5]))])


def test_a_large_tensor_is_hashed_in_blocks() -> None:
    blocks: list[None] = []
    large = torch.zeros(40 * 2**20, dtype=torch.uint8)
    digest_of_tensors([("a", large)], each_block=lambda: blocks.append(None))
    assert len(blocks) == 3
