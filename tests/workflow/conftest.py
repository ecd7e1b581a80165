"""The workflow after a whole run, shared by all files here: no test may change it, each works in a copy."""

import pytest
from checkout import Workflow


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests time for the whole run, which the first of them makes: minutes, many more on a busy machine."""
    for item in items:
        if "workflow" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    """Return the workflow after a whole run, in which every job's log lists the modules it loaded."""
    workflow = Workflow.checkout(tmp_path_factory.mktemp("workflow") / "softpref")
    workflow.snakemake("--cores", "2", PYTHONPROFILEIMPORTTIME="1")
    return workflow
