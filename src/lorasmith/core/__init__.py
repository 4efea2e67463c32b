"""What every room shares: errors, registry, options, adapter state, keyed random numbers, files."""
