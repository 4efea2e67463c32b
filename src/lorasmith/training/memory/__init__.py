"""Memory of a run: activations, frozen weights, offloading; and compiled blocks."""
