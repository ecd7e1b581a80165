"""MLflow: one run for each stage instance, and what its pages say."""
