"""What the README shows runs as printed."""

import re
import warnings
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    code = "\n".join(blocks).replace("epochs=20", "epochs=2").replace("steps=300", "steps=20")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(code, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "verdict" in printed
    assert "1: GMM" in printed
    assert "fine-tune" in printed or "round 1" in printed
    assert "EUBO" in printed or "No reference" in printed


def test_links_exist():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (README.parent / link).exists(), link
