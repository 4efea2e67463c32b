"""Files that hold base models: containers, packed weights, original layouts."""
