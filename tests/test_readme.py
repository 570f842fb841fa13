"""README's own task, taken out of it: in a copy of the repository it is a file and a line, and it runs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = """
import evaluate
words = "--task centroid --weights pixels --device cpu --workers 0 --limit 120".split()
for more in [], ["--metric", "euclid"], ["--control"], ["--help"], ["--layers", "3"]:
    try:
        evaluate.main(words + more)
    except ValueError as error:
        print("error:", error)
"""


def test_the_new_task_of_the_readme_runs(tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(code.strip().splitlines()) <= 25
    for path in ROOT.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, tmp_path)
        elif (path / "__init__.py").is_file():
            shutil.copytree(path, tmp_path / path.name)
    (tmp_path / "tasks/centroid.py").write_text(code)
    text = (tmp_path / "tasks/__init__.py").read_text()
    text = text.replace("from tasks import (\n", "from tasks import (\n    centroid,\n")
    (tmp_path / "tasks/__init__.py").write_text(text.replace("    knn.TASK,\n", "    knn.TASK,\n    centroid.TASK,\n"))
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["metric"] for row in found] == ["cosine", "euclid", "cosine"] and found[2]["control"]
    assert all(0 <= row["top1"] < 60 and row["n_val"] == 120 and row["task"] == "centroid" for row in found)
    assert found[0]["top1"] != found[1]["top1"] and "cosine, or euclid" in done.stdout
    assert done.stdout.splitlines()[-1] == "error: --layers: centroid does not read it; its own options are: " \
        "--shots, --metric"
