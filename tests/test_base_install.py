"""A device: an empty environment with the base install alone runs a bundle."""

import json
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_base_install_answers_without_torch(tmp_path, demo_bundle):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", ROOT]
    subprocess.run(install, check=True)
    picture = next((ROOT / "demo" / "pictures").glob("*.png"))
    ask = [environment / "bin" / "resprune", "ask", demo_bundle, picture, "What color is the circle?"]
    done = subprocess.run([*ask, "--json"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"]
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "transformers", "onnxscript", "scikit"):
        assert heavy not in listed
    export = subprocess.run(
        [environment / "bin" / "resprune", "export", "demo", tmp_path / "out", "-k", "16"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert export.returncode == 2
    assert 'pip install "resprune[export]"' in export.stderr
    assert len(export.stderr.strip().splitlines()) == 1
