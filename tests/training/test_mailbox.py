"""Numbers arrive on the host in the order of their steps."""

from __future__ import annotations

import torch

from lorasmith.training.step_results import Mailbox


def test_the_mailbox_delivers_in_order() -> None:
    mailbox = Mailbox(torch.device("cpu"))
    for step in range(3):
        mailbox.post(step, torch.tensor([float(step), 2.0]))
    assert mailbox.collect(wait=True) == [(0, [0.0, 2.0], 0.0), (1, [1.0, 2.0], 0.0), (2, [2.0, 2.0], 0.0)]
    assert mailbox.collect() == []


def test_later_steps_are_left_for_later() -> None:
    mailbox = Mailbox(torch.device("cpu"))
    for step in range(3):
        mailbox.post(step, torch.tensor([float(step)]))
    assert mailbox.collect(before=1) == [(0, [0.0], 0.0)]
    assert mailbox.collect(before=1) == []
    assert mailbox.collect() == [(1, [1.0], 0.0), (2, [2.0], 0.0)]
