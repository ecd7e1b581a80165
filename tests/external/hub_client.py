"""A process that downloads what it is told, line by line: huggingface_hub reads HF_ENDPOINT when it is imported.

It does not wait between attempts but says how long it would have.
"""

import io
import json
import logging
import sys
import time
from pathlib import Path

from workflow_scripts.preferences.hub import HubError, fetch

waits: list[float] = []
said = io.StringIO()
logging.basicConfig(level=logging.INFO, stream=said, format="%(message)s")
time.sleep = waits.append  # type: ignore[assignment]

for line in sys.stdin:
    call = json.loads(line)
    waits.clear()
    said.seek(0)
    said.truncate()
    try:
        found = fetch(**call | {"target": Path(call["target"])})
        answer = found._asdict() | {"folder": str(found.folder), "error": ""}
    except HubError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer | {"waits": waits, "log": said.getvalue()}), flush=True)
