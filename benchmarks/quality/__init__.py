"""What LoRAs learn, by recipe: see `benchmarks.quality.__main__`."""
