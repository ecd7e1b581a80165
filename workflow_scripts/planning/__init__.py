"""What a configuration costs before it runs: counts, FLOPs, memory and hours, as functions of numbers."""
