"""An algorithm and a model family for Lorasmith."""
