"""What runs a stage: command line, provenance, code digest, locks, progress and GPUs."""
