"""Node graphs: declaration, parsing, validation, execution. Knows nothing of training."""
