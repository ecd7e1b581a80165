"""Commands that people type: `python -m workflow_scripts --help` lists them."""
