"""The typed configuration: its keys, what each stage uses of them, files, jobs, and the published data sets."""
