"""Makes `lorasmith-tiny`, the model that comes with the package, from public emoji pictures; README.md says how."""
