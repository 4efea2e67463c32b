"""The exception tree is the one that its docstring draws."""

from __future__ import annotations

import inspect

from lorasmith.core import errors
from lorasmith.core.errors import GraphError, LorasmithError


def test_every_error_is_public_documented_and_drawn() -> None:
    classes = {name: thing for name, thing in vars(errors).items() if inspect.isclass(thing)}

    assert set(errors.__all__) == set(classes)
    for name, kind in classes.items():
        assert issubclass(kind, LorasmithError)
        assert kind.__doc__
        assert f" {name}" in (errors.__doc__ or "")


def test_a_graph_error_shows_and_keeps_its_findings() -> None:
    error = GraphError("the workflow has 2 faults", ("node 3 lacks a model", "node 4 is unknown"))

    assert str(error) == "the workflow has 2 faults\n  - node 3 lacks a model\n  - node 4 is unknown"
    assert error.findings == ("node 3 lacks a model", "node 4 is unknown")
    assert GraphError("empty").findings == ()
