"""The workflow after a whole run, shared by all files here: no test may change it, each works in a copy."""

import pytest
from checkout import Workflow


@pytest.fixture(scope="session")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    """Return the workflow after a whole run, in which every job's log lists the modules it loaded."""
    workflow = Workflow.checkout(tmp_path_factory.mktemp("workflow") / "softpref")
    workflow.snakemake("--cores", "2", PYTHONPROFILEIMPORTTIME="1")
    return workflow
