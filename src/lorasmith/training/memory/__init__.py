"""How a run fits into memory: activations, frozen weights, streams, compiled blocks."""
