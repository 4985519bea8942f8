"""The code of the guide to devices, which is shown in text and not in cells."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.processes
def test_the_code_of_the_guide_prints_what_is_shown_below_it():
    guide = json.loads((ROOT / "notebooks" / "07_backends_and_devices.ipynb").read_text("utf-8"))
    text = "".join("".join(cell["source"]) for cell in guide["cells"])
    shown = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)
    assert len(shown) == 3
    code = "".join(code for code, _ in shown)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == "".join(output for _, output in shown)
